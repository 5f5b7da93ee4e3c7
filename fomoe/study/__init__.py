"""Studies: many ordinary runs from one file, their results in one file, and a page of tables."""

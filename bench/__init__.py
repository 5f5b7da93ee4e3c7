"""Measurements: `make bench`, or `python -m bench`. What they mean: docs/performance.md."""

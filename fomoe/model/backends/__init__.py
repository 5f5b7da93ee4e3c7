"""Ways to compute the resident experts; `fomoe.model.backends.base` has the interface."""

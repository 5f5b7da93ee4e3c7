"""Ways to compute the resident experts; `fomoe.model.backends.base` defines the interface."""

"""The cost model: what a run would cost before anyone buys (no torch)."""

"""Everything between sites: averaging over holders, the outer step, the transports."""

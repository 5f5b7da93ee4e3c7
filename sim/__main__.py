"""`python -m fomoe_sim`."""

import sys

from fomoe_sim.cli import main

sys.exit(main())

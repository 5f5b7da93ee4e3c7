"""`python -m fomoe_sim project ...`: the same command line as `fomoe`."""

import sys

from fomoe.cli import main

sys.exit(main())

"""`python -m fomoe`, which is also what torchrun starts."""

import sys

from fomoe.cli import main

if __name__ == "__main__":
    sys.exit(main())

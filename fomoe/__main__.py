"""`python -m fomoe`, which is also what torchrun starts."""

from fomoe.cli import run

if __name__ == "__main__":
    run()

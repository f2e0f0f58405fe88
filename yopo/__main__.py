"""`python -m yopo …`. The commands are in cli.py."""

import sys

from yopo.cli import main

if __name__ == "__main__":
    sys.exit(main())

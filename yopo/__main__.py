"""`python -m yopo …`. The commands are in commands/."""

import sys

from yopo.commands.command_line import main

if __name__ == "__main__":
    sys.exit(main())

"""The command line, one file a command: parses, loads, calls, writes. Nothing is computed here."""

INTERRUPTED = 130  # the exit code that shells give to a program stopped by Ctrl-C

"""The command line, one file a command: parses, loads, calls, writes. Nothing is computed here."""

"""The errors that yopo raises of its own. Where Python's fit (ValueError for a value that cannot
be, TypeError for a class that is not known), those are raised."""

from __future__ import annotations


class BadInput(Exception):
    """A file, folder or setting that the user gave cannot be used; the message says what, and the
    remedy. The command line prints it as one line."""


class CannotGoOn(ValueError):
    """What an earlier, interrupted run left does not fit what is asked now; the message says why.
    Remove it, and everything is done anew."""

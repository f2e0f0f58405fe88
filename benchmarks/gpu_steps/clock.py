"""The time that a run has: who may go on until when, and an end put to what takes too long."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


class Clock:
    """`seconds` from now on, divided among parts of the run by their `shares`, in any unit. What
    one part leaves over goes to those after it."""

    def __init__(self, seconds: float, shares: Mapping[str, float]) -> None:
        self._end = time.monotonic() + seconds
        self._shares = dict(shares)

    @property
    def left(self) -> float:
        return self._end - time.monotonic()

    def deadline(self, part: str) -> Deadline:
        """The end of `part`, which begins now."""
        whole = sum(self._shares.values())
        share = self._shares.pop(part) / whole
        return Deadline(time.monotonic() + max(0.0, self.left) * share)

    def forget(self, parts: Iterable[str]) -> None:
        """These parts are over, or will never begin."""
        for part in parts:
            self._shares.pop(part, None)


class Deadline:
    """A moment after which nothing new is begun."""

    def __init__(self, at: float) -> None:
        self._at = at

    @property
    def left(self) -> float:
        return max(0.0, self._at - time.monotonic())

    @property
    def over(self) -> bool:
        return self.left == 0

    def end(self) -> None:
        """It is over now."""
        self._at = time.monotonic()

    def half(self) -> Deadline:
        """The middle of what is left."""
        return Deadline(self._at - self.left / 2)


class Late(BaseException):
    """What `time_limit` raises; not an Exception, so that nothing in between takes it for its own
    and goes on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises Late in the block when `seconds` are over, where it is Python that takes them
    (a compilation, not a kernel). Without effect off the main thread and where there are no alarms.
    """
    alarms = hasattr(signal, "setitimer")
    if not alarms or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise Late(f"took longer than the {seconds:.0f} s that were left for it")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)

"""Times on the device: CUDA events on a GPU, the clock on a CPU; and the best rates it reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from yopo.bench.floor import Rates

TRIES = 10  # of which the best counts


class Marks:
    """Moments set one after the other without waiting for the device, and the seconds between."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []
        if device.type == "cuda":  # what came before must not be counted
            torch.cuda.synchronize(device)

    def set(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def gaps(self) -> list[float]:
        """Seconds from each mark to the next; waits for the last."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            return [a.elapsed_time(b) / 1e3 for a, b in pairwise(self._marks)]
        return [b - a for a, b in pairwise(self._marks)]


def seconds(work: Callable[[], Any], device: torch.device) -> float:
    """How long `work` takes once."""
    marks = Marks(device)
    marks.set()
    work()
    marks.set()
    return marks.gaps()[0]


def best_rates(side: int, copied: int, dtype: torch.dtype, device: torch.device) -> Rates:
    """FLOP/s of a square product, and bytes/s of a copy, those read and those written."""
    left, right = torch.randn(2, side, side, device=device).to(dtype).unbind()
    source = torch.randn(copied // dtype.itemsize, device=device).to(dtype)
    target = torch.empty_like(source)

    def best(work: Callable[[], Any]) -> float:
        work()
        return min(seconds(work, device) for _ in range(TRIES))

    product, copy = best(lambda: left @ right), best(lambda: target.copy_(source))
    return 2 * side**3 / product, 2 * copied / copy

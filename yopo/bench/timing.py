"""The time that a piece of work takes, and how fast the machine is. Knows no model: two products
that `Probe` times are all it computes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from yopo.counting.flops import Prompt
from yopo.counting.presets import Shape


def timed(work: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """How many seconds `work` took, and what it returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, result


class Probe:
    """Measures what the machine can do, once in each round, next to the arms: a GEMM as wide as the
    prefill's, and reading a weight, by one row times it and by summing it up (the sum, since the
    product of half precision is slower on some CPUs than their memory)."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, prompt: Prompt, batch: int
    ) -> None:
        self._device = device
        rows = batch * (prompt.text + prompt.visual)
        self._weight = torch.randn(shape.intermediate_size, shape.hidden_size).to(device, dtype)
        self._wide = torch.randn(rows, shape.hidden_size).to(device, dtype)
        self._times: dict[str, list[float]] = {"gemm": [], "read": []}

    def run(self) -> None:
        numbers = self._weight.flatten().view(torch.float32)  # whatever they mean
        for name, work in (
            ("gemm", lambda: F.linear(self._wide, self._weight)),
            ("read", lambda: F.linear(self._wide[:1], self._weight)),
            ("read", numbers.sum),
        ):
            for _ in range(3):
                self._times[name].append(timed(work, self._device)[0])

    def rates(self) -> tuple[float, float]:
        """(FLOP/s, bytes/s), the best seen: a bound must not come from a slow moment."""
        flops = 2 * self._wide.shape[0] * self._weight.numel()
        gemm, read = min(self._times["gemm"]), min(self._times["read"])
        return flops / gemm, self._weight.numel() * self._weight.element_size() / read

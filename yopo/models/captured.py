"""Work on tensors of fixed shapes and places, captured as a CUDA graph when it is first done there;
on other devices it is done anew each time. Knows nothing of models."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from yopo.engine.packing import mapped


class Captured:
    """One work, given at each call, which does not keep it: whoever owns both would be freed with
    the next collection of garbage only, and a GPU's memory with it. What a call gives is
    overwritten by the next."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._graph: Any = None
        self._given: Any = None

    def __call__(self, work: Callable[[], Any]) -> Any:
        if self._device.type != "cuda" or self._graph is False:
            return work()
        if self._graph is None:
            try:
                self._capture(work)
            except RuntimeError as error:
                self._graph = False
                why = f"not captured as a CUDA graph, but launched kernel by kernel: {error}"
                warnings.warn(why, stacklevel=3)
                return work()
        self._graph.replay()
        return self._given

    def _capture(self, work: Callable[[], Any]) -> None:
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):  # once uncaptured: libraries set themselves up
            work()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._given = work()
        self._graph = graph


def rounded_up(count: int, to: int) -> int:
    """To a multiple of `to`: what is captured is for all counts up to that."""
    return -(-count // to) * to


def fill(mine: Any, given: Any) -> None:
    """Copies each tensor in `given` into the one in its place in `mine`, of the same shapes."""
    into: list[Tensor] = []
    mapped(mine, lambda each: into.append(each) or each)
    places = iter(into)
    mapped(given, lambda each: next(places).copy_(each, non_blocking=True))


def shape_of(x: Any) -> Any:
    """What of it a captured work is for: all but the numbers in tensors."""
    if isinstance(x, Tensor):
        return tuple(x.shape), x.dtype
    if isinstance(x, tuple):
        return tuple(map(shape_of, x))
    if is_dataclass(x) and not isinstance(x, type):
        return type(x), *(shape_of(getattr(x, field.name)) for field in fields(x))
    return repr(x)

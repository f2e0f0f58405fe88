"""Watches a model's decoder layers for moments in which the host waits for the GPU."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import nn


class Watch:
    """A context in which each call of one of `layers` raises RuntimeError where the host waits for
    the device. calls: how many there were; none means that nothing was watched."""

    def __init__(self, layers: nn.ModuleList) -> None:
        self._layers = layers
        self._handles: list[Any] = []
        self.calls = 0

    def __enter__(self) -> Watch:
        for layer in self._layers:
            self._handles.append(layer.register_forward_pre_hook(self._begin))
            self._handles.append(layer.register_forward_hook(self._end))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        torch.cuda.set_sync_debug_mode("default")  # an error leaves a layer before its end
        for handle in self._handles:
            handle.remove()

    def _begin(self, *_: Any) -> None:
        self.calls += 1
        torch.cuda.set_sync_debug_mode("error")

    def _end(self, *_: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")

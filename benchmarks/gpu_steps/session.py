"""What the steps of one run share: the device, the journal, the clock, and one model at a time."""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from typing import Any

import torch

from gpu_steps.clock import Clock
from gpu_steps.journal import Journal, words
from gpu_steps.marks import best_rates
from gpu_steps.scale import DTYPE, Scale
from gpu_steps.tables import FAILED
from yopo.bench.floor import Rates
from yopo.bench.random_model import random_model
from yopo.counting.presets import Shape

RATES = "best product and copy"


@dataclass
class Session:
    device: torch.device
    scale: Scale
    journal: Journal
    clock: Clock
    _held: dict[str, Any] = field(default_factory=dict)
    _rates: list[Rates | None] = field(default_factory=list)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def model(self, name: str) -> tuple[Any, Shape]:
        """The model of that name with random weights, as stock; one built before goes first."""
        shape = self.scale.models[name]
        if name not in self._held:
            self.free()
            self._held[name] = random_model(shape, DTYPE, self.device)
        return self._held[name], shape

    def free(self) -> None:
        self._held.clear()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()

    def rates(self) -> Rates | None:
        """The best FLOP/s and bytes/s of this device, measured once; None where that failed."""
        if not self._rates:
            try:
                rates = best_rates(self.scale.side, self.scale.copied, DTYPE, self.device)
            except Exception as error:
                self._rates.append(None)
                self.journal.add("rates", RATES, FAILED, error=words(error))
            else:
                self._rates.append(rates)
                self.journal.add("rates", RATES, product_flops_s=rates[0], copy_bytes_s=rates[1])
        return self._rates[0]

"""Statistics that no model gave."""

from __future__ import annotations

import torch
from layouts import SHAPE, build

from yopo.calibration.sample_statistics import Statistics, fingerprint


def made_up(samples: int = 3, layers: int = 3, heads: int = 4, neurons: int = 24) -> Statistics:
    generator = torch.Generator().manual_seed(samples)

    def random(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator)

    return Statistics(
        model=fingerprint(build(SHAPE)),
        samples=tuple(f"{i:016x}" for i in range(samples)),
        ratios=random(samples, layers, heads),
        visual_mass=random(samples, layers, heads),
        sink_sums=random(samples, 2, layers, heads),
        text_tokens=torch.arange(samples),
        visual_tokens=torch.arange(samples) + 9,
        influence=random(samples, layers),
        ffn_use=random(layers, neurons).double(),
    )

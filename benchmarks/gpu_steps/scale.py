"""How large a run is: as on a GPU, or small enough for a rehearsal on two CPU cores."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from yopo.counting.presets import PRESETS, Shape

DTYPE = torch.bfloat16  # of all that is timed


@dataclass(frozen=True)
class Scale:
    """models: by name; raced: those of the second step; None: all. text_tokens: of a prompt.
    layouts: random ones, for each precision. rounds: of prefills. steps: of decoding. side: of the
    square product whose rate is measured. copied: bytes. compiler: of torch.compile. arms: names;
    None: all.
    """

    models: dict[str, Shape]
    batches: tuple[int, ...]
    images: tuple[int, ...]
    text_tokens: int
    layouts: int
    rounds: int
    steps: int
    side: int
    copied: int
    compiler: str
    raced: tuple[str, ...] | None = None
    arms: tuple[str, ...] | None = None


FULL = Scale(
    models={
        "7b": PRESETS["llava-1.5-7b"],
        "13b": PRESETS["llava-1.5-13b"],
        "qwen2-vl-7b": replace(PRESETS["qwen2-vl-7b"], grid=(40, 50)),  # 2,000 visual tokens
    },
    batches=(1, 8, 32),
    images=(1, 4, 16),
    text_tokens=60,
    layouts=100,
    rounds=10,
    steps=64,
    side=8192,
    copied=1 << 30,
    compiler="inductor",
)

_TINY = Shape(64, 96, 2, 4, 4, 128, (4, 4))
SMALL = Scale(
    models={
        "7b": _TINY,
        "13b": replace(_TINY, hidden_size=80, intermediate_size=120),
        "qwen2-vl-7b": replace(_TINY, num_key_value_heads=2, grid=(4, 5)),
    },
    batches=(1, 2),
    images=(1, 2),
    text_tokens=12,
    layouts=10,
    rounds=2,
    steps=2,
    side=256,
    copied=1 << 20,
    compiler="eager",  # traces as ever, and compiles nothing: that takes minutes on a CPU
)

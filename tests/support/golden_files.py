"""The golden files in tests/golden: outputs of the released code, recorded. Reads and compares."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from yopo.plan.pruning_plan import PruningPlan

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("p*.json"))
TOLERANCE = 1e-4


def read(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    record = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return record, load_file(GOLDEN / f"{name}.safetensors")


def one_image(batch: int, n: int, start: int, grid: tuple[int, int]) -> SimpleNamespace:
    """Layout of the same image at columns start … in every row."""
    cells = torch.arange(grid[0] * grid[1])
    image, row, col = (torch.full((batch, n), -1) for _ in range(3))
    here = slice(start, start + len(cells))
    image[:, here], row[:, here], col[:, here] = 0, cells // grid[1], cells % grid[1]
    return SimpleNamespace(visual=image >= 0, image=image, row=row, col=col)


def plan_of(record: dict[str, Any], tensors: dict[str, Tensor]) -> PruningPlan:
    released = record["plan"]
    return PruningPlan(
        tensors["head_keep"],
        window=released["attncut_w"],
        layer_cut=released["layercut_num"],
        ffn_ratio=released["mlpcut_ratio"],
    )


def close(ours: Tensor, golden: Tensor) -> None:
    assert ours.shape == golden.shape
    worst = (ours - golden).abs().max().item()
    assert worst <= TOLERANCE, f"differs by {worst:.3g}"

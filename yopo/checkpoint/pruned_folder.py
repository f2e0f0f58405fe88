"""A checkpoint folder with a plan: the files of another one, its config.json with the plan in it,
and its FFN neurons in another order where they were put so. Files only; no model is built.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from yopo.checkpoint.neuron_order import FILE, permute_tensors, save_order
from yopo.checkpoint.shards import Shard, read_json, weight_files
from yopo.errors import BadInput
from yopo.files import write_json, write_whole
from yopo.plan import sinks
from yopo.plan.pruning_plan import PruningPlan

# What a calibration puts beside the checkpoint that it makes; another one's is not copied.
RESULTS = (
    "statistics.safetensors",
    "headmask_*.npy",
    "search.jsonl",
    "search.csv",
    "pareto.png",
)


def write(source: Path, target: Path, plan: PruningPlan, order: Tensor | None) -> None:
    """Fills the folder `target` from the checkpoint `source`, none of whose files it shares.
    order: (L, I) of the FFN neurons, None: as they are.

    Raises BadInput where the weights are not all there under their usual names.
    """
    target.mkdir(parents=True, exist_ok=True)
    weights = weight_files(source)
    for file in source.iterdir():
        if not file.is_file() or file.name == "config.json" or _left_out(file, weights, order):
            continue
        if file not in weights or order is None:
            with write_whole(target / file.name) as partial:
                shutil.copy2(file, partial)
    if order is not None:
        changed = sum(_rewrite(file, target / file.name, order) for file in weights)
        if changed not in (n * len(order) for n in (2, 3, 5)):  # fused; not; not, with biases
            raise BadInput(
                f"{source} has {changed} FFN tensors of {order.shape[1]} neurons under the names "
                f"layers.N.mlp.gate_proj, up_proj, down_proj, not 3 for each of {len(order)} "
                "layers. Keep their order: --first-neurons"
            )
        save_order(target / FILE, order)
    put_plan(target, plan, read_json(source / "config.json"))


def put_plan(folder: Path, plan: PruningPlan, config: dict[str, Any] | None = None) -> None:
    """Writes `plan` into the config.json of `folder`, or into `config` as that, and beside it the
    file of its sinks: both or none. Raises ValueError for a plan that does not fit."""
    config = read_json(folder / "config.json") if config is None else config
    plan.save_to(config)
    file = folder / sinks.FILE
    before = file.read_bytes() if file.is_file() else None
    try:
        if plan.sinks is not None:
            plan.sinks.save(folder)
        write_json(folder / "config.json", config)
    except BaseException:
        if before is None:
            file.unlink(missing_ok=True)
        else:
            file.write_bytes(before)
        raise


def _left_out(file: Path, weights: list[Path], order: Tensor | None) -> bool:
    """What would be wrong in the new folder: results of an earlier calibration, sinks of another
    plan, and weights that are not rewritten when others are (.bin beside safetensors), with their
    index."""
    if any(file.match(pattern) for pattern in (*RESULTS, sinks.FILE)):
        return True
    if order is None or file in weights:
        return False
    if file.name.endswith(".index.json"):
        return file.name.split(".")[1] != weights[0].suffix[1:]
    return file.match("*.bin") or (file.match("*.safetensors") and file.name != FILE)


def _rewrite(source: Path, target: Path, order: Tensor) -> int:
    """Writes a weight file with the neurons in that order; how many tensors changed."""
    with Shard(source) as shard:
        tensors = {name: shard.tensor(name) for name in shard.entries()}
        tensors, changed = permute_tensors(tensors, order)
        with write_whole(target) as partial:
            if source.suffix == ".safetensors":
                with safe_open(source, framework="pt") as file:
                    save_file(tensors, partial, metadata=file.metadata())
            else:
                torch.save(tensors, partial)
            shutil.copymode(source, partial)
    return changed

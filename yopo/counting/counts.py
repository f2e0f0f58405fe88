"""All counts of one setting put together, dense beside pruned, as plain JSON-able numbers.

Only puts together: FLOPs are flops.py's, bytes footprint.py's; tables and words are made of this by
the commands.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from yopo.counting.flops import LayerFlops, count, lm_head_flops, paper_tflops
from yopo.counting.footprint import KVBytes, kv_bytes, weight_bytes
from yopo.counting.pairs import executed, executed_step, stock, stock_step, useful, useful_step
from yopo.counting.setting import Setting
from yopo.plan.pruning_plan import PruningPlan

PAPER = (
    "visual tokens only, per layer 2(4nd² + 2n²d + 3ndm); under a plan the share of kept heads on "
    "both attention terms, of neurons in the FFN, nothing from the layer cut on; the window, the "
    "text and the mass modes are not counted"
)


@dataclass(frozen=True)
class _Arm:
    """What is counted of the dense model, or of the pruned one, layer by layer; FLOPs of a
    "prefill" and of the "decode" step after it."""

    plan: PruningPlan | None
    needed: dict[str, list[LayerFlops]]
    executed: dict[str, list[LayerFlops]]
    kv: list[KVBytes]

    @classmethod
    def of(cls, setting: Setting, plan: PruningPlan | None) -> _Arm:
        shape, prompt = setting.shape, setting.prompt
        layout = prompt.layout(setting.batch)
        valid = torch.ones(layout.shape, dtype=torch.bool)
        needed = {"prefill": useful(layout, valid, plan), "decode": useful_step(layout, valid)}
        if plan is None:
            done = {"prefill": stock(layout), "decode": stock_step(layout)}
        else:
            done = {
                "prefill": executed(layout, valid, plan),
                "decode": executed_step(layout, valid),
            }
        return cls(
            plan,
            {name: count(shape, plan, work) for name, work in needed.items()},
            {name: count(shape, plan, work) for name, work in done.items()},
            kv_bytes(shape, plan, prompt.text, prompt.visual, setting.batch, setting.itemsize),
        )


def counts(setting: Setting) -> dict[str, Any]:
    """FLOPs are whole numbers over the batch, bytes too; "pruned" is None without a plan."""
    shape, plan, prompt = setting.shape, setting.plan, setting.prompt
    dense = _Arm.of(setting, None)
    pruned = None if plan is None else _Arm.of(setting, plan)

    def both(of: Callable[..., Any], *more: Any) -> dict[str, Any]:
        return {"dense": of(dense, *more), "pruned": None if pruned is None else of(pruned, *more)}

    head = lm_head_flops(shape, setting.batch)  # of the last position of each row
    result = _described_setting(setting)
    for name in ("prefill", "decode"):
        result[name] = both(lambda arm, name: _total(arm.needed[name], head), name)
        result[name]["executed"] = both(
            lambda arm, name: _total(arm.executed[name], head)["total"], name
        )
    result["kv_bytes"] = both(lambda arm: _kv_total(arm.kv))
    result["weight_bytes"] = both(
        lambda arm: asdict(weight_bytes(shape, arm.plan, setting.itemsize))
    )
    result["paper_convention"] = {
        "dense_tflops": paper_tflops(shape, prompt.visual),
        "pruned_tflops": None if plan is None else paper_tflops(shape, prompt.visual, plan),
        "counts": PAPER,
        "notes": [] if plan is None else _paper_notes(setting, plan),
    }
    result["per_layer"] = [
        {
            "layer": layer,
            "kept_heads": None if plan is None else _reading(plan, layer),
            **both(_layer, layer),
        }
        for layer in range(shape.num_hidden_layers)
    ]
    return result


def _described_setting(setting: Setting) -> dict[str, Any]:
    prompt, plan = setting.prompt, setting.plan
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "vocab_size")  # fmt: skip
    sizes = {name: getattr(setting.shape, name) for name in names}
    return {
        "model": {"name": setting.name, **sizes},
        "plan": None if plan is None else _described_plan(setting, plan),
        "prompt": {
            "batch": setting.batch,
            "text_tokens": prompt.text,
            "visual_tokens": prompt.visual,
            "grids": [list(grid) for grid in prompt.grids],
        },
        "dtype": setting.dtype,
    }


def _total(layers: list[LayerFlops], head: int) -> dict[str, int]:
    parts = {name: sum(getattr(layer, name) for layer in layers) for name in vars(layers[0])}
    return {
        **parts,
        "lm_head": head,
        "visual": sum(layer.visual for layer in layers),
        "total": sum(parts.values()) + head,
    }


def _kv_total(layers: list[KVBytes]) -> dict[str, int]:
    parts = {name: sum(getattr(layer, name) for layer in layers) for name in vars(layers[0])}
    return {**parts, "filled": parts["text"] + parts["visual"]}


def _layer(arm: _Arm, layer: int) -> dict[str, Any]:
    flops = {name: asdict(layers[layer]) for name, layers in arm.needed.items()}
    return {**flops, "kv_bytes": asdict(arm.kv[layer])}


def _reading(plan: PruningPlan, layer: int) -> int:
    """Heads that read visual values in a layer."""
    return int(plan.head_keep[layer].sum()) if layer < plan.layer_cut else 0


def _described_plan(setting: Setting, plan: PruningPlan) -> dict[str, Any]:
    below = plan.head_keep[: plan.layer_cut]
    neurons = plan.ffn_neurons(setting.shape.intermediate_size)
    return {
        "name": setting.plan_name or "the checkpoint's own",
        "summary": plan.summary(),
        "kept_heads": int(below.sum()),
        "heads_below_cut": below.numel(),
        "layer_cut": plan.layer_cut,
        "window": plan.window,
        "ffn_neurons": neurons[0] if len(set(neurons)) == 1 else neurons,
        "visual_attention": plan.visual_attention,
        "head_mass": plan.head_mass,
        "cut_mass": plan.cut_mass,
    }


def _paper_notes(setting: Setting, plan: PruningPlan) -> list[str]:
    notes = []
    per_layer = plan.head_keep[: plan.layer_cut].sum(1)
    if len(per_layer) and per_layer.min() < per_layer.max():
        notes.append(_ragged_note(setting.plan_name, plan, per_layer.tolist()))
    if "exact" in (plan.head_mass, plan.cut_mass):
        notes.append(
            f"the paper's count is that of drop; this plan's mass {plan.head_mass}/{plan.cut_mass} "
            "computes more than it says"
        )
    return notes


def _ragged_note(name: str | None, plan: PruningPlan, per_layer: list[int]) -> str:
    """Why a mask with other numbers of heads in other layers counts what it does."""
    heads, kept, total = plan.num_heads, sum(per_layer), len(per_layer) * plan.num_heads
    share = kept / total
    half = "a little more than half of the heads below the cut, " if 0.5 < share < 0.65 else ""
    whole = [layer for layer, n in enumerate(per_layer) if n == heads]
    rest = sorted({n for n in per_layer if n < heads})
    why = f"{' to '.join(map(str, (rest if len(rest) < 2 else (rest[0], rest[-1]))))} of {heads}"
    if whole:
        layers = "layer" if len(whole) == 1 else "layers"
        why = f"all in {layers} {_listed(whole)}, {why} in the others"
    if re.fullmatch(r"\d+b_\d+", name or ""):
        why += ". A published mask keeps what its rule found: every head of layers 0 and 1, then "
        why += "those that pass its vote"
    return (
        f"the plan keeps {half}{kept} of {total} ({share:.1%}), because its mask is ragged: {why}"
    )


def _listed(numbers: list[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last

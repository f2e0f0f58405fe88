"""A plan in words, for people. Decides and checks nothing; `plan` is always a PruningPlan, whose
module imports this one."""

from __future__ import annotations

from typing import Any

import torch


def summary(plan: Any) -> str:
    """What `plan` prunes: what visual tokens compute, who reads them, the masses that matter."""
    below = plan.head_keep[: plan.layer_cut]
    passed = below if plan.cut_mass != "exact" else plan.head_keep  # by visual tokens
    cut = plan.layer_cut < plan.num_layers
    tokens = _tokens(plan)
    if not tokens and below.all() and not cut:
        return "Nothing is pruned."
    said = [f"Visual tokens {' and '.join(tokens)}."] if tokens else []
    said.append(_readers(plan))
    attending = torch.tensor(plan.visual_attends, device="cpu")[: len(passed)]
    if not passed[attending].all():
        gives = "give nothing" if plan.prune_visual_queries else "give what text says"
        said.append(f"To visual tokens pruned heads {gives}.")
    masses: dict[str, list[str]] = {}
    if not below.all():
        masses.setdefault(plan.head_mass, []).append("in pruned heads")
    if cut:
        masses.setdefault(plan.cut_mass, []).append(f"from layer {plan.layer_cut} on")
    if masses:
        where = (f"{mass} {' and '.join(places)}" for mass, places in masses.items())
        said.append(f"Mass on visual keys: {', '.join(where)}.")
    return " ".join(said)


def _tokens(plan: Any) -> list[str]:
    """What visual tokens do of what they do in the dense model, where it is less."""
    said = []
    earlier = "earlier " if plan.window_causal else ""
    for window, layers in _runs(plan.windows):
        if window is None:
            continue
        reach = (window - 1) // 2
        near = f"within {reach} {'row and column' if reach == 1 else 'rows and columns'}"
        whom = f"{earlier}neighbours {near}" if reach else "no other visual token"
        said.append(f"see {whom} (window {window}){_where(layers, plan)}")
    for attends, layers in _runs(plan.visual_attends):
        if not attends:
            said.append(f"do not attend{_where(layers, plan)}")
    order = "" if plan.ffn_order is None else " in their new order"
    if plan.ffn_ratio != 1:
        said.append(f"use the first {100 / plan.ffn_ratio:.3g} % of the FFN neurons{order}")
    for neurons, layers in _runs(plan.ffn if isinstance(plan.ffn, tuple) else (plan.ffn,)):
        if neurons is not None:
            what = f"use the first {neurons} FFN neurons{order}" if neurons else "pass no FFN"
            said.append(f"{what}{_where(layers, plan)}")
    return said


def _runs(values: tuple[Any, ...]) -> list[tuple[Any, list[int]]]:
    """Each value, and the layers that have it; one value for all layers has none named."""
    if len(set(values)) == 1:
        return [(values[0], [])]
    return [(one, [n for n, x in enumerate(values) if x == one]) for one in dict.fromkeys(values)]


def _where(layers: list[int], plan: Any) -> str:
    """The layers in words, those that follow each other as a span; nothing for all of them."""
    if not layers or len(layers) == plan.num_layers:
        return ""
    spans: list[list[int]] = []
    for layer in layers:
        if spans and spans[-1][-1] == layer - 1:
            spans[-1] = [spans[-1][0], layer]
        else:
            spans.append([layer])
    words = ", ".join("–".join(map(str, span)) for span in spans)
    return f" in layer{'s' if len(layers) > 1 else ''} {words}"


def _readers(plan: Any) -> str:
    """How many heads read visual tokens, and in which layers."""
    cut, heads = plan.layer_cut, plan.num_heads
    kept, total = int(plan.head_keep[:cut].sum()), cut * heads
    if kept == 0:
        return "No head reads visual tokens."
    number = f"All {heads}" if kept == total else f"{kept} of {total}"
    layers = "layer 0" if cut == 1 else f"layers 0–{cut - 1}"
    none = f", none from layer {cut} of {plan.num_layers} on" if cut < plan.num_layers else ""
    return f"{number} heads of {layers} read visual tokens{none}."

"""Plans by name, `yopo.recipes`: a safe one to begin with, those under which published models were
made or measured, and the paper's proportions to count and time. Each says where it is from.

What is found out about a model is calibration's, not here. There is no default for a family: which
plan a checkpoint needs depends on how it was trained, and is said in its config.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from yopo.plan import head_mask
from yopo.plan.config_fields import model_sizes
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks
from yopo.plan.value_checks import integer, share

__all__ = [
    "late_cut",
    "named_plan",
    "paper_12",
    "paper_25",
    "published_heads",
    "released_llava",
    "released_qwen2_vl",
    "shortv",
    "training_free",
    "v_skip",
    "vica",
    "vtw",
]


def late_cut(config: Any, *, layers: float = 0.75) -> PruningPlan:
    """A plan that keeps quality without data, masks or fine-tuning, for the model of `config`.

    Visual tokens pass the share `layers` of the layers (rounded up) as they do in the dense model,
    and are gone after them: neither computed nor cached. All heads are kept, whole FFNs, no window.

    Source: Visual Tokens Withdrawal (arXiv 2405.05803), which withdraws them halfway and finds the
    layer with data; the YOPO paper's layer cut alone (arXiv 2410.06169, Qwen2-VL and InternVL2).
    Of the questions that the models in examples/ have learnt, three quarters of the layers cost 0.1
    points at most, half of them 11 and 15.
    """
    cut = math.ceil(share("layers", layers) * _depth(config) - 1e-9)  # 0.7 of 10 layers are 7
    return vtw(config, layer=cut)


def vtw(config: Any, *, layer: int) -> PruningPlan:
    """Visual tokens are withdrawn at `layer`: dense below it, from it on neither computed nor
    cached (drop). Without fine-tuning; the paper finds the layer by the KL of answers on a few
    samples, 16 of 32 and 20 of 40 for LLaVA-1.5-7B and -13B.

    Source: Visual Tokens Withdrawal (arXiv 2405.05803). `late_cut` is the same by a share.
    """
    cut = integer("layer", layer, 0, _depth(config))
    return PruningPlan(_every_head(config), layer_cut=cut, head_mass="drop", cut_mass="drop")


def shortv(config: Any, *, layers: Collection[int]) -> PruningPlan:
    """Visual tokens are frozen in `layers`: they leave them as they came, without queries or FFN,
    but text reads them there as everywhere, so nothing leaves a softmax and no mass matters.
    Without fine-tuning; the paper takes some 60 % of the layers, those whose freezing changes the
    answers least.

    Source: ShortV (arXiv 2504.00502).
    """
    frozen = _chosen(config, layers)
    return PruningPlan(
        _every_head(config),
        ffn=[0 if layer in frozen else None for layer in range(_depth(config))],
        visual_attention=[layer not in frozen for layer in range(_depth(config))],
        head_mass="drop",
        cut_mass="drop",
    )


def v_skip(config: Any, *, layers: Collection[int]) -> PruningPlan:
    """Visual tokens skip the attention of `layers` and keep their FFN; text reads them there as
    everywhere, so nothing leaves a softmax and no mass matters. Without fine-tuning; the paper
    chooses the layers, deep ones, on a few samples of the task.

    Source: V-Skip (arXiv 2606.08511), as its abstract reads: of text it says nothing.
    """
    skipped = _chosen(config, layers)
    return PruningPlan(
        _every_head(config),
        visual_attention=[layer not in skipped for layer in range(_depth(config))],
        head_mass="drop",
        cut_mass="drop",
    )


def vica(config: Any, *, layers: Collection[int]) -> PruningPlan:
    """Visual tokens pass no attention and no FFN: they stay what the projector gave. Text reads
    them in `layers`, with all heads; in the others they are not there (drop). For models that are
    fine-tuned with it, as the paper does.

    Source: ViCA (arXiv 2602.07574), which puts the visual side's computation at 4 %.
    """
    read = _chosen(config, layers)
    keep = _every_head(config)
    keep[[layer not in read for layer in range(_depth(config))]] = False
    return PruningPlan(keep, ffn=0, visual_attention=False, head_mass="drop", cut_mass="drop")


def released_llava(head_keep: Any, *, window: int, layer_cut: int, ffn_ratio: float) -> PruningPlan:
    """What the released code computes of LLaVA-1.5, and its checkpoints were fine-tuned under: a
    window in both directions, no visual outputs in pruned heads, visual keys staying in the
    softmax everywhere.

    Source: github.com/ZhangAIPI/YOPO_MLLM_Pruning, its LLaVA and the checkpoints
    zwt123home123/llava-1.5-{7b,13b}-prune-zp{12,25}.
    """
    return PruningPlan(head_keep, window=window, layer_cut=layer_cut, ffn_ratio=ffn_ratio)


def released_qwen2_vl(head_keep: Any, *, layer_cut: int) -> PruningPlan:
    """What the released code computes of Qwen2-VL, which was never fine-tuned: neither window nor
    FFN slice; pruned heads read no visual values (their keys stay in the softmax), for visual
    queries as for text; from layer_cut on the visual tokens are gone.

    Source: github.com/ZhangAIPI/YOPO_MLLM_Pruning, its Qwen2-VL.
    """
    return PruningPlan(head_keep, layer_cut=layer_cut, cut_mass="drop", prune_visual_queries=False)


def training_free(
    head_keep: Any, *, layer_cut: int | None = None, window: int | None = None, **changes: Any
) -> PruningPlan:
    """For any model that was never fine-tuned with a plan: causal inside the image as it was
    trained, exact in pruned heads, dropped from layer_cut on. `changes`: fields of the plan.

    Source: yopo's own, released_qwen2_vl with a window that is causal.
    """
    values: dict[str, Any] = dict(cut_mass="drop", window_causal=True, prune_visual_queries=False)
    if layer_cut is not None:
        values["layer_cut"] = layer_cut
    return PruningPlan(head_keep, window=window, **(values | changes))


def paper_25(layers: int, heads: int) -> PruningPlan:
    """The proportions of the paper's 25 % of visual FLOPs: half the layers, half the heads in each
    of them, half the FFN, window 5. The heads are random ones: to count and time, not to use.

    Source: arXiv 2410.06169, its table of LLaVA-1.5, whose count these proportions give.
    """
    return _random_heads(layers, heads, 2)


def paper_12(layers: int, heads: int) -> PruningPlan:
    """Half the layers, a quarter of the heads in each of them, a quarter of the FFN, window 5; the
    heads random ones: to count and time, not to use.

    Source: yopo's own, for about the FLOPs of the paper's 12 % (arXiv 2410.06169), whose settings
    are in its checkpoints only.
    """
    return _random_heads(layers, heads, 4)


def published_heads(mask: str) -> PruningPlan:
    """A published head mask, `7b_16` or the like, in place of the random heads of `paper_25`.

    Source: github.com/ZhangAIPI/YOPO_MLLM_Pruning, LLaVA/headmask/headmask_<mask>.npy, of
    LLaVA-1.5-7B (7b_8, 7b_16, 7b_24) and -13B (13b_5, 13b_10, 13b_20, 13b_30); `head_mask.find`
    says where it is looked for. Raises ValueError for another name.
    """
    named = re.fullmatch(r"(7b|13b)_(\d+)", mask)
    if named is None:
        published = sorted(name[len("headmask_") : -len(".npy")] for name in head_mask.SHA256)
        raise ValueError(f"mask is {mask!r}; allowed: {', '.join(published)}")
    shape = next(shape for shape, size in head_mask.SIZES.items() if size == named[1])
    keep = head_mask.find(int(named[2]), *shape)
    return PruningPlan(keep, window=5, layer_cut=shape[0] // 2, ffn_ratio=2)


def named_plan(
    name: str,
    layers: int,
    heads: int,
    *,
    mass: str = "exact",
    whole: int | None = None,
    setting: str = "plan",
) -> PruningPlan:
    """The plan that goes by `name`, for a model of these sizes.

    "25", "12": paper_25, paper_12. "7b_16" and the like: published_heads. Else a file or folder
    that PruningPlan.load reads, which has its own masses. whole: layers of the model of which this
    one has the first; masks and files are for all of them, and their proportions are kept.

    Raises ValueError that calls the name's setting `setting`: for a name that is none of these, or
    a plan of another shape.
    """
    paper = {"25": paper_25, "12": paper_12}
    if name in paper:
        return paper[name](layers, heads).with_mass(mass)
    if re.fullmatch(r"(7b|13b)_\d+", name):
        plan = published_heads(name).with_mass(mass)
    elif name and Path(name).exists():
        plan = PruningPlan.load(name)
    else:
        raise ValueError(
            f"{setting} is {name!r}; allowed: 25, 12, a published head mask such as 7b_16, or a "
            "JSON file or checkpoint folder with a plan"
        )
    if whole is not None and layers < whole == plan.num_layers:
        plan = first_layers(plan, layers)
    if (plan.num_layers, plan.num_heads) != (layers, heads):
        raise ValueError(
            f"{setting} is {name!r}: its head_keep has shape {tuple(plan.head_keep.shape)}, the "
            f"model has (layers, heads) = ({layers}, {heads}); give a plan made for this model"
        )
    return plan


def first_layers(plan: PruningPlan, layers: int) -> PruningPlan:
    """`plan` in the same proportions for a model with the first `layers` of its layers: of what it
    says per layer the rows before the cut evenly spaced, and so those from it on."""
    whole, cut = plan.num_layers, plan.layer_cut
    less = cut * layers // whole
    before = torch.arange(less) * cut // max(less, 1)
    after = cut + torch.arange(layers - less) * (whole - cut) // max(layers - less, 1)
    rows = torch.cat([before, after])
    sinks = plan.sinks
    if sinks is not None:
        sinks = Sinks(sinks.a[rows], None if sinks.b is None else sinks.b[rows], sinks.tokens)
    return replace(
        plan,
        head_keep=plan.head_keep[rows],
        layer_cut=less,
        sinks=sinks,
        window=[plan.windows[row] for row in rows],
        visual_attention=[plan.visual_attends[row] for row in rows],
        ffn=[plan.ffn[row] for row in rows] if isinstance(plan.ffn, tuple) else plan.ffn,
    )


def _depth(config: Any) -> int:
    return model_sizes(config)[0]


def _every_head(config: Any) -> torch.Tensor:
    layers, heads, _ = model_sizes(config)
    return torch.ones(layers, heads, dtype=torch.bool, device="cpu")


def _chosen(config: Any, layers: Collection[int]) -> set[int]:
    """The layers named, each of them one that the model has."""
    last = _depth(config) - 1
    if not isinstance(layers, Collection):
        raise ValueError(f"layers is {layers!r}; allowed: a collection of them, such as [0, 1]")
    return {integer(f"layers[{at}]", layer, 0, last) for at, layer in enumerate(layers)}


def _random_heads(layers: int, heads: int, part: int) -> PruningPlan:
    """One of `part` heads in each layer of the first half, and of the FFN neurons."""
    generator = torch.Generator().manual_seed(0)
    keep = torch.zeros(layers, heads, dtype=torch.bool)
    for layer in range(layers // 2):
        keep[layer, torch.randperm(heads, generator=generator)[: heads // part]] = True
    return PruningPlan(keep, window=5, layer_cut=layers // 2, ffn_ratio=part)

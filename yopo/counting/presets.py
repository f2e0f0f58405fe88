"""Shapes of published models and named plans, for benchmarks and counting. Numbers only: building a
model or a pass is done elsewhere. Sources: the models' config.json on the Hub.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from yopo.files import read_json
from yopo.plan import head_mask
from yopo.plan.pruning_plan import PruningPlan, split_masses


@dataclass(frozen=True)
class Shape:
    """A language model: transformers' config names, and one image's visual grid.

    head_size: width of a head where it is not hidden_size / heads. qkv_bias, o_bias, mlp_bias:
    which projections have one. tied: the logits use the embedding's weights.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    grid: tuple[int, int]
    head_size: int | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden_size // self.num_attention_heads

    @property
    def layer_weights(self) -> int:
        """Parameters of the matrices of one layer."""
        heads = 2 * (self.num_attention_heads + self.num_key_value_heads) * self.head_dim
        return self.hidden_size * (heads + 3 * self.intermediate_size)

    @property
    def layer_parameters(self) -> int:
        """All parameters of one layer: matrices, biases, two norms."""
        qkv = (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim
        biases = self.qkv_bias * qkv + self.o_bias * self.hidden_size
        biases += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        return self.layer_weights + biases + 2 * self.hidden_size


# Qwen-VL and InternVL choose the grid by the image; these are what 448 × 448 pixels give.
# LLaVA-NeXT (llava-v1.6-vicuna) is the language model of LLaVA-1.5 with further grids.
_QWEN_7B = Shape(3584, 18944, 28, 28, 4, 152064, (16, 16), qkv_bias=True)
PRESETS = {
    "llava-1.5-7b": Shape(4096, 11008, 32, 32, 32, 32000, (24, 24)),
    "llava-1.5-13b": Shape(5120, 13824, 40, 40, 40, 32000, (24, 24)),
    "qwen2-vl-7b": _QWEN_7B,
    "qwen2.5-vl-7b": _QWEN_7B,
    "internvl2-4b": Shape(3072, 8192, 32, 32, 32, 32020, (16, 16)),
    "internvl2-8b": Shape(4096, 14336, 32, 32, 8, 92553, (16, 16)),
    "internvl2-26b": Shape(6144, 16384, 48, 48, 8, 92553, (16, 16)),
}


def named_plan(
    name: str,
    shape: Shape,
    head_mass: str = "exact",
    cut_mass: str | None = None,
    whole: int | None = None,
) -> PruningPlan:
    """The plan `name` for a model of `shape`.

    "25": half the layers, half the heads in each layer before the cut (random ones), half the FFN,
    window 5. "12": half, a quarter, a quarter, window 5. "7b_16" and the like: a published head
    mask in place of the random heads of "25". Else a JSON file: a config.json with a plan, or its
    `yopo` block. whole: layers of the model of which `shape` has the first; masks and files are for
    all of them, and their proportions are kept.

    Raises ValueError for a name that is none of these or a plan that does not fit `shape`.
    """
    layers, heads = shape.num_hidden_layers, shape.num_attention_heads
    masses = {"head_mass": head_mass, "cut_mass": cut_mass or head_mass}
    cut = layers // 2
    if name in ("25", "12"):
        ratio = 2 if name == "25" else 4
        generator = torch.Generator().manual_seed(0)
        keep = torch.zeros(layers, heads, dtype=torch.bool)
        for layer in range(cut):
            keep[layer, torch.randperm(heads, generator=generator)[: heads // ratio]] = True
        return PruningPlan(keep, window=5, layer_cut=cut, ffn_ratio=ratio, **masses)
    if Path(name).is_file():
        content = read_json(Path(name))
        if (
            "num_hidden_layers" not in content
        ):  # a block: as of a model of its own depth; compared with the one at hand below
            depth = {"num_hidden_layers": content.get("layers")}
            content = _config(shape, content) | depth
        plan = PruningPlan.from_config(content)
        if plan is None:
            raise ValueError(f"--plan: {name} holds no plan (a `yopo` block or released fields)")
        return _fitted(plan, shape, whole)
    size, _, num = name.partition("_")
    full = {"7b": (32, 32), "13b": (40, 40)}.get(size)
    if full is None or not num.isdigit():
        raise ValueError(
            f"--plan is {name!r}; allowed: 25, 12, a published head mask such as 7b_16, or a JSON "
            "file with a plan"
        )
    keep = head_mask.find(int(num), *full)
    plan = PruningPlan(keep, window=5, layer_cut=full[0] // 2, ffn_ratio=2, **masses)
    return _fitted(plan, shape, whole)


def _fitted(plan: PruningPlan, shape: Shape, whole: int | None) -> PruningPlan:
    """`plan` for the first layers of the model with `whole` layers that it is for: of the masks the
    rows before the cut evenly spaced, and so those from it on. Raises ValueError: it fits not."""
    layers, cut = shape.num_hidden_layers, plan.layer_cut
    if whole is not None and layers < whole == plan.num_layers:
        less = cut * layers // whole
        before = torch.arange(less) * cut // max(less, 1)
        after = cut + torch.arange(layers - less) * (whole - cut) // max(layers - less, 1)
        rows = torch.cat([before, after])
        mass = None if plan.text_mass is None else plan.text_mass[rows]
        plan = replace(plan, head_keep=plan.head_keep[rows], layer_cut=less, text_mass=mass)
    plan.validate(_config(shape, None))
    return plan


def with_masses(plan: PruningPlan, setting: str) -> PruningPlan:
    """`plan` with the masses HEAD[/CUT], to be counted or timed: constants of `calibrated` that it
    lacks are 1, which costs the same as any others. Raises ValueError for other words."""
    head, cut = split_masses(setting, "--mass")
    constants = None
    if "calibrated" in (head, cut):
        constants = torch.ones(plan.head_keep.shape) if plan.text_mass is None else plan.text_mass
    return replace(plan, head_mass=head, cut_mass=cut, text_mass=constants)


def _config(shape: Shape, block: object) -> dict[str, object]:
    sizes = ("num_hidden_layers", "num_attention_heads", "intermediate_size")
    config: dict[str, object] = {size: getattr(shape, size) for size in sizes}
    return config if block is None else config | {"yopo": block}

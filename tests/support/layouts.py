"""Random batches, plans and tiny models for the engine tests, as hypothesis strategies.

The places of visual tokens are worked out here by plain counting, not by engine/layout.py, which
is judged too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

HEAD_DIM = 8
VOCAB = 31
MASSES = ("exact", "drop", "sink")


@dataclass(frozen=True)
class Shape:
    """What a tiny model looks like."""

    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    intermediate: int = 24
    attention_bias: bool = False
    theta: float = 10000.0

    def config(self) -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=self.heads * HEAD_DIM,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            attention_bias=self.attention_bias,
            rope_theta=self.theta,
            max_position_embeddings=512,
            bos_token_id=1,  # 4.36 must have one to generate from embeddings
            eos_token_id=None,
            pad_token_id=0,
        )


@lru_cache(maxsize=64)
def weights(shape: Shape, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under which attention is neither flat nor one-hot and every part matters."""
    from transformers import LlamaForCausalLM

    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, value in LlamaForCausalLM(shape.config()).state_dict().items():
        if not value.is_floating_point() or "inv_freq" in name:
            continue
        noise = torch.randn(value.shape, generator=generator)
        if "norm" in name:
            state[name] = 1 + 0.3 * noise
        elif name.endswith("bias"):
            state[name] = 0.3 * noise
        elif "embed_tokens" in name:
            state[name] = noise
        else:
            sharp = 1.2 if "q_proj" in name or "k_proj" in name else 1.0
            state[name] = sharp * noise / value.shape[1] ** 0.5
    return state


def build(shape: Shape, plan: PruningPlan | None = None, cls: type | None = None) -> Any:
    """A fresh model in eval mode with the weights of `shape`; the plan travels in its config."""
    if cls is None:
        from yopo.modeling_llama_prune import LlamaForCausalLM as cls
    config = shape.config()
    if plan is not None:
        plan.save_to(config)
    model = cls(config)
    loaded = model.load_state_dict(weights(shape), strict=False)
    assert not loaded.unexpected_keys
    assert all("inv_freq" in name for name in loaded.missing_keys)
    return model.eval()


@dataclass
class Case:
    """One batch: where text, images and padding are, and random embeddings for all of it."""

    inputs_embeds: Tensor  # (B, n, d)
    attention_mask: Tensor | None  # (B, n) int64
    position_ids: Tensor | None
    visual: Tensor  # (B, n) bool
    image: Tensor
    row: Tensor
    col: Tensor
    grids: list[list[tuple[int, int]]] | None  # what forward is told; None: square runs
    all_grids: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int]:
        return self.visual.shape[0], self.visual.shape[1]

    @property
    def valid(self) -> Tensor:
        mask = self.attention_mask
        return torch.ones(self.shape, dtype=torch.bool) if mask is None else mask.bool()

    @property
    def layout(self) -> SimpleNamespace:
        return SimpleNamespace(visual=self.visual, image=self.image, row=self.row, col=self.col)

    def kwargs(self) -> dict[str, Any]:
        """The arguments of forward."""
        return dict(
            inputs_embeds=self.inputs_embeds,
            attention_mask=self.attention_mask,
            position_ids=self.position_ids,
            visual_mask=self.visual,
            visual_grids=self.grids,
        )

    def alone(self, b: int) -> Case:
        """Row b as a batch of one, its padding taken off."""
        valid = self.valid[b]
        cut = {k: getattr(self, k)[b : b + 1, valid] for k in ("visual", "image", "row", "col")}
        positions = None if self.position_ids is None else self.position_ids[b : b + 1, valid]
        return Case(
            inputs_embeds=self.inputs_embeds[b : b + 1, valid],
            attention_mask=None,
            position_ids=positions,
            grids=[self.all_grids[b]],
            all_grids=[self.all_grids[b]],
            **cut,
        )

    def repeated(self, k: int) -> SimpleNamespace:
        """Embeddings, mask and layout with each row k times, as generate() expands them."""
        mask = self.attention_mask
        names = ("visual", "image", "row", "col")
        return SimpleNamespace(
            inputs_embeds=self.inputs_embeds.repeat_interleave(k, 0),
            attention_mask=None if mask is None else mask.repeat_interleave(k, 0),
            layout=SimpleNamespace(**{m: getattr(self, m).repeat_interleave(k, 0) for m in names}),
        )


# A row is a list of segments: ("text", length) or ("image", rows, cols, newline).
Segment = tuple[Any, ...]


def make_case(
    rows: list[list[Segment]],
    hidden: int,
    *,
    truncate: list[int] | None = None,
    pads: list[tuple[int, int]] | None = None,
    holes: bool = False,
    positions: bool = False,
    grids: bool = True,
    masked: bool = True,
    seed: int = 0,
) -> Case:
    """Lays rows out.

    truncate: per row how many cells the last image lacks. pads: per row the weights (left, right)
    that share out the padding which brings it to the common width. holes: the first text token of
    a row of 3 or more is masked, too. positions: give position_ids (cumsum of the mask). grids:
    tell forward the grids. masked: give the attention mask although nothing is padded.
    """
    filled, all_grids = [], []
    for b, segments in enumerate(rows):
        cells: list[tuple[int, int, int]] = []  # (image, row, col), -1 for text
        row_grids: list[tuple[int, int]] = []
        last = max((i for i, s in enumerate(segments) if s[0] == "image"), default=None)
        for index, segment in enumerate(segments):
            if segment[0] == "text":
                cells += [(-1, -1, -1)] * segment[1]
                continue
            _, height, width, newline = segment
            keep = height * width
            if truncate and index == last:
                keep = max(1, keep - truncate[b])
            for cell in range(keep):
                cells.append((len(row_grids), cell // width, cell % width))
                if newline and cell % width == width - 1:
                    cells.append((-1, -1, -1))
            row_grids.append((height, width))
        filled.append(cells)
        all_grids.append(row_grids)
    width = max(map(len, filled))
    if pads is not None:
        width += sum(any(p) for p in pads) > 0  # even the longest row is padded
    image, row, col = (torch.full((len(rows), width), -1) for _ in range(3))
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for b, cells in enumerate(filled):
        spare = width - len(cells)
        left, right = pads[b] if pads else (0, 1)
        start = spare * left // (left + right) if left + right else 0
        stop = start + len(cells)
        mask[b, start:stop] = 1
        place = torch.tensor(cells, dtype=torch.long)
        image[b, start:stop], row[b, start:stop], col[b, start:stop] = place.unbind(1)
        if holes and len(cells) >= 3:
            text = [i for i, cell in enumerate(cells) if cell[0] < 0]
            mask[b, [start + i for i in text[:1] if len(text) > 1]] = 0
    generator = torch.Generator().manual_seed(seed)
    needs_mask = not bool(mask.all())
    return Case(
        inputs_embeds=torch.randn(len(rows), width, hidden, generator=generator),
        attention_mask=mask if needs_mask or masked else None,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0) if positions else None,
        visual=image >= 0,
        image=image,
        row=row,
        col=col,
        grids=all_grids if grids else None,
        all_grids=all_grids,
    )


def square_runs(rows: list[list[Segment]]) -> bool:
    """Whether each run of visual tokens is one whole square image: no grids need be told."""
    for segments in rows:
        images = [s[0] == "image" for s in segments]
        if any(a and b for a, b in pairwise(images)):
            return False
        if any(s[0] == "image" and (s[1] != s[2] or s[3]) for s in segments):
            return False
    return True


def shapes(max_layers: int = 4) -> st.SearchStrategy[Shape]:
    heads = st.integers(2, 6).flatmap(
        lambda h: st.tuples(st.just(h), st.sampled_from([k for k in range(1, h + 1) if h % k == 0]))
    )
    return st.builds(
        lambda layers, h, bias, theta: Shape(layers, h[0], h[1], 24, bias, theta),
        st.integers(1, max_layers),
        heads,
        st.booleans(),
        st.sampled_from([10000.0, 500.0]),
    )


def random_sinks(shape: Shape, seed: int, with_b: bool) -> Sinks:
    generator = torch.Generator().manual_seed(seed)
    a = 3 * torch.randn(shape.layers, shape.heads, generator=generator)
    b = 3 * torch.randn(*a.shape, HEAD_DIM, generator=generator)
    return Sinks(a, b if with_b else None, 1 + seed)


@st.composite
def plans(draw: st.DrawFn, shape: Shape, **fixed: Any) -> PruningPlan:
    layers, heads = shape.layers, shape.heads

    def one_or_each(one: st.SearchStrategy[Any]) -> Any:
        return draw(st.one_of(one, st.lists(one, min_size=layers, max_size=layers)))

    some = st.lists(st.booleans(), min_size=heads, max_size=heads)
    rows = st.one_of(st.just([True] * heads), st.just([False] * heads), some)
    values = dict(
        head_keep=draw(st.lists(rows, min_size=layers, max_size=layers)),
        window=one_or_each(st.sampled_from([None, 1, 2, 3, 4, 5, 8])),
        layer_cut=draw(st.one_of(st.none(), st.integers(0, layers))),
        ffn_ratio=draw(st.sampled_from([1, 1.5, 2, 2.7, 5, 24])),
        visual_attention=one_or_each(st.booleans()),
        head_mass=draw(st.sampled_from(MASSES)),
        cut_mass=draw(st.sampled_from(MASSES)),
        window_causal=draw(st.booleans()),
        prune_visual_queries=draw(st.booleans()),
    )
    if draw(st.booleans()):
        values |= {"ffn_ratio": 1, "ffn": one_or_each(st.sampled_from([None, 0, 1, 7, 24]))}
    values.update(fixed)
    if "sink" in (values["head_mass"], values["cut_mass"]):
        values["sinks"] = random_sinks(shape, draw(st.integers(0, 99)), draw(st.booleans()))
    values["head_keep"] = torch.tensor(values["head_keep"])
    return PruningPlan(**values)


def segments(max_images: int = 2) -> st.SearchStrategy[list[Segment]]:
    text = st.tuples(st.just("text"), st.integers(1, 4))
    image = st.tuples(st.just("image"), st.integers(1, 6), st.integers(1, 5), st.booleans())
    square = st.integers(1, 4).map(lambda side: ("image", side, side, False))
    row = st.lists(st.one_of(text, image, square), min_size=1, max_size=5)
    return row.filter(lambda r: sum(s[0] == "image" for s in r) <= max_images)


@st.composite
def cases(
    draw: st.DrawFn,
    hidden: int,
    *,
    batch: tuple[int, int] = (1, 3),
    holes: bool = True,
) -> Case:
    size = draw(st.integers(*batch))
    rows = draw(st.lists(segments(), min_size=size, max_size=size))
    truncate = draw(st.lists(st.sampled_from([0, 0, 1, 3, 7]), min_size=size, max_size=size))
    tell = bool(any(truncate)) or not square_runs(rows) or draw(st.booleans())
    share = st.sampled_from([(1, 0), (0, 1), (1, 1)])
    return make_case(
        rows,
        hidden,
        truncate=truncate,
        pads=draw(st.none() | st.lists(share, min_size=size, max_size=size)),
        holes=holes and draw(st.integers(0, 5)) == 5,
        positions=draw(st.booleans()),
        grids=tell,
        masked=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def float16_works() -> bool:
    """torch before 2.2 has no float16 products on the CPU, and LLaVA knows no other dtype."""
    try:
        torch.ones(2, 2, dtype=torch.float16) @ torch.ones(2, 2, dtype=torch.float16)
    except RuntimeError:
        return False
    return True


needs_float16 = pytest.mark.skipif(not float16_works(), reason="torch has no float16 on the CPU")

# What several test files start from.
SHAPE = Shape()
KEEP = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]])
ROWS = [
    [("text", 3), ("image", 2, 3, False), ("text", 2)],
    [("image", 3, 3, False), ("text", 1), ("image", 2, 2, False), ("text", 3)],
    [("text", 5)],
]
MASS = [("exact", "exact"), ("exact", "drop"), ("drop", "exact"), ("drop", "drop")]


def a_plan(head_mass: str = "exact", cut_mass: str = "exact", **changes: Any) -> PruningPlan:
    values = dict(window=3, layer_cut=2, ffn_ratio=2, head_mass=head_mass, cut_mass=cut_mass)
    return PruningPlan(KEEP, **(values | changes))


def left_padded(rows: list[Any] = ROWS, seed: int = 0) -> Case:
    return make_case(rows, SHAPE.heads * 8, pads=[(1, 0)] * len(rows), seed=seed)

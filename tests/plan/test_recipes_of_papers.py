"""ViCA, VTW, ShortV and V-Skip: each recipe against a short reading of its paper, run densely."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layouts import SHAPE, Shape, build, make_case
from oracle import inv_freq, rotate
from torch import Tensor

from yopo.plan import recipes
from yopo.plan.pruning_plan import PruningPlan

MODEL = Shape(layers=4, heads=4, kv_heads=2)
CASE = make_case([[("text", 3), ("image", 2, 3, False), ("text", 4)]], MODEL.heads * 8)

# What a paper has a layer do: (whether visual tokens attend, whether they pass the FFN, whether
# text sees them); visual tokens see each other as the causal mask lets them.
Reading = Callable[[int], tuple[bool, bool, bool]]


def read(model: Any, reading: Reading) -> Tensor:
    """Logits (n, V) of the text rows: a Llama in which each layer does what the paper says."""
    visual, h = CASE.visual[0], CASE.inputs_embeds[0]
    n = len(h)
    angles = (torch.arange(n)[:, None] * inv_freq(model.config))[None]
    for index, layer in enumerate(model.model.layers):
        attends, feeds, seen = reading(index)
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        if not seen:
            mask = mask & ~(~visual[:, None] & visual[None, :])
        x = layer.input_layernorm(h)
        attn = layer.self_attn
        projections = (attn.q_proj, attn.k_proj, attn.v_proj)
        q, k, v = (p(x).view(1, n, -1, 8).transpose(1, 2) for p in projections)
        q, k = rotate(q, angles), rotate(k, angles)
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = attn.o_proj(out.transpose(1, 2).reshape(n, -1))
        h = h + (out if attends else out.masked_fill(visual[:, None], 0))
        out = layer.mlp(layer.post_attention_layernorm(h))
        h = h + (out if feeds else out.masked_fill(visual[:, None], 0))
    return model.lm_head(model.model.norm(h))[~visual]


SIZES = MODEL.config()
PAPERS: dict[str, tuple[PruningPlan, Reading]] = {
    # "visual tokens bypass all self-attention and feed-forward layers, interacting with text solely
    # through sparse cross-attention at selected layers"
    "vica": (recipes.vica(SIZES, layers=[1, 2]), lambda at: (False, False, at in (1, 2))),
    "vica, a gap": (recipes.vica(SIZES, layers=(0, 3)), lambda at: (False, False, at in (0, 3))),
    "vica, nowhere": (recipes.vica(SIZES, layers=[]), lambda at: (False, False, False)),
    # withdrawn at a layer: from it on only text goes on
    "vtw": (recipes.vtw(SIZES, layer=2), lambda at: (at < 2, at < 2, at < 2)),
    "vtw, at once": (recipes.vtw(SIZES, layer=0), lambda at: (False, False, False)),
    # "visual tokens do not attend to other tokens, and only text tokens function as queries"; only
    # text passes the FFN
    "shortv": (recipes.shortv(SIZES, layers={1, 3}), lambda at: (at not in (1, 3),) * 2 + (True,)),
    "shortv, all": (recipes.shortv(SIZES, layers=range(4)), lambda at: (False, False, True)),
    # visual self-attention bypassed, "Feed-Forward Networks in these layers remain essential"
    "v_skip": (recipes.v_skip(SIZES, layers=[2, 3]), lambda at: (at < 2, True, True)),
    "v_skip, nowhere": (recipes.v_skip(SIZES, layers=[]), lambda at: (True, True, True)),
}


@pytest.mark.parametrize("name", PAPERS)
@torch.no_grad()
def test_a_recipe_computes_what_its_paper_says(name: str) -> None:
    plan, reading = PAPERS[name]
    truth = read(build(MODEL), reading)
    ours = build(MODEL, plan)(**CASE.kwargs()).logits[0, ~CASE.visual[0]]
    assert (ours - truth).abs().max() < 1e-4


def test_what_is_not_touched_is_not_computed_and_the_cut_is_found() -> None:
    vica = recipes.vica(SIZES, layers=[1, 2])
    assert (vica.layer_cut, vica.ffn, vica.visual_attention) == (3, 0, False)
    assert vica.head_keep.all(1).tolist() == [False, True, True, False]
    assert recipes.vica({"text_config": SIZES.to_dict()}, layers=[1, 2]) == vica
    assert recipes.late_cut(SIZES, layers=0.5) == recipes.vtw(SIZES, layer=2)
    for nothing in (recipes.shortv(SIZES, layers=[]), recipes.v_skip(SIZES, layers=[])):
        assert nothing.summary() == "Nothing is pruned."


@pytest.mark.parametrize("name", ["vica", "shortv", "v_skip"])
@pytest.mark.parametrize("layers", [[4], [0, -1], [1.0], [True], ["1"]])
def test_layers_that_the_model_does_not_have_are_refused(name: str, layers: list[Any]) -> None:
    place = len(layers) - 1
    with pytest.raises(ValueError, match=rf"layers\[{place}\] is {layers[-1]!r}.*from 0 to 3"):
        getattr(recipes, name)(SIZES, layers=layers)


@pytest.mark.parametrize("name", ["vica", "shortv", "v_skip"])
def test_one_layer_in_place_of_several_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="layers is 2; allowed: a collection"):
        getattr(recipes, name)(SIZES, layers=2)


@pytest.mark.parametrize("layer", [-1, SHAPE.layers + 2, 1.0, None])
def test_a_withdrawal_at_a_layer_that_is_not_there_is_refused(layer: Any) -> None:
    with pytest.raises(ValueError, match=f"layer is {layer!r}.*0 to 4"):
        recipes.vtw(SIZES, layer=layer)

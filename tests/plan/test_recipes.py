"""Recipes: what each plan says, where it is from, and the names that give it."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_plans import HEADS, KEEP, LAYERS, config

import yopo
from yopo.plan import recipes
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks


def test_recipes_are_a_public_name_that_costs_nothing_until_used():
    assert yopo.recipes is recipes and "recipes" in yopo.__all__
    code = "import sys, yopo; assert 'torch' not in sys.modules; from yopo import recipes as r"
    code += "; assert r is yopo.recipes is sys.modules['yopo.plan.recipes']"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", recipes.__all__)
def test_every_recipe_names_its_source(name):
    words = inspect.getdoc(getattr(recipes, name))
    assert re.search(r"Source: |PruningPlan\.load", words), "a name's source is the recipe's"


# --- late_cut ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("depth", "layers", "cut"),
    [
        (32, 0.75, 24),
        (6, 0.75, 5),
        (1, 0.75, 1),
        (10, 0.7, 7),
        (30, 0.1, 3),
        (6, 2 / 3, 4),
        (6, 1, 6),
    ],
)
def test_a_late_cut_prunes_the_upper_layers_and_nothing_else(depth, layers, cut):
    sizes = dict(num_hidden_layers=depth, num_attention_heads=3, intermediate_size=8)
    plan = recipes.late_cut(sizes, layers=layers)
    assert plan == PruningPlan(
        torch.ones(depth, 3), layer_cut=cut, head_mass="drop", cut_mass="drop"
    )
    assert recipes.late_cut({"text_config": sizes}, layers=layers) == plan


def test_a_late_cut_takes_three_quarters_unless_told():
    assert recipes.late_cut(config()).layer_cut == 3 == LAYERS * 3 // 4


@pytest.mark.parametrize("layers", [0, -0.5, 1.01, 24, True, "0.5", None, float("nan")])
def test_a_late_cut_at_what_is_no_share_is_refused(layers):
    with pytest.raises(ValueError, match="layers is .*a share, above 0, to 1"):
        recipes.late_cut(config(), layers=layers)


# --- plans of others ---------------------------------------------------------------------------


def test_what_is_released_and_what_is_training_free():
    llava = recipes.released_llava(KEEP, window=5, layer_cut=2, ffn_ratio=2)
    assert llava == PruningPlan(KEEP, window=5, layer_cut=2, ffn_ratio=2)
    qwen = recipes.released_qwen2_vl(KEEP, layer_cut=2)
    assert (qwen.head_mass, qwen.cut_mass, qwen.prune_visual_queries) == ("exact", "drop", False)
    free = recipes.training_free(KEEP, window=5, ffn_ratio=2, head_mass="drop")
    assert (free.layer_cut, free.window, free.window_causal) == (LAYERS, 5, True)
    assert (free.ffn_ratio, free.head_mass, free.cut_mass) == (2, "drop", "drop")
    assert recipes.training_free(KEEP, layer_cut=0).layer_cut == 0


@pytest.mark.parametrize("recipe", [recipes.paper_25, recipes.paper_12])
@pytest.mark.parametrize("layers", [32, 8, 3, 1])
def test_the_papers_proportions_in_each_layer_before_the_cut(recipe, layers):
    plan, part = recipe(layers, 32), 2 if recipe is recipes.paper_25 else 4
    assert (plan.layer_cut, plan.ffn_ratio, plan.window) == (layers // 2, part, 5)
    assert (plan.head_keep[: plan.layer_cut].sum(1) == 32 // part).all()
    assert (plan.head_mass, plan.cut_mass) == ("exact", "exact")
    assert plan == recipe(layers, 32), "random heads, but the same each time"


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """A mask in the place of 7b_16, where masks are searched."""
    keep = np.random.default_rng(0).random((32, 32)) < 0.5
    np.save(tmp_path / "headmask_7b_16.npy", keep)
    monkeypatch.setenv("YOPO_HEADMASK_DIR", str(tmp_path))
    return torch.from_numpy(keep)


def test_published_heads_take_the_place_of_the_random_ones(published):
    plan = recipes.published_heads("7b_16")
    assert plan == PruningPlan(published, window=5, layer_cut=16, ffn_ratio=2)


@pytest.mark.parametrize("mask", ["", "7b", "7b_x", "70b_16", "headmask_7b_16", "7b_16.npy"])
def test_a_mask_that_nobody_published_is_refused_naming_those_there_are(mask):
    with pytest.raises(ValueError, match="mask is .*allowed: 13b_10, 13b_20.*7b_16, 7b_24, 7b_8"):
        recipes.published_heads(mask)


# --- by name -----------------------------------------------------------------------------------


def test_names_give_the_recipes_with_the_mass_asked_for(published):
    assert recipes.named_plan("25", 8, 4) == recipes.paper_25(8, 4)
    assert recipes.named_plan("12", 8, 4, mass="drop") == recipes.paper_12(8, 4).with_mass("drop")
    named = recipes.named_plan("7b_16", 32, 32, mass="exact/drop")
    assert named == recipes.published_heads("7b_16").with_mass("exact/drop")


def test_a_name_may_be_a_file_or_folder_whose_masses_stay(tmp_path):
    made = PruningPlan(KEEP, layer_cut=2, cut_mass="drop")
    made.save(tmp_path / "plan.json")
    assert recipes.named_plan(str(tmp_path / "plan.json"), LAYERS, HEADS, mass="exact") == made
    target = config().to_dict()
    made.save_to(target)
    (tmp_path / "config.json").write_text(json.dumps(target))
    assert recipes.named_plan(str(tmp_path), LAYERS, HEADS) == made


def test_a_plan_for_fewer_layers_keeps_the_proportions(published, tmp_path):
    part = recipes.named_plan("7b_16", 8, 32, whole=32)
    assert part.layer_cut == 4
    assert torch.equal(part.head_keep, published[[0, 4, 8, 12, 16, 20, 24, 28]])
    shares = torch.linspace(0, 1, LAYERS * HEADS).view(LAYERS, HEADS)
    each = {"window": [1, 2, 3, 4], "ffn": [0, 1, 2, 3], "visual_attention": [True, False] * 2}
    sinks = Sinks(shares, shares[..., None].expand(-1, -1, 8), tokens=9)
    made = PruningPlan(KEEP, layer_cut=2, cut_mass="sink", sinks=sinks, **each)
    made.save(tmp_path / "plan.json")
    part = recipes.named_plan(str(tmp_path / "plan.json"), 2, HEADS, whole=LAYERS)
    assert (part.layer_cut, part.window, part.ffn) == (1, (1, 3), (0, 2))
    assert part.visual_attention is True
    assert torch.equal(part.sinks.a, shares[[0, 2]]) and part.sinks.b.shape == (2, HEADS, 8)
    assert part.sinks.tokens == 9


@pytest.mark.parametrize("sizes", [(40, 32), (32, 40), (8, 32)])
def test_a_plan_of_another_shape_is_refused_naming_both(sizes, published):
    with pytest.raises(ValueError, match=r"--plan is '7b_16'.*\(32, 32\).*\(\d+, \d+\)") as caught:
        recipes.named_plan("7b_16", *sizes, setting="--plan")
    assert str(sizes) in str(caught.value)


@pytest.mark.parametrize("name", ["", "26", "7b", "7b_x", "70b_16", "no/such/file.json"])
def test_an_unknown_name_is_refused(name):
    with pytest.raises(ValueError, match="plan is .*; allowed: 25, 12, a published head mask"):
        recipes.named_plan(name, 32, 32)

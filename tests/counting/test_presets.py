"""Named plans: what they prune, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from yopo.counting.presets import PRESETS, named_plan

SHAPE = PRESETS["llava-1.5-7b"]


@pytest.mark.parametrize(("name", "heads", "ratio"), [("25", 16, 2), ("12", 8, 4)])
@pytest.mark.parametrize("layers", [32, 8, 3, 1])
def test_share_of_heads_in_each_layer_before_the_cut(
    name: str, heads: int, ratio: float, layers: int
) -> None:
    plan = named_plan(name, replace(SHAPE, num_hidden_layers=layers), "drop")
    assert (plan.layer_cut, plan.ffn_ratio, plan.window) == (layers // 2, ratio, 5)
    assert (plan.head_keep[: plan.layer_cut].sum(1) == heads).all()
    assert (plan.head_mass, plan.cut_mass) == ("drop", "drop")


def test_named_plans_are_the_same_each_time() -> None:
    assert named_plan("25", SHAPE) == named_plan("25", SHAPE)


def test_published_mask_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keep = np.random.default_rng(0).random((32, 32)) < 0.5
    np.save(tmp_path / "headmask_7b_16.npy", keep)
    monkeypatch.setenv("YOPO_HEADMASK_DIR", str(tmp_path))
    whole = named_plan("7b_16", SHAPE)
    assert torch.equal(whole.head_keep, torch.from_numpy(keep))
    part = named_plan("7b_16", replace(SHAPE, num_hidden_layers=8), whole=32)
    assert torch.equal(part.head_keep[:4], torch.from_numpy(keep[[0, 4, 8, 12]]))
    with pytest.raises(ValueError, match="head_keep has shape"):
        named_plan("7b_16", PRESETS["llava-1.5-13b"])


def test_plan_from_a_file(tmp_path: Path) -> None:
    plan = named_plan("12", SHAPE, "drop", "exact")
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    plan.save_to(config)
    for content in (config, config["yopo"]):
        (tmp_path / "plan.json").write_text(json.dumps(content))
        assert named_plan(str(tmp_path / "plan.json"), SHAPE) == plan
    (tmp_path / "plan.json").write_text(json.dumps({"num_hidden_layers": 32}))
    with pytest.raises(ValueError, match="holds no plan"):
        named_plan(str(tmp_path / "plan.json"), SHAPE)


@pytest.mark.parametrize("name", ["", "26", "7b", "7b_x", "70b_16", "no/such/file.json"])
def test_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="--plan is"):
        named_plan(name, SHAPE)

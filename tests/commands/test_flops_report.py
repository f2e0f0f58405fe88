"""The command `flops`: its JSON, its tables, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from yopo.commands import command_line as cli
from yopo.counting.flops import Prompt, decode_flops, paper_tflops, prefill_flops
from yopo.counting.presets import PRESETS
from yopo.plan import recipes
from yopo.plan.pruning_plan import PruningPlan

TINY = Path(__file__).parents[2] / "examples/tiny_llava/checkpoints/tiny-llava-v1-pruned"
# Heads that the published masks keep in each layer (what the counts depend on).
KEPT = {
    "7b_16": [32, 32, 9, 5, 10, 4, 5, 15, 18, 13, 15, 20, 23, 24, 27, 23,
              27, 17, 14, 18, 18, 16, 15, 8, 14, 10, 15, 5, 7, 11, 5, 24],
    "13b_20": [40, 40, 29, 24, 7, 21, 16, 11, 21, 21, 19, 20, 23, 28, 24, 25, 32, 26, 26, 25,
               21, 26, 20, 12, 17, 12, 14, 11, 11, 9, 15, 10, 15, 10, 16, 16, 18, 18, 17, 32],
}  # fmt: skip


@pytest.fixture
def masks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, kept in KEPT.items():
        np.save(
            tmp_path / f"headmask_{name}.npy",
            np.arange(len(kept)) < np.array(kept)[:, None],
        )
    monkeypatch.setenv("YOPO_HEADMASK_DIR", str(tmp_path))


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert cli.main(["flops", *words, "--json"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


@pytest.mark.parametrize(
    ("preset", "plan", "dense", "pruned"),
    [
        ("llava-1.5-7b", "25", 7.63, 1.91),
        ("llava-1.5-13b", "25", 14.89, 3.72),
        ("llava-1.5-7b", "7b_16", 7.63, 1.96),
        ("llava-1.5-13b", "13b_20", 14.89, 3.97),
    ],
)
def test_the_papers_rows(
    capsys: pytest.CaptureFixture[str],
    masks: None,
    preset: str,
    plan: str,
    dense: float,
    pruned: float,
) -> None:
    paper = as_json(capsys, "--preset", preset, "--plan", plan)["paper_convention"]
    assert round(paper["dense_tflops"], 2) == dense
    assert round(paper["pruned_tflops"], 2) == pruned
    ragged = [note for note in paper["notes"] if "a little more than half" in note]
    assert len(ragged) == (plan != "25")
    if ragged:
        assert "because its mask is ragged: all in layers 0 and 1" in ragged[0]
        assert cli.main(["flops", "--preset", preset, "--plan", plan]) == 0
        shown = capsys.readouterr().out
        assert f"pruned {pruned}" in shown and ragged[0] in shown


def test_totals_are_the_counts(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--preset internvl2-8b --layers 4 --plan 12 --mass exact/drop --images 2 --grid 6x4,3x3"
    result = as_json(capsys, *words.split(), "--text-tokens", "9", "--batch", "3")
    shape = PRESETS["internvl2-8b"]
    shape = type(shape)(**{**vars(shape), "num_hidden_layers": 4})
    plan = recipes.paper_12(4, shape.num_attention_heads).with_mass("exact/drop")
    prompt = Prompt(8, ((6, 4), (3, 3), (6, 4), (3, 3)), 1)
    assert result["prompt"]["grids"] == [[6, 4], [3, 3]] * 2
    head = 2 * 3 * shape.hidden_size * shape.vocab_size
    for name, function in (("prefill", prefill_flops), ("decode", decode_flops)):
        for arm, chosen in (("dense", None), ("pruned", plan)):
            layers = function(shape, prompt, chosen, 3)
            assert result[name][arm]["total"] == head + sum(layer.total for layer in layers)
            told = [layer[arm][name] for layer in result["per_layer"]]
            assert told == [vars(layer) for layer in layers]
            assert result[name]["executed"][arm] >= result[name][arm]["total"]
    assert result["paper_convention"]["pruned_tflops"] == paper_tflops(shape, 66, plan)
    assert result["kv_bytes"]["pruned"]["filled"] == sum(
        layer["pruned"]["kv_bytes"][kind] for layer in result["per_layer"] for kind in
        ("text", "visual")
    )  # fmt: skip


def test_a_checkpoints_own_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TINY.parents[3])  # its vision tower is named from there
    own = as_json(capsys, str(TINY))
    assert own == as_json(capsys, "--model", str(TINY))
    assert own["plan"]["head_mass"] == "sink" and own["plan"]["kept_heads"] == 13
    assert own["prompt"]["visual_tokens"] == 576
    dropped = as_json(capsys, str(TINY), "--mass", "drop")
    exact = as_json(capsys, str(TINY), "--mass", "exact")
    assert dropped["kv_bytes"]["pruned"]["visual"] < exact["kv_bytes"]["pruned"]["visual"]
    assert own["kv_bytes"]["pruned"] == dropped["kv_bytes"]["pruned"]
    assert 1 < own["prefill"]["pruned"]["total"] / dropped["prefill"]["pruned"]["total"] < 1.01
    none = as_json(capsys, str(TINY), "--plan", "none")
    assert none["plan"] is None and none["paper_convention"]["pruned_tflops"] is None
    assert none["prefill"]["dense"] == own["prefill"]["dense"]


def test_a_plan_file_keeps_its_masses(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """bench's default of drop must not slip in."""
    shape = PRESETS["llava-1.5-7b"]
    config = {"num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008}
    PruningPlan(torch.ones(32, 32), layer_cut=9, head_mass="exact", cut_mass="drop").save_to(config)
    (tmp_path / "plan.json").write_text(json.dumps(config))
    words = ["--preset", "llava-1.5-7b", "--plan", str(tmp_path / "plan.json")]
    plan = as_json(capsys, *words)["plan"]
    assert (plan["head_mass"], plan["cut_mass"], plan["layer_cut"]) == ("exact", "drop", 9)
    assert as_json(capsys, *words, "--mass", "drop")["plan"]["head_mass"] == "drop"
    assert shape.num_hidden_layers == 32


def test_tables_show_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tabulate")
    assert cli.main(["flops", "--preset", "qwen2.5-vl-7b", "--per-layer"]) == 0
    out = capsys.readouterr().out
    for part in ("visual projections", "text ffn", "lm_head", "executed", "KV cache, visual"):
        assert part in out
    layers = [line for line in out.splitlines() if line.split("|")[1:2] and
              line.split("|")[1].strip().isdigit()]  # fmt: skip
    assert len(layers) == 28


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "flops of what?"),
        (["a", "--preset", "llava-1.5-7b"], "got a checkpoint and --preset"),
        (["--preset", "llava-9"], "allowed: llava-1.5-7b"),
        (["no/such/folder"], "is not there"),
        (["--preset", "llava-1.5-7b", "--plan", "26"], "--plan is '26'"),
        (["--preset", "llava-1.5-7b", "--plan", ""], "--plan is ''"),
        (["--preset", "llava-1.5-7b", "--mass", "some"], "--mass is 'some'"),
        (["--preset", "llava-1.5-7b", "--mass", "drop/"], "--mass is 'drop/'"),
        (["--preset", "llava-1.5-7b", "--plan", "none", "--mass", "drop"], "there is no plan"),
        (["--preset", "llava-1.5-7b", "--grid", "24"], "--grid is '24'"),
        (["--preset", "llava-1.5-7b", "--grid", "0x4"], "--grid is '0x4'"),
        (["--preset", "llava-1.5-7b", "--layers", "33"], "llava-1.5-7b has 32"),
        ([str(TINY), "--layers", "2"], "it goes with --preset"),
        (["--preset", "llava-1.5-7b", "--text-tokens", "1"], "--text-tokens is 1"),
        (["--preset", "llava-1.5-7b", "--dtype", "int4"], "allowed: bfloat16"),
        (["--preset", "qwen2-vl-7b", "--plan", "7b_16"], "head_keep has shape"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], masks: None, words: list[str], message: str
) -> None:
    assert cli.main(["flops", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("yopo: error:") and captured.err.count("\n") == 1
    assert message in captured.err


def test_a_grid_nobody_knows_must_be_told(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
             "num_attention_heads": 4, "vocab_size": 9}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    assert cli.main(["flops", str(tmp_path)]) == 2
    assert "give --grid" in capsys.readouterr().err
    assert as_json(capsys, str(tmp_path), "--grid", "2x3")["prompt"]["visual_tokens"] == 6

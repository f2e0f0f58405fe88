"""The command `inspect`: what it says of a plan is what the plan does; its drawing; bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from yopo.commands import command_line as cli
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

CHECKPOINTS = Path(__file__).parents[2] / "examples/tiny_llava/checkpoints"
SIZES = {
    "model_type": "llava_llama",
    "hidden_size": 64,
    "intermediate_size": 100,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
}


def checkpoint(folder: Path, plan: PruningPlan | None = None, **more: Any) -> str:
    config = SIZES | more
    if plan is not None:
        plan.save_to(config)
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """All it prints, in one line."""
    pytest.importorskip("tabulate")
    assert cli.main(["inspect", *words]) == 0
    return " ".join(capsys.readouterr().out.split())


KEEP = torch.tensor([[1, 1, 1, 1]] * 2 + [[1, 0, 1, 0]] * 3 + [[0, 0, 0, 0]] + [[1, 0, 0, 0]] * 2)


def test_each_pruning_is_in_the_words(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plan = PruningPlan(KEEP, window=4, layer_cut=6, ffn_ratio=3, head_mass="exact", cut_mass="drop")
    text = said(capsys, checkpoint(tmp_path, plan, sprompt_len=35))
    assert "14 of 24 (58%)" in text
    assert "all 4 in layers 0–1; 2 of 4 in layers 2–4; none in layer 5" in text
    assert "Window: 4:" in text and "3 × 3 around it" in text and "before and after it" in text
    assert "first 33 of 100 neurons" in text
    assert "in layers 6–7 of 8 visual tokens are not there at all" in text
    assert "Mass, in pruned heads: exact: the visual keys keep their share" in text
    assert "Mass, in cut layers: drop: the visual keys leave the softmax" in text
    assert "sprompt_len 35 counts only for inputs_embeds" in text
    assert "24 × 24 = 576" in text


def test_a_plan_of_the_other_kind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """As for models never fine-tuned: no window or a causal one, blind visual queries, no cut."""
    plan = PruningPlan(KEEP, layer_cut=8, prune_visual_queries=False, head_mass="drop")
    text = said(capsys, checkpoint(tmp_path, plan))
    assert "Window: none" in text and "use all 100 neurons" in text
    assert "read in all 8 layers" in text and "the same holds for visual queries" in text
    assert "in cut layers" not in text and "sprompt_len" not in text
    causal = PruningPlan(KEEP, window=5, window_causal=True, layer_cut=6)
    text = said(capsys, checkpoint(tmp_path, causal))
    assert "(those before it only)" in text and "5 × 5" in text
    assert "Mass, in pruned heads and cut layers: exact" in text
    assert "the visual rows still run there" in text


def test_what_is_said_per_layer_names_the_layers(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plan = PruningPlan(
        KEEP,
        window=[None, None, 3, 3, 3, None, 3, 3],
        ffn=[None, 50, 0, 0, 0, 50, 100, 0],
        visual_attention=[True, False, False, True, True, True, True, False],
    )
    text = said(capsys, checkpoint(tmp_path, plan))
    assert "Window: in layers 0–1, layer 5 none: a visual token" in text
    assert "; in layers 2–4, layers 6–7 3: a visual token sees the text before it" in text
    assert "FFN: in layer 0, layer 6 visual tokens use all 100 neurons, as text does; in " in text
    assert "in layer 1, layer 5 visual tokens use the first 50 of 100 neurons, text all" in text
    assert "in layers 2–4, layer 7 visual tokens do not pass it, text uses all 100" in text
    assert "Attention: in layers 1–2, layer 7 visual tokens do not attend" in text


def test_sinks_are_explained_and_read_beside_the_config(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sinks = Sinks(torch.zeros(8, 4), torch.zeros(8, 4, 16), tokens=576)
    folder = checkpoint(tmp_path, PruningPlan(KEEP, head_mass="sink", sinks=sinks))
    sinks.save(tmp_path)
    assert "Mass, in pruned heads: sink: one predicted logit" in said(capsys, folder)


def test_many_different_layers_are_summed_up(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    keep = torch.tensor([[1] * n + [0] * (4 - n) for n in (4, 4, 1, 2, 3, 1, 3, 4)])
    text = said(capsys, checkpoint(tmp_path, PruningPlan(keep)))
    assert "all 4 in layers 0–1, layer 7; 1 to 3 of 4 in the others" in text


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (PruningPlan(torch.ones(8, 4)), "all 4 heads of layers 0–7 read visual tokens; none is"),
        (PruningPlan(torch.ones(8, 4), layer_cut=0), "no head reads visual tokens"),
        (
            PruningPlan(torch.zeros(8, 4), layer_cut=8),
            "0 of 32 (0%) read visual tokens: none in layers 0–7",
        ),
    ],
)
def test_plans_at_the_ends(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, plan: PruningPlan, words: str
) -> None:
    assert words in said(capsys, checkpoint(tmp_path, plan))


def test_savings_are_the_counts_of_flops(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [str(CHECKPOINTS / "tiny-llava-v1-pruned"), "--grid", "6x6", "--batch", "2"]
    assert cli.main(["inspect", *arguments, "--json"]) == 0
    seen = json.loads(capsys.readouterr().out)
    assert cli.main(["flops", *arguments, "--json"]) == 0
    counted = json.loads(capsys.readouterr().out)
    assert {key: seen[key] for key in counted} == counted
    assert torch.tensor(seen["head_keep"]).sum(1).tolist() == [6, 6, 1, 3, 1, 1]
    both = counted["prefill"]
    left = f"{both['pruned']['total'] / both['dense']['total']:.1%}"
    shown = said(capsys, *arguments)
    assert left in shown and "batch 2" in shown


def test_without_a_plan_it_says_so_and_what_dense_costs(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    text = said(capsys, checkpoint(tmp_path), "--png", str(tmp_path / "map.png"))
    assert "Nothing is pruned" in text and "What the dense model costs" in text
    assert "left" not in text
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert cli.main(["inspect", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plan"] is None


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The maps that are drawn in the test, as numbers."""
    axes = pytest.importorskip("matplotlib.axes").Axes
    maps: list[Any] = []
    real = axes.pcolormesh
    monkeypatch.setattr(
        axes, "pcolormesh", lambda self, *a, **k: maps.append(a[-1]) or real(self, *a, **k)
    )
    return maps


@pytest.mark.parametrize("cut_mass", ["exact", "drop"])
def test_head_map_shows_what_each_head_does(
    tmp_path: Path, cut_mass: str, drawn: list[Any]
) -> None:
    from yopo.counting import plan_picture as inspect_png

    plan = PruningPlan(KEEP, layer_cut=6, cut_mass=cut_mass)
    folder = tmp_path / "new" / "folder"
    arguments = ["inspect", checkpoint(tmp_path, plan), "--png", str(folder / "map.png")]
    assert cli.main([*arguments, "--json"]) == 0
    assert (folder / "map.png").read_bytes()[:4] == b"\x89PNG"
    labels = list(inspect_png.HEADS)
    cells = [[labels[cell] for cell in row] for row in drawn[0]]
    assert cells[0] == ["reads visual tokens"] * 4
    assert cells[2] == ["reads visual tokens", "pruned"] * 2
    kept = "beyond it, visual queries only" if cut_mass == "exact" else "beyond the layer cut"
    assert cells[6] == [kept] + ["beyond the layer cut"] * 3


def test_beyond_the_cut_heads_serve_visual_queries_only_where_there_are_any(
    tmp_path: Path, drawn: list[Any]
) -> None:
    plan = PruningPlan(KEEP, layer_cut=6, visual_attention=[True] * 7 + [False])
    arguments = ["inspect", checkpoint(tmp_path, plan), "--png", str(tmp_path / "map.png")]
    assert cli.main(arguments) == 0
    assert drawn[0][6:, 0].tolist() == [3, 2]


def test_the_masses_of_the_environment_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOPO_MASS", "drop")
    text = said(capsys, checkpoint(tmp_path, PruningPlan(KEEP, layer_cut=6)))
    assert "YOPO_MASS: is drop here and overrides" in text
    assert "Mass, in pruned heads and cut layers: drop" in text


@pytest.mark.parametrize(
    ("config", "words", "message"),
    [
        (None, [], "it has no config.json"),
        ({"yopo": {"format": 1}}, [], "'yopo' block of the config is corrupt"),
        ({"attncut_w": 5}, [], "some released pruning fields but not"),
        ({"mm_vision_tower": "somebody/tower"}, [], "give --grid"),
        ({}, ["--png", "map.jpg"], "the name of a .png file"),
        ({}, ["--images", "0"], "--images is 0"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, config: Any, words: Any, message: str
) -> None:
    if config is not None:
        checkpoint(tmp_path, **config)
    assert cli.main(["inspect", str(tmp_path), *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert message in captured.err


def test_a_file_that_cannot_be_written_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    folder = checkpoint(tmp_path)
    assert cli.main(["inspect", folder, "--png", str(tmp_path / "config.json" / "map.png")]) == 2
    assert "cannot be written" in capsys.readouterr().err

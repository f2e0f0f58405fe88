"""`python -m yopo sinks` on a random LLaVA: what it writes, where, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import random_llava
import torch
from layouts import needs_float16

from yopo.checkpoint import pruned_folder
from yopo.commands.command_line import main
from yopo.plan import head_mask
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import FILE, Sinks

if importlib.util.find_spec("llava") is None:  # looked for, not imported: the patch comes first
    pytest.skip("llava-torch is not installed", allow_module_level=True)
pytestmark = [pytest.mark.llava, needs_float16]

RELEASED = {
    "attncut_w": 5, "layercut_num": 2, "headcut_num": 1, "mlpcut_ratio": 2, "sprompt_len": 35
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def patched() -> Iterator[None]:
    import yopo.patch

    with yopo.patch.patched():
        yield


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A checkpoint with a plan under exact mass, eight questions beside it."""
    folder = random_llava.make(tmp_path, random_llava.a_plan())
    lines = []
    for seed in range(8):
        random_llava.picture(seed).save(tmp_path / f"{seed}.png")
        lines.append(json.dumps({"image": f"{seed}.png", "question": "how many?"}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return folder


def run(folder: Path, **changes: Any) -> int:
    options = {"data": folder.parent / "data.jsonl", "device": "cpu", **changes}
    words = ["sinks", str(folder)]
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return main(words)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_they_go_into_the_checkpoint_itself(pruned: Path, capsys: Any) -> None:
    before = contents(pruned)
    assert run(pruned) == 0
    out = capsys.readouterr().out
    assert "8 questions, 0 passed over" in out and f"written: {pruned}" in out
    assert "sinks fitted to 8 samples: KL from exact mass " in out
    after = contents(pruned)
    assert after.keys() - before.keys() == {FILE}
    assert {name for name in before if after[name] != before[name]} == {"config.json"}
    plan = PruningPlan.load(pruned)
    old = random_llava.a_plan()
    assert plan == replace(old, sinks=plan.sinks, head_mass="sink", cut_mass="sink")
    code = (  # in a process that has not seen them
        "import sys, yopo.patch\nfrom yopo.prompts import load\n"
        "plan = load(sys.argv[1], 'cpu').model.model.yopo_plan\n"
        "print(plan.head_mass, plan.cut_mass, plan.sinks.checksum)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(pruned)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[-2] == f"sink sink {plan.sinks.checksum}"


def test_or_into_a_new_folder(pruned: Path, capsys: Any) -> None:
    before, out = contents(pruned), pruned.with_name("llava-v1-new")
    assert run(pruned, out=out, target="dense", samples=6, tune=2) == 0
    assert "sinks fitted to 6 samples: KL from the dense model" in capsys.readouterr().out
    assert contents(pruned) == before
    made = contents(out)
    assert made.keys() == before.keys() | {FILE}
    assert {name for name in before if made[name] != before[name]} == {"config.json"}
    assert PruningPlan.load(out).head_mass == "sink"
    assert not out.with_name("llava-v1-new.partial").exists()


def test_a_plan_of_released_fields_becomes_a_block(tmp_path: Path, pruned: Path) -> None:
    source = random_llava.make(tmp_path / "released", **RELEASED)
    keep = random_llava.a_plan().head_keep
    head_mask.save(source / "headmask_tiny_1.npy", keep)
    assert run(source, data=tmp_path / "data.jsonl") == 0
    plan = PruningPlan.load(source)
    assert torch.equal(plan.head_keep, keep) and (plan.window, plan.layer_cut) == (5, 2)
    assert plan.cut_mass == "sink" and plan.sinks.tokens == 16
    assert RELEASED.items() <= json.loads((source / "config.json").read_text()).items()


@pytest.mark.parametrize("mass", ["sink", "drop", "nonsense"])
def test_the_checkpoint_s_own_masses_count(
    pruned: Path, monkeypatch: pytest.MonkeyPatch, mass: str
) -> None:
    """Not those that $YOPO_MASS names, which may need the very sinks that are to be fitted."""
    pruned_folder.put_plan(
        pruned, random_llava.a_plan(cut_mass="sink", sinks=Sinks(torch.ones(3, 4)))
    )
    monkeypatch.setenv("YOPO_MASS", mass)
    assert run(pruned) == 0
    plan = PruningPlan.load(pruned)
    assert (plan.head_mass, plan.cut_mass) == ("exact", "sink") and plan.sinks.b is not None


@pytest.mark.parametrize("damage", ["lost", "other", "empty", "null"])
def test_sinks_that_cannot_be_read_are_fitted_anew(pruned: Path, damage: str) -> None:
    assert run(pruned) == 0
    fitted = PruningPlan.load(pruned)
    if damage == "lost":
        (pruned / FILE).unlink()
    elif damage == "other":
        Sinks(fitted.sinks.a + 1, fitted.sinks.b, 16).save(pruned)
    elif damage == "empty":
        (pruned / FILE).write_bytes(b"")
    else:
        config = json.loads((pruned / "config.json").read_text())
        config["yopo"]["sinks"] = None
        (pruned / "config.json").write_text(json.dumps(config))
    assert run(pruned) == 0
    assert PruningPlan.load(pruned) == fitted


@pytest.mark.parametrize("fails", ["put_plan", "write_json"])
def test_a_write_that_fails_leaves_the_checkpoint_as_it_was(
    pruned: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, fails: str
) -> None:
    assert run(pruned) == 0
    before = contents(pruned)

    def full(*arguments: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(pruned_folder, fails, full)
    assert run(pruned, samples=4) == 2
    assert "no space left" in capsys.readouterr().err and contents(pruned) == before
    assert run(pruned, samples=4, out=pruned.with_name("llava-v1-new")) == 2
    assert {path.name for path in pruned.parent.iterdir() if "new" in path.name} == set()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "there"}, "is there already"),
        ({"out": "other"}, "'llava' in the name"),
        ({"out": "data.jsonl/llava"}, "data.jsonl is a file"),
        ({"out": ""}, "--out: . is there already"),
        ({"data": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        ({"samples": 0}, "--samples is 0"),
        ({"tune": 0}, "--tune is 0"),
        ({"tune": 5, "samples": 2}, "2 samples to fit sinks to; give at least 4"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(
    pruned: Path, capsys: Any, changes: dict[str, Any], message: str
) -> None:
    if "out" in changes:
        out = changes["out"]
        where = {"there": pruned, "": ""}.get(out, pruned.parent / out)
        changes = {"out": where}
    assert run(pruned, **changes) == 2
    said = capsys.readouterr()
    assert "fitted" not in said.out
    error = said.err.splitlines()[-1]
    assert error.startswith("yopo: error:") and message in error
    assert not (pruned / FILE).exists()


def test_a_checkpoint_without_a_plan_is_refused(tmp_path: Path, pruned: Path, capsys: Any) -> None:
    dense = random_llava.make(tmp_path / "dense")
    assert run(dense, data=tmp_path / "data.jsonl") == 2
    assert "has no plan" in capsys.readouterr().err
    assert run(tmp_path / "nowhere", data=tmp_path / "data.jsonl") == 2
    assert "there is no folder" in capsys.readouterr().err

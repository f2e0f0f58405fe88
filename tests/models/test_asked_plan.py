"""YOPO_PLAN and `run --plan` put a plan on every model that a program loads and that takes one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from layouts import SHAPE, a_plan, build, make_case
from processes import run
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

import yopo
from yopo.commands.command_line import main

PLAN = a_plan("drop", "drop")


@pytest.fixture(autouse=True)
def patch() -> Iterator[None]:
    import yopo.patch

    with yopo.patch.patched():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The plan's file, and checkpoints: dense, pruned by the plan, pruned otherwise, a tower."""
    path = tmp_path_factory.mktemp("asked")
    PLAN.save(path / "plan.json")
    for name, plan in (("dense", None), ("same", PLAN), ("other", a_plan("exact", "exact"))):
        build(SHAPE, plan, cls=LlamaForCausalLM).save_pretrained(path / name)
    tower = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    CLIPVisionModel(tower).save_pretrained(path / "tower")
    return path


def test_a_dense_checkpoint_is_loaded_with_the_plan_and_saved_with_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOPO_PLAN", str(folder / "plan.json"))
    model = LlamaForCausalLM.from_pretrained(folder / "dense")
    assert yopo.plan_of(model) == PLAN
    case = make_case([[("text", 2), ("image", 3, 3, False), ("text", 3)]], SHAPE.heads * 8)
    with torch.no_grad():
        expected = build(SHAPE, PLAN, cls=LlamaForCausalLM)(**case.kwargs()).logits
        assert torch.allclose(model(**case.kwargs()).logits, expected, atol=1e-5)
    model.save_pretrained(tmp_path)
    monkeypatch.delenv("YOPO_PLAN")
    assert yopo.plan_of(LlamaForCausalLM.from_pretrained(tmp_path)) == PLAN
    assert yopo.plan_of(LlamaForCausalLM.from_pretrained(folder / "dense")) is None


def test_what_takes_no_plan_or_has_it_already_is_left_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOPO_PLAN", str(folder / "same"))  # a pruned checkpoint names it as well
    assert yopo.plan_of(CLIPVisionModel.from_pretrained(folder / "tower")) is None
    assert yopo.plan_of(LlamaForCausalLM.from_pretrained(folder / "same")) == PLAN


def test_a_checkpoint_with_another_plan_and_one_that_it_does_not_fit_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOPO_PLAN", str(folder / "plan.json"))
    with pytest.raises(ValueError, match="YOPO_PLAN .* has a plan of its own, another one"):
        LlamaForCausalLM.from_pretrained(folder / "other")
    yopo.PruningPlan(torch.ones(1, 2), window=3).save(tmp_path / "small.json")
    monkeypatch.setenv("YOPO_PLAN", str(tmp_path / "small.json"))
    with pytest.raises(ValueError, match=r"small\.json \(YOPO_PLAN, or --plan\): .*layers"):
        LlamaForCausalLM.from_pretrained(folder / "dense")


PROGRAM = """
import sys, transformers, yopo
for folder in sys.argv[1:]:
    print(yopo.plan_of(transformers.AutoModel.from_pretrained(folder)
                       if folder.endswith("tower") else
                       transformers.AutoModelForCausalLM.from_pretrained(folder)) is not None)
"""


def test_run_puts_the_plan_on_what_a_script_loads_and_says_if_that_was_nothing(
    folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    plan = str(folder / "plan.json")
    paths = [str(folder / name) for name in ("tower", "dense")]
    done = run("-m", "yopo", "run", "--plan", plan, "program.py", *paths, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "True"] and "yopo:" not in done.stderr
    done = run("-m", "yopo", "run", f"--plan={plan}", "-m", "program", paths[0], cwd=tmp_path)
    assert done.stdout.split() == ["False"]
    assert f"yopo: program loaded no model that {plan} was put on" in done.stderr


@pytest.mark.parametrize(
    ("plan", "said"),
    [(["--plan", "no.json"], "no.json is not there"), (["--plan"], "--plan names no file")],
)
def test_run_with_a_plan_that_is_none(
    plan: list[str], said: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "program.py").write_text("")
    rest = [str(tmp_path / "program.py")] if len(plan) == 2 else []
    assert main(["run", *plan, *rest]) == 2
    assert said in capsys.readouterr().err

"""The embedded model, through the commands of the pages, from the committed checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from layouts import needs_float16

import yopo

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [
    pytest.mark.llava,
    pytest.mark.skipif(find_spec("llava") is None, reason="llava-torch is not installed"),
]


def run(*words: str, cwd: Path = ROOT) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_float16
def test_infer_answers_from_the_embedded_checkpoint() -> None:
    out = run("-m", "yopo", "infer", "--device", "cpu")
    assert "ASSISTANT: red" in out
    assert "13 of 18 heads of layers 0–2 read visual tokens, none from layer 3 of 6 on" in out
    assert "620 tokens (576 visual, 44 text)" in out


@needs_float16
def test_infer_takes_another_mass() -> None:
    out = run("-m", "yopo", "infer", "--mass", "exact/drop")
    assert "exact in pruned heads, drop from layer 3 on" in out


@pytest.mark.skipif(find_spec("easy_vqa") is None, reason="easy-vqa is not installed")
def test_evaluate_finds_both_checkpoints_accurate(tmp_path: Path) -> None:
    """On the first questions only; the whole test set takes minutes."""
    script = str(ROOT / "examples/tiny_llava/evaluate.py")
    out = run(script, "--limit", "100", "--json", cwd=tmp_path)
    percent = json.loads(out.splitlines()[-1])
    assert percent.keys() == {"dense", "pruned"}
    assert min(percent.values()) >= 90


@pytest.mark.skipif(find_spec("easy_vqa") is None, reason="easy-vqa is not installed")
def test_the_recipe_to_begin_with_answers_as_well_as_the_dense_model(tmp_path: Path) -> None:
    dense, cut = ROOT / "examples/tiny_llava/checkpoints/tiny-llava-v1-dense", tmp_path / "llava-v1"
    shutil.copytree(dense, cut)
    config = json.loads((dense / "config.json").read_text())
    plan = yopo.recipes.late_cut(config)
    assert plan.layer_cut < plan.num_layers
    plan.save_to(config)
    (cut / "config.json").write_text(json.dumps(config))
    script = str(ROOT / "examples/tiny_llava/evaluate.py")
    out = run(script, str(dense), str(cut), "--limit", "300", "--json")
    percent = json.loads(out.splitlines()[-1])
    assert percent[str(cut)] >= percent[str(dense)] - 1


@needs_float16
@pytest.mark.skipif(find_spec("easy_vqa") is None, reason="easy-vqa is not installed")
def test_a_newcomer_can_prune_the_embedded_model(tmp_path: Path) -> None:
    """docs/calibrate.md's first commands, with fewer questions and plans."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text(run(str(ROOT / "examples/tiny_llava/questions.py"), "--number", "40"))
    made = tmp_path / "my-llava-v1"
    model = "examples/tiny_llava/checkpoints/tiny-llava-v1-dense"
    words = ["calibrate", model, "--data", str(questions), "--out", str(made), "--device", "cpu"]
    out = run("-m", "yopo", *words, "--budget", "0.25", "--evaluations", "24")
    assert "40 questions, 0 passed over" in out
    assert "6 questions held out, by which the plan was not chosen: " in out
    share = float(out.split("visual FLOPs: ")[1].split(" %")[0])
    assert 0 < share <= 25
    assert {"search.csv", "pareto.png", "statistics.safetensors"} <= {
        f.name for f in made.iterdir()
    }
    answer = run("-m", "yopo", "infer", "--device", "cpu", "--model-path", str(made))
    assert "ASSISTANT: red" in answer and "576 visual" in answer
    percent = run(
        str(ROOT / "examples/tiny_llava/evaluate.py"), str(made), "--limit", "100", "--json"
    )
    assert json.loads(percent.splitlines()[-1])[str(made)] >= 90

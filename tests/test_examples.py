"""The embedded model, through the commands of the README, from the committed checkpoints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from layouts import needs_float16

ROOT = Path(__file__).resolve().parents[1]

pytestmark = [
    pytest.mark.llava,
    pytest.mark.skipif(find_spec("llava") is None, reason="llava-torch is not installed"),
]


def run(*words: str, cwd: Path = ROOT) -> str:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_float16
def test_infer_answers_from_the_embedded_checkpoint() -> None:
    out = run("-m", "yopo", "infer", "--device", "cpu")
    assert "ASSISTANT: red" in out
    assert "read by 13 of 18 heads in 3 layers" in out
    assert "620 tokens (576 visual, 44 text)" in out


@needs_float16
def test_infer_takes_another_mass() -> None:
    assert "exact in pruned heads, drop in cut" in run(
        "-m", "yopo", "infer", "--mass", "exact/drop"
    )


@pytest.mark.skipif(find_spec("easy_vqa") is None, reason="easy-vqa is not installed")
def test_evaluate_finds_both_checkpoints_accurate(tmp_path: Path) -> None:
    """On the first questions only; the whole test set takes minutes (README)."""
    script = str(ROOT / "examples/tiny_llava/evaluate.py")
    out = run(script, "--limit", "100", "--json", cwd=tmp_path)
    percent = json.loads(out.splitlines()[-1])
    assert percent.keys() == {"dense", "pruned"}
    assert min(percent.values()) >= 90

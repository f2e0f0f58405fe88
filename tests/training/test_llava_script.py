"""LLaVA's own train.py, unmodified, under a plan that it is not told of: what it saves carries the
plan and answers; stopped and started again, it goes on to the same losses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from yopo.plan.pruning_plan import PruningPlan
from yopo.training import llava_script

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_llava"
DENSE = TINY / "checkpoints" / "tiny-llava-v1-dense"
STEPS = 4

pytestmark = [pytest.mark.llava, pytest.mark.slow]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keep = torch.zeros(6, 6, dtype=torch.bool)
    keep[:2, :3] = True
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    PruningPlan(keep, window=3, layer_cut=3, ffn_ratio=4, head_mass="drop", cut_mass="drop").save(
        file
    )
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows: list[dict[str, Any]] = []
    for number in range(STEPS):
        Image.new("RGB", (64, 64), (60 * number, 90, 200)).save(folder / f"{number}.png")
        said = {"human": "<image>\nwhat color is the shape?", "gpt": "blue"}
        turns = [{"from": who, "value": what} for who, what in said.items()]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    del rows[-1]["image"]  # one of text alone
    rows[-1]["conversations"][0]["value"] = "what color is it?"
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def train(plan: Path, data: Path, out: Path, *more: str) -> list[float]:
    """The losses of its steps."""
    given = {
        "model_name_or_path": DENSE.relative_to(ROOT),
        "version": "v1",
        "data_path": data / "rows.json",
        "image_folder": data,
        "vision_tower": (TINY / "clip-tiny").relative_to(ROOT),
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_layer": -2,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "output_dir": out,
        "max_steps": STEPS,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-4,
        "save_steps": STEPS // 2,
        "logging_steps": 1,
        "model_max_length": 700,
        "report_to": "none",
        "use_cpu": True,
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    run_yopo("run", "--plan", str(plan), "-m", "llava.train.train", *words, *more)
    found = json.loads((out / "trainer_state.json").read_text())
    return [step["loss"] for step in found["log_history"] if "loss" in step]


def run_yopo(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "yopo", *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_what_is_saved_has_the_plan_and_answers_and_training_goes_on(
    plan: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "llava-v1-tuned"
    losses = train(plan, data, out)
    assert len(losses) == STEPS
    config = json.loads((out / "config.json").read_text())
    assert PruningPlan.load(out) == PruningPlan.load(plan) and "yopo" in config
    answer = run_yopo("infer", "--model-path", str(out), "--device", "cpu")
    assert "576 visual" in answer and "ASSISTANT:" in answer

    again = tmp_path / "llava-v1-again"
    again.mkdir()
    shutil.copytree(out / f"checkpoint-{STEPS // 2}", again / f"checkpoint-{STEPS // 2}")
    assert train(plan, data, again) == losses


@pytest.mark.parametrize(
    ("more", "left"),
    [
        (("--tune_mm_mlp_adapter", "True"), "mm_projector.bin"),
        (("--freeze_backbone", "True", "--gradient_checkpointing", "True"), "model.safetensors"),
        (
            ("--lora_enable", "True", "--lora_r", "4", "--gradient_checkpointing", "True"),
            "adapter_model.safetensors",
        ),
    ],
    ids=["projector", "frozen backbone", "LoRA"],
)
def test_the_other_ways_to_train(
    more: tuple[str, ...], left: str, plan: Path, data: Path, tmp_path: Path
) -> None:
    if "--lora_enable" in more:
        pytest.importorskip("peft")
    out = tmp_path / "llava-v1-tuned"
    losses = train(plan, data, out, *more, "--max_steps", "2")
    assert len(losses) == 2 and (out / left).exists()
    assert PruningPlan.load(out) == PruningPlan.load(plan)


def test_a_plan_of_another_model_stops_it_before_it_begins(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "plan.json"
    PruningPlan(torch.ones(5, 6, dtype=torch.bool)).save(other)
    with pytest.raises(AssertionError, match="head_keep has shape"):
        train(other, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_bridge_leaves_transformers_as_it_was(tmp_path: Path) -> None:
    code = """
import sys, transformers
from transformers import trainer
was = transformers.Trainer, dict(vars(trainer)), dict(vars(transformers.Trainer))
from yopo.training import llava_script
llava_script.accommodate()
from llava.train.llava_trainer import LLaVATrainer
assert issubclass(LLaVATrainer, transformers.Trainer)
assert (transformers.Trainer, vars(trainer), dict(vars(transformers.Trainer))) == was
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_somebody_s_own_package_of_that_name_runs_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "llava" / "train").mkdir(parents=True)
    for folder in (tmp_path / "llava", tmp_path / "llava" / "train"):
        (folder / "__init__.py").touch()
    (tmp_path / "llava" / "train" / "mine.py").write_text("print('mine ran')")
    done = subprocess.run(
        [sys.executable, "-m", "yopo", "run", "-m", "llava.train.mine"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert "mine ran" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("target", "is_so"),
    [
        ("llava.train.train", True),
        ("llava.train.train_mem", True),
        ("LLaVA/llava/train/train_mem.py", True),
        ("llava.serve.cli", False),
        ("train.py", False),
        ("llava/train.py", False),
    ],
)
def test_which_programs_are_llavas(target: str, is_so: bool) -> None:
    assert llava_script.is_llava_training(target) is is_so

"""examples/finetune on the embedded model, few steps and questions: every recipe runs, goes on
after it was stopped, leaves a checkpoint that answers under its plan, and says what is wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("5.0"):
    pytest.skip("the recipes are written for recent transformers", allow_module_level=True)
for needed in ("easy_vqa", "PIL", "matplotlib", "accelerate", "yaml"):
    pytest.importorskip(needed)

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples/finetune"
sys.path.insert(0, str(FOLDER))

import finetuning  # noqa: E402
import recipe  # noqa: E402
import sft  # noqa: E402
from transformers import TrainerCallback, TrainingArguments  # noqa: E402

import yopo  # noqa: E402
from yopo.prompts import load  # noqa: E402
from yopo.prompts.questions import read_questions  # noqa: E402

NEEDS = {"lora": ["peft"], "qlora": ["peft", "bitsandbytes"], "trl": ["trl", "datasets"]}
RECIPES = ["distill", "plain", "lora", "qlora", "sinks", "tighten", "trl"]
SMALL = {
    "max_steps": 4,
    "max_train_samples": 6,
    "max_eval_samples": 2,
    "per_device_train_batch_size": 1,
    "save_steps": 2,
    "logging_steps": 1,
    "use_cpu": "true",
    "disable_tqdm": "true",
}
TIGHTEN = {"tighten_stages": 2}  # two steps a stage


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What embedded.py makes."""
    folder = tmp_path_factory.mktemp("finetune")
    words = [sys.executable, str(FOLDER / "embedded.py"), "--work", str(folder), "--number", "8"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "plan-12.json" in done.stdout and (folder / "plan-4.json").is_file()
    return folder


def words(work: Path, name: str, out: Path, **changes: Any) -> list[str]:
    given = {
        "model_name_or_path": work / "tiny-llava",
        "plan": work / "plan-12.json",
        "train_file": work / "train.jsonl",
        "eval_file": work / "test.jsonl",
        "output_dir": out,
        **SMALL,
        **(TIGHTEN if name == "tighten" else {}),
        **changes,
    }
    options = [w for n, v in given.items() if v is not None for w in (f"--{n}", str(v))]
    return [str(FOLDER / f"{name}.yaml"), *options]


def script(name: str) -> tuple[type, Any]:
    """The arguments and the Trainers of a recipe's script."""
    for module in NEEDS.get(name, ()):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    if name == "trl":
        import sft_trl

        return sft_trl.SFTConfig, sft_trl.trainer_of
    return TrainingArguments, sft.trainer_of


def run(work: Path, name: str, out: Path, stop: int = 0, **changes: Any) -> Any:
    """What a recipe measured; stop: the step after which it is stopped."""
    arguments, trainer_of = script(name)

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop:
                raise KeyboardInterrupt

    def stopped(*args: Any, **kwargs: Any) -> Any:
        trainer = trainer_of(*args, **kwargs)
        trainer.add_callback(Stop())
        return trainer

    given = recipe.read(words(work, name, out, **changes), arguments)
    return finetuning.finetune(*given, stopped)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_and_its_checkpoint_answers_under_the_plan(
    work: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(work, name, tmp_path / "out")
    told = capsys.readouterr().out
    assert "right of 2 held-out questions:" in told and f"written: {tmp_path / 'out'}" in told
    assert json.loads((tmp_path / "out/results.json").read_text()) == found
    assert found["steps"] == 4 == len(found["losses"])
    assert {"dense", "pruned", "fine-tuned"} <= found.keys()
    assert (tmp_path / "out/losses.png").stat().st_size > 1000
    plan = yopo.PruningPlan.load(work / "plan-12.json")
    if name == "sinks":
        assert found["trained parameters"] == 6 * 6 + 6 * 6 * 32
    [question], _ = read_questions(work / "test.jsonl", 1)
    if name in ("lora", "qlora"):
        peft = pytest.importorskip("peft")
        loaded = load(work / "tiny-llava", "cpu")
        loaded.model = peft.PeftModel.from_pretrained(loaded.model, tmp_path / "out")
    else:
        loaded = load(tmp_path / "out", "cpu")
    saved = yopo.plan_of(loaded.model)
    assert (saved.head_keep == plan.head_keep).all() and saved.layer_cut == plan.layer_cut
    assert (saved.sinks != plan.sinks) == (name == "sinks")
    assert loaded.answer(question, 5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distill", "lora", "sinks", "tighten", "trl"])
def test_stopped_and_started_again_it_comes_to_the_same_numbers(
    work: Path, name: str, tmp_path: Path
) -> None:
    whole = run(work, name, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(work, name, tmp_path / "parts", stop=3)
    again = run(work, name, tmp_path / "parts")
    assert again["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    assert again["fine-tuned"] == whole["fine-tuned"] and again["steps"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["plain", "distill"])
def test_trl_trains_as_transformers_does(work: Path, objective: str, tmp_path: Path) -> None:
    theirs = run(work, "trl", tmp_path / "trl", objective=objective)
    ours = run(work, "plain", tmp_path / "own", objective=objective)
    assert theirs["losses"] == pytest.approx(ours["losses"], rel=1e-3)
    assert theirs["fine-tuned"] == ours["fine-tuned"]


KILLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
import sft
from finetuning import main
from transformers import TrainerCallback, TrainingArguments
class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
def trainer_of(*args, **kwargs):
    trainer = sft.trainer_of(*args, **kwargs)
    trainer.add_callback(Kill())
    return trainer
main(sys.argv[1:], TrainingArguments, trainer_of)
"""


@pytest.mark.slow
def test_killed_it_goes_on_from_the_last_whole_checkpoint(work: Path, tmp_path: Path) -> None:
    whole = run(work, "distill", tmp_path / "whole")
    code, given = KILLED.format(folder=str(FOLDER)), words(work, "distill", tmp_path / "parts")
    done = subprocess.run([sys.executable, "-c", code, *given], cwd=ROOT, capture_output=True)
    assert done.returncode == -9, done.stderr[-2000:]
    assert (tmp_path / "parts/checkpoint-2/trainer_state.json").is_file()
    # As if it had been killed while it wrote the next one.
    (tmp_path / "parts/checkpoint-3").mkdir()
    (tmp_path / "parts/checkpoint-3/model.safetensors").write_bytes(b"cut off")
    command = [sys.executable, str(FOLDER / "sft.py"), *given]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    again = json.loads((tmp_path / "parts/results.json").read_text())
    assert again["losses"] == pytest.approx(whole["losses"], abs=1e-6)
    assert again["fine-tuned"] == whole["fine-tuned"]
    infer = [sys.executable, "-m", "yopo", "infer", "--device", "cpu"]
    infer += ["--model-path", str(tmp_path / "parts")]
    done = subprocess.run(infer, cwd=ROOT, capture_output=True, text=True)
    assert "9 of 18 heads of layers 0–2 read visual tokens" in done.stdout, done.stderr


def test_another_run_s_folder_is_refused(work: Path, tmp_path: Path) -> None:
    run(work, "plain", tmp_path, max_steps=2)
    with pytest.raises(finetuning.BadInput, match=r"holds another run: its learning_rate is 0.*3"):
        run(work, "plain", tmp_path, max_steps=2, learning_rate=1e-5)
    (tmp_path / "run.json").unlink()
    with pytest.raises(finetuning.BadInput, match="is not empty and holds no run"):
        run(work, "plain", tmp_path, max_steps=2)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "what?", "answer": "a"}, "line 2: no image"),
        ({"image": "nowhere.png", "question": "what?", "answer": "a"}, "line 2: there is no image"),
        ({"question": "what?"}, "line 2: no answer"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    work: Path, tmp_path: Path, row: dict[str, str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    first = json.loads((work / "train.jsonl").read_text().splitlines()[0])
    row = {"image": first["image"]} | row if "answer" not in row else row
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [first, row])))
    given = words(work, "plain", tmp_path / "out", train_file=file)
    assert finetuning.main(given, TrainingArguments, sft.trainer_of) == 2
    told = capsys.readouterr().err
    assert said in told and str(file) in told and "skip_rows" in told
    assert not (tmp_path / "out").exists()
    left = recipe.Recipe("model", str(file), str(file), skip_rows=True)
    assert len(recipe.rows_of(str(file), left, None)) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"plan": "OTHER"}, "give a plan made for this model"),
        ({"plan": None}, "has no plan of its own: give one"),
        ({"plan": "nowhere.json"}, "nowhere.json is not there"),
        ({"model_name_or_path": "DENSE"}, "python -m yopo convert"),
        ({"train_file": "nowhere.jsonl"}, "there is no file of questions 'nowhere.jsonl'"),
        ({"objective": "guess"}, "objective is 'guess'; allowed: distill, plain"),
        ({"train_sinks": "true", "use_peft": "true"}, "choose what learns"),
        ({"load_in_4bit": "true"}, "4-bit weights do not learn"),
        ({"learning_rat": 1}, "--learning_rat 1: no such option"),
    ],
)
def test_bad_input_is_said_in_a_line(
    work: Path, tmp_path: Path, changes: dict[str, Any], said: str, capsys: Any
) -> None:
    yopo.PruningPlan([[True] * 4] * 3).save(tmp_path / "other.json")
    places = {
        "OTHER": str(tmp_path / "other.json"),
        "DENSE": str(ROOT / "examples/tiny_llava/checkpoints/tiny-llava-v1-dense"),
    }
    given = words(work, "plain", tmp_path / "out", **changes)
    given = [places.get(word, word) for word in given]
    if changes.get("plan", "") is None:  # the config names one
        config = tmp_path / "config.yaml"
        lines = (FOLDER / "plain.yaml").read_text().splitlines()
        config.write_text("\n".join(line for line in lines if not line.startswith("plan:")))
        given[0] = str(config)
    assert finetuning.main(given, TrainingArguments, sft.trainer_of) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("output_dri: x", "has output_dri, which nobody knows"),
        ("- a", "is no mapping of names to values"),
        ("a: [", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_config_that_cannot_be_is_refused(tmp_path: Path, text: str | None, said: str) -> None:
    config = tmp_path / "config.yaml"
    if text is not None:
        config.write_text(text)
    with pytest.raises(finetuning.BadInput, match=said):
        recipe.read([str(config)], TrainingArguments)
    with pytest.raises(finetuning.BadInput, match="the first argument is the config"):
        recipe.read(["--output_dir", "x"], TrainingArguments)


def test_fused_weights_are_live_for_training(work: Path) -> None:
    import yopo.patch

    model = load(work / "tiny-llava", "cpu").model
    yopo.apply(model, yopo.PruningPlan.load(work / "plan-12.json"))
    folder = work / "pruned"
    model.save_pretrained(folder)
    for file in (work / "tiny-llava").iterdir():
        if not (folder / file.name).exists() and "safetensors" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    given = recipe.Recipe(str(folder), "", "")
    with yopo.patch.patched():
        model, _ = finetuning.load(given, "cpu")
    decoder = model.model.language_model
    assert yopo.plan_of(model) is not None and not decoder.yopo_fused

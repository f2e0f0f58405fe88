"""`python -m yopo`: run starts any program as python would; infer refuses bad input before work."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import random_llava
from layouts import needs_float16

from yopo.commands.command_line import main

ROOT = Path(__file__).resolve().parents[2]
HAS_LLAVA = importlib.util.find_spec("llava") is not None


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )


PROGRAM = """
import json, sys
import transformers
import beside
assert __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals()
print(json.dumps([sys.argv, sys.path[0], "yopo.patch" in sys.modules, beside.NAME]))
sys.exit(7)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "beside.py").write_text("NAME = 'beside'\n")
    return folder


def test_run_script(program: Path, tmp_path: Path) -> None:
    """argv, the path and the exit code are those of `python program.py`."""
    script = os.path.join("programs", "program.py")
    arguments = ["-m", "x", "--help", "run"]
    ours = run("-m", "yopo", "run", script, *arguments, cwd=tmp_path)
    plain = run(script, *arguments, cwd=tmp_path)
    assert ours.returncode == plain.returncode == 7, ours.stderr
    got, expected = json.loads(ours.stdout), json.loads(plain.stdout)
    assert got[:2] == expected[:2] == [[script, *arguments], str(program)]
    assert got[2] and not expected[2]
    assert got[3] == "beside"


def test_run_module(program: Path) -> None:
    ours = run("-m", "yopo", "run", "-m", "program", "-m", "x", cwd=program)
    plain = run("-m", "program", "-m", "x", cwd=program)
    assert ours.returncode == plain.returncode == 7, ours.stderr
    got, expected = json.loads(ours.stdout), json.loads(plain.stdout)
    assert got[0] == expected[0] == [str(program / "program.py"), "-m", "x"]
    assert got[1] == expected[1]
    assert got[2] and not expected[2]


@pytest.mark.slow
def test_run_under_accelerate_launch(program: Path) -> None:
    done = run(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
        "-m", "yopo", "run", "-m", "program", "-m", "x", cwd=program,
    )  # fmt: skip
    assert ", true, " in done.stdout, done.stderr
    assert '"x"]' in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run what?"),
        (["-m"], "run what?"),
        (["--model-path", "x"], "run what?"),
        (["missing.py"], "no such file: 'missing.py'"),
    ],
)
def test_run_without_a_target(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "-m MODULE" in error
    assert len(error.splitlines()) == 1


def test_run_missing_module() -> None:
    done = run("-m", "yopo", "run", "-m", "no_such.module")
    assert done.returncode == 2
    assert "yopo: error: run: no module named 'no_such.module'" in done.stderr.splitlines()[-1]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    assert "run (-m MODULE | SCRIPT.py)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert "run" in out and "infer" in out


# ------------------------------------------------------------------------------------------ infer


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    random_llava.picture(1).save(folder / "picture.png")
    return random_llava.make(folder, random_llava.a_plan())


def copied(source: Path, folder: Path) -> Path:
    """A copy of the checkpoint to damage."""
    target = folder / source.name
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text()[:40])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:30])


def missing_shard(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def cut_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def no_tower(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "mm_vision_tower": "no/such/tower"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, "has no config.json"),
        (cut_config, "config.json is not JSON"),
        (no_weights, "has no weights"),
        (cut_weights, "model.safetensors is cut off"),
        (cut_header, "model.safetensors is cut off"),
        (missing_shard, "has no model-00002-of-00002.safetensors, which its index names"),
        (cut_pickle, "pytorch_model.bin is cut off"),
        (no_tokenizer, "neither tokenizer.model nor tokenizer.json"),
        (no_tower, "the vision tower 'no/such/tower'"),
    ],
)
def test_damaged_checkpoint(
    good: Path, tmp_path: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(good, tmp_path)
    damage(folder)
    image = str(good.parent / "picture.png")
    refused(["--model-path", str(folder), "--image-file", image], message, capsys)


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", *arguments]) == 2
    got = capsys.readouterr()
    assert got.out == ""
    assert len(got.err.splitlines()) == 1 and got.err.startswith("yopo: error: ")
    assert message in got.err


def test_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model-v1").mkdir()
    for path in (tmp_path / "no-llava", "./no/llava", "no-llava", tmp_path.name):
        refused(["--model-path", str(path)], "there is no folder", capsys)
    refused(["--model-path", str(tmp_path / "model-v1")], "'llava' in their name", capsys)


def test_bad_image(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (good.parent / "picture.png").read_bytes()
    for name, content in {"text.png": b"no image", "cut.png": whole[:200], "no.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        image = str(tmp_path / name)
        refused(["--model-path", str(good), "--image-file", image], "is not an image", capsys)
    refused(
        ["--model-path", str(good), "--image-file", str(tmp_path / "none.png")],
        "there is no file",
        capsys,
    )


def test_a_hub_id_goes_on_to_from_pretrained() -> None:
    from yopo.commands.infer import check_model

    check_model("zwt123home123/llava-1.5-13b-prune-zp25")


@needs_float16
@pytest.mark.llava
@pytest.mark.skipif(not HAS_LLAVA, reason="llava-torch is not installed")
def test_infer(good: Path) -> None:
    image = str(good.parent / "picture.png")
    common = ["-m", "yopo", "infer", "--model-path", str(good), "--image-file", image]
    asked = [*common, "--question", "how many?", "--device", "cpu", "--max-new-tokens", "4"]
    done = run(*asked)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    told = next(i for i, line in enumerate(lines) if line.startswith("plan: Visual tokens see"))
    question = next(i for i, line in enumerate(lines) if line == "USER: how many?")
    assert told < question and lines[question + 1].startswith("ASSISTANT: ")
    assert lines[-1].startswith("prefill: ") and "(16 visual, " in lines[-1]

    dropped = run(*asked, "--mass", "drop/exact")
    assert "Mass on visual keys: drop in pruned heads, exact in cut" in dropped.stdout
    wrong = run(*asked, "--mass", "half")
    assert wrong.returncode == 2 and "'half'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@needs_float16
@pytest.mark.llava
@pytest.mark.skipif(not HAS_LLAVA, reason="llava-torch is not installed")
def test_infer_without_a_plan_and_with_a_corrupt_one(tmp_path: Path) -> None:
    folder = random_llava.make(tmp_path)
    image = tmp_path / "picture.png"
    random_llava.picture(1).save(image)
    asked = ["-m", "yopo", "infer", "--model-path", str(folder), "--image-file", str(image)]
    done = run(*asked, "--device", "cpu", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert "plan: none in this checkpoint" in done.stdout
    assert "(16 visual, " in done.stdout.splitlines()[-1]

    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "yopo": {"format": 1}}))
    corrupt = run(*asked, "--device", "cpu")
    assert corrupt.returncode == 2
    assert "block of the config is corrupt" in corrupt.stderr.splitlines()[-1]
    assert "Traceback" not in corrupt.stderr

"""A head mask file that is cut off, or claims what no memory holds, is one line of every command
that reads the checkpoint, before anything is made of it."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import random_llava
from processes import run

from yopo.commands.command_line import main
from yopo.versions import has_families

RELEASED = {
    "attncut_w": 5, "layercut_num": 2, "headcut_num": 1, "mlpcut_ratio": 2, "sprompt_len": 35
}  # fmt: skip
HEADERS = {
    "claims 100 TB": b"{'descr': '|b1', 'fortran_order': False, 'shape': (10000000000000, 10), }",
    "cut off": b"{'descr': '|b1', ",
}
needs_llava = pytest.mark.skipif(find_spec("llava") is None, reason="llava-torch is not installed")


@pytest.fixture(params=list(HEADERS))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder = random_llava.make(tmp_path, **RELEASED)
    header = HEADERS[request.param]
    header += b" " * (117 - len(header)) + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header
    (folder / "headmask_tiny_1.npy").write_bytes(content)
    return folder


def told(error: str) -> None:
    last = error.splitlines()[-1]
    assert last.startswith("yopo: error: ") and "headmask_tiny_1.npy" in last
    assert "Traceback" not in error


@pytest.mark.parametrize("command", ["flops", "inspect", "convert"])
def test_commands_that_read_a_config(
    command: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "convert" and not has_families():
        pytest.skip("convert is for transformers 4.45 on")
    made = [str(tmp_path / "new")] if command == "convert" else []
    assert main([command, str(checkpoint), *made]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and len(captured.err.splitlines()) == 1
    told(captured.err)
    assert not (tmp_path / "new").exists()


@pytest.mark.llava
@pytest.mark.slow
@needs_llava
@pytest.mark.parametrize("command", ["infer", "calibrate"])
def test_commands_that_load_a_model(command: str, checkpoint: Path, tmp_path: Path) -> None:
    image = tmp_path / "picture.png"
    random_llava.picture(1).save(image)
    if command == "infer":
        words = ["--model-path", str(checkpoint), "--image-file", str(image)]
    else:
        data = tmp_path / "data.jsonl"
        data.write_text(json.dumps({"image": image.name, "question": "how many?"}) + "\n")
        words = [str(checkpoint), "--data", str(data), "--out", str(tmp_path / "new-llava")]
    done = run("-m", "yopo", command, *words, "--device", "cpu")
    assert done.returncode == 2
    told(done.stderr)
    assert not (tmp_path / "new-llava").exists()

"""Converting a checkpoint through the command, for tests: what it made, and how it refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import random_internvl
import transformers
from safetensors.torch import load_file
from torch import Tensor

from yopo.commands.command_line import main

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/tiny_llava/checkpoints"


def convert(source: Path, target: Path, *options: str) -> Path:
    assert main(["convert", str(source), str(target), *options]) == 0
    return target


def loaded(folder: Path) -> Any:
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"]
    return model.float().eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def sums(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def resharded(source: Path, count: int, kind: str) -> Path:
    weights = load_file(source / "model.safetensors")
    random_internvl.save(source, weights, count, kind)
    return source


def refused(source: Path | str, target: Path, message: str, capsys: Any, *options: str) -> None:
    """Exit 2, one line with `message`, and nothing written."""
    assert main(["convert", str(source), str(target), *options]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error, error
    assert not target.exists() and not target.with_name(f"{target.name}.partial").exists()

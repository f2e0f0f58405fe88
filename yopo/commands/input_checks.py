"""Checks of what the user gave that commands have in common, before any heavy work: a checkpoint
folder, an image, a device, masses. Nothing is loaded here; a checkpoint's config is read.
"""

from __future__ import annotations

import os
import re
import sys
import zipfile
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import urlopen

from yopo.errors import BadInput

if TYPE_CHECKING:
    from yopo.prompts.questions import Question

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PATIENCE = 60  # seconds for a server to answer
_MOST_NAMED = 10  # of the entries passed over


def check_model(path: str, called: str) -> None:
    """Raises BadInput where a checkpoint folder is missing, cut off, or LLaVA's without being one
    that LLaVA can load. called: the argument that names it."""
    folder = Path(path)
    if not folder.is_dir():
        if _HUB_ID.fullmatch(path) and not Path(path).parent.exists():
            return  # from_pretrained downloads it
        raise BadInput(f"{called}: there is no folder {path!r} (from {Path.cwd()})")
    from yopo.checkpoint.shards import read_json, weight_files

    config = read_json(folder / "config.json")
    if "mm_vision_tower" in config:
        _check_llava(folder, config, called)
    for file in weight_files(folder):
        _check_weights(file)


def _check_llava(folder: Path, config: dict[str, Any], called: str) -> None:
    # LLaVA's loader chooses by the name; get_model_name_from_path knows Trainer's subfolders.
    name = folder.name if not folder.name.startswith("checkpoint-") else folder.parent.name
    if "llava" not in name.lower():
        raise BadInput(f"{called}: LLaVA loads only folders with 'llava' in their name: {folder}")
    if not any((folder / file).is_file() for file in ("tokenizer.model", "tokenizer.json")):
        raise BadInput(f"{folder} is cut off: it has neither tokenizer.model nor tokenizer.json")
    tower = str(config["mm_vision_tower"])
    hub_tower = tower.startswith(("openai", "laion")) or "ShareGPT4V" in tower  # LLaVA's rule
    if not (hub_tower or Path(tower).exists()):
        raise BadInput(
            f"the vision tower {tower!r} that {folder}/config.json names in mm_vision_tower is not "
            f"there (from {Path.cwd()}): run from the folder that it is relative to"
        )


def _check_weights(file: Path) -> None:
    """Without reading the tensors."""
    if file.suffix == ".safetensors":
        from yopo.checkpoint.shards import Shard

        with Shard(file):
            return
    with file.open("rb") as stream:
        start = stream.read(2)
    if not start or (start == b"PK" and not zipfile.is_zipfile(file)):
        raise BadInput(f"{file} is cut off: download it again")


def local_image(given: str, folder: Path) -> Path:
    """The file of an image, which PIL can read: the path `given`, or what is at the address
    `given`, copied into `folder`. Raises BadInput where there is none."""
    path = Path(given)
    if given.startswith(("http://", "https://")):
        path = folder / "image"
        try:
            with urlopen(given, timeout=_PATIENCE) as stream:
                path.write_bytes(stream.read())
        except (OSError, ValueError, HTTPException) as error:
            raise BadInput(f"--image-file: {given} cannot be fetched: {error}") from error
    if not path.is_file():
        raise BadInput(f"--image-file: there is no file {given!r} (from {Path.cwd()})")
    try:
        from PIL import Image
    except ImportError as error:
        raise BadInput("Pillow is missing, which reads images: pip install pillow") from error
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"--image-file: {given!r} is not an image PIL can read: {error}") from error
    return path


def check_new_folder(out: Path) -> None:
    """Raises BadInput where a folder --out is there already, or cannot be made."""
    if out.exists():
        raise BadInput(f"--out: {out} is there already: take another name, or remove it")
    above = next(folder for folder in out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise BadInput(f"--out: {out} cannot be made: {above} is a file")
    if not os.access(above, os.W_OK):
        raise BadInput(f"--out: {out} cannot be made: {above} is not yours to write to")


def told_questions(file: Path, wanted: int, folder: Path | None) -> list[Question]:
    """As prompts.questions.read_questions; says how many there are and which were passed over."""
    from yopo.prompts.questions import read_questions

    questions, passed_over = read_questions(file, wanted, folder)
    for line in passed_over[:_MOST_NAMED]:
        print(f"passed over: {line}", file=sys.stderr)
    if len(passed_over) > _MOST_NAMED:
        print(f"passed over: {len(passed_over) - _MOST_NAMED} more", file=sys.stderr)
    print(f"{len(questions)} questions, {len(passed_over)} passed over")
    return questions


def device_of(wanted: str) -> str:
    """ "cpu" or "cuda", of "auto" and these."""
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise BadInput("--device cuda: torch sees no GPU here; use --device cpu")
    return "cuda" if wanted == "cuda" or (wanted == "auto" and there) else "cpu"


def check_masses(setting: str) -> None:
    """Raises BadInput unless --mass is HEAD[/CUT]."""
    from yopo.plan.pruning_plan import split_masses

    try:
        split_masses(setting, "--mass")
    except ValueError as error:
        raise BadInput(str(error)) from error

"""A checkpoint in its makers' own format becomes one that transformers' own classes read, its plan
kept: the choice of the format, the check of all names and shapes before anything is written, the
new config.json.

How names and configs translate is in from_llava.py and from_internvl.py, how the weights get from
file to file in weight_stream.py, tokenizers in tokenizer_files.py.
"""

from __future__ import annotations

import re
import shutil
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers

try:
    from huggingface_hub.errors import StrictDataclassError
except ImportError:  # of versions whose configs check no types
    StrictDataclassError = ValueError

from yopo import __version__
from yopo.checkpoint import neuron_order
from yopo.checkpoint.shards import Entry, Shard, read_json
from yopo.convert.common import Conversion, Make
from yopo.convert.weight_stream import Piece, finish, stream
from yopo.errors import BadInput
from yopo.files import write_json
from yopo.versions import has_families

_FORMATS = ("from_llava", "from_internvl")
_QUANTISED_NAMES = re.compile(
    r"\.(SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*"
    r"|qweight|qzeros|scales|g_idx|weight_scale(_inv)?|input_scale)$"
)
# What transformers' configs and models say to values that they cannot take.
_CONFIG_ERRORS = (ValueError, TypeError, KeyError, ArithmeticError, StrictDataclassError)
_SHOWN = 8  # names of an error message, at most


def check_version() -> None:
    """Raises BadInput where transformers is too old."""
    if not has_families():  # before, tokenizers and the names of LLaVA's config were others, too
        raise BadInput(
            f"convert needs transformers 4.45 or newer and found {transformers.__version__}: pip "
            "install 'transformers>=4.45'"
        )


def prepare(source: Path, vision_tower: str | None = None) -> tuple[Conversion, list[Piece]]:
    """How to convert the checkpoint in `source`, and the tensors to write. Nothing is written.
    Raises BadInput where it cannot be converted."""
    try:
        conversion = read(source, vision_tower)
        return conversion, check(conversion)
    except _CONFIG_ERRORS as error:
        raise BadInput(
            f"transformers cannot make a model of {source / 'config.json'}: "
            f"{type(error).__name__}: {error}"
        ) from error


def write(
    conversion: Conversion,
    pieces: list[Piece],
    source: Path,
    target: Path,
    shard_bytes: int,
    named: str,
) -> None:
    """Makes the folder `target` of the checkpoint `source`, which the user `named`; it is called
    partial_of(target) until all is in it, and what an interrupted call left there is gone on with.
    Raises BadInput where it cannot be written."""
    partial = partial_of(target)
    report = {
        "yopo": __version__,
        "transformers": transformers.__version__,
        "source": named,
        "format": conversion.kind,
        "plan": conversion.plan.summary() if conversion.plan else None,
        "notes": conversion.notes,
    }
    try:
        report |= stream(pieces, partial, shard_bytes)
        _write_config(conversion, partial)
        _keep_ffn_order(source, partial)
        conversion.write_rest(partial)
        finish(partial, target, report)
    except OSError as error:
        raise BadInput(
            f"{partial} cannot be written: {error}. Run again, it goes on from there"
        ) from error


def partial_of(target: Path) -> Path:
    """The folder that becomes `target`."""
    return target.with_name(f"{target.name}.partial")


def read(source: Path, vision_tower: str | None = None) -> Conversion:
    """How to convert the checkpoint in `source`. Raises BadInput where it is of no known format."""
    config = read_json(source / "config.json")
    _refuse_quantised_config(source, config)
    formats = [import_module(f"yopo.convert.{name}") for name in _FORMATS]
    for module in formats:
        if module.recognises(config):
            return module.read(source, config, vision_tower)
    if isinstance(config.get("text_config"), dict):
        raise BadInput(f"{source} is in transformers' own format already: load it as it is")
    found = ", ".join(config.get("architectures") or ()) or config.get("model_type") or "no name"
    known = "; ".join(module.CONVERTS for module in formats)
    raise BadInput(f"{source} is no checkpoint that can be converted ({found}). These can: {known}")


def check(conversion: Conversion) -> list[Piece]:
    """The tensors to write, of exactly the names and shapes that the new model has.

    Reads headers only. Raises BadInput naming tensors that are missing, surplus, of a wrong shape
    or quantised.
    """
    pieces: list[Piece] = []
    surplus: list[str] = []
    for files, translate in conversion.weights:
        for file in files:
            with Shard(file) as shard:
                entries = shard.entries()
            for name, entry in entries.items():
                targets = [] if name.endswith("position_ids") else translate(name)
                _refuse_quantised(file, name, entry, targets)
                if targets is None:
                    surplus.append(name)
                for new, make in targets or ():
                    shape = _shape(file, name, entry, make)
                    pieces.append(Piece(new, name, file, make, shape, entry.dtype))
    _compare(pieces, surplus, conversion)
    return pieces


def _refuse_quantised(file: Path, name: str, entry: Entry, targets: object) -> None:
    whole = entry.dtype.is_floating_point and entry.dtype.itemsize > 1
    if _QUANTISED_NAMES.search(name) or not (whole or targets == []):
        raise BadInput(
            f"{file} is quantised, which cannot be converted: it holds {name} ({entry.dtype}); "
            "convert the checkpoint in float16 or bfloat16 that it was made from"
        )


def _shape(file: Path, name: str, entry: Entry, make: Make) -> tuple[int, ...]:
    """Of what `make` makes, without reading it."""
    try:
        return tuple(make(torch.empty(entry.shape, dtype=entry.dtype, device="meta")).shape)
    except (RuntimeError, ValueError) as error:
        raise BadInput(
            f"{name} in {file} has shape {entry.shape}, which does not fit config.json: {error}"
        ) from error


def _compare(pieces: list[Piece], surplus: list[str], conversion: Conversion) -> None:
    with torch.device("meta"):
        model = conversion.model_class(conversion.config)
    wanted = {canonical(name): tuple(value.shape) for name, value in model.state_dict().items()}
    tied = bool(conversion.config.tie_word_embeddings)
    if tied:  # one tensor under two names, of which one is written
        wanted.pop("lm_head.weight", None)
        pieces[:] = [piece for piece in pieces if canonical(piece.name) != "lm_head.weight"]
    made: dict[str, Piece] = {}
    for piece in pieces:
        twin = made.setdefault(canonical(piece.name), piece)
        if twin is not piece:
            raise BadInput(
                f"{piece.source} is there twice, in {twin.file.name} and {piece.file.name}"
            )
    surplus += [made[name].source for name in made if name not in wanted]
    missing = [name for name in wanted if name not in made]
    problems = [
        f"{len(names)} {what}: {_some(names)}"
        for what, names in (
            ("missing, by the names of the new model", missing),
            ("too many", surplus),
        )
        if names
    ]
    if problems:
        raise BadInput(
            f"the tensors are not those of the {conversion.kind} that config.json describes: "
            + "; ".join(problems)
        )
    for name, shape in wanted.items():
        if made[name].shape != shape:
            raise BadInput(
                f"{made[name].source} in {made[name].file} becomes {name} of shape "
                f"{made[name].shape}, but config.json asks for {shape}"
            )


def canonical(name: str) -> str:
    """One name for what transformers called `language_model.model.x`, `language_model.lm_head` and
    `vision_tower.vision_model.x` up to 4.51, `model.language_model.x` … from then on.

    The older names are written: every version reads them.
    """
    name = name.removeprefix("model.")
    for old, new in (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "language_model."),
        ("vision_tower.vision_model.", "vision_tower."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def _refuse_quantised_config(source: Path, config: dict[str, Any]) -> None:
    for holder in (config, config.get("llm_config"), config.get("text_config")):
        block = holder.get("quantization_config") if isinstance(holder, dict) else None
        if block:
            method = block.get("quant_method") or (
                "bitsandbytes" if block.get("load_in_8bit") or block.get("load_in_4bit") else block
            )
            raise BadInput(
                f"{source} is quantised by {method}, which cannot be converted: convert the "
                "checkpoint in float16 or bfloat16 that it was made from"
            )


def _write_config(conversion: Conversion, folder: Path) -> None:
    """config.json in the words of transformers 4, which 5 reads too."""
    content = conversion.config.to_dict()
    text = content["text_config"]
    for new in ("rope_parameters", "rope_theta", "rope_scaling"):
        text.pop(new, None)
    text |= conversion.rope
    content.pop("dtype", None)
    content["torch_dtype"] = conversion.dtype
    content["architectures"] = [conversion.model_class.__name__]
    for part in (content, text, content["vision_config"]):
        part.pop("_name_or_path", None)
    for part in (text, content["vision_config"]):
        part.pop("dtype", None)
        part["torch_dtype"] = conversion.dtype
    if conversion.plan is not None:
        conversion.plan.save_to(content)  # where save_pretrained has it after yopo.apply
        if conversion.plan.sinks is not None:
            conversion.plan.sinks.save(folder)
    write_json(folder / "config.json", content)


def _keep_ffn_order(source: Path, folder: Path) -> None:
    """What says in which order the FFN neurons are (neuron_order.py): they keep it."""
    if (source / neuron_order.FILE).is_file():
        shutil.copyfile(source / neuron_order.FILE, folder / neuron_order.FILE)
    order = read_json(source / "config.json").get("yopo_ffn_order")
    if order is not None:
        file = folder / "config.json"
        write_json(file, read_json(file) | {"yopo_ffn_order": order})


def _some(names: list[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

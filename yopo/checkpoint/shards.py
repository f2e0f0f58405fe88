"""The tensors of a checkpoint folder, one file at a time: which files hold weights, what is in them
(from their headers), one tensor of them. Reads .safetensors and .bin, writes nothing; what the
tensors mean is not known here.
"""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from yopo import files
from yopo.errors import BadInput
from yopo.versions import weights_only_is_safe

_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLE = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Entry:
    """What a file says about one of its tensors before that is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`. Raises BadInput where there is none."""
    if not file.is_file():
        raise BadInput(f"{file.parent} is cut off: it has no {file.name}")
    try:
        return files.read_json(file)
    except ValueError as error:
        raise BadInput(str(error)) from error


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights of `folder`, in the order of their names; safetensors before
    .bin where both are there. Raises BadInput where there are none, or one is missing.
    """
    for index, single in zip(_INDEXES, _SINGLE, strict=True):
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            weight_map = read_json(folder / index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise BadInput(f"{folder / index} has no weight_map")
            names = set(weight_map.values())
            if strange := [n for n in names if not isinstance(n, str) or Path(n).name != n]:
                raise BadInput(f"{folder / index} names {strange[0]!r}, which is no file beside it")
            files = [folder / name for name in sorted(names)]
            missing = [file.name for file in files if not file.is_file()]
            if missing:
                raise BadInput(
                    f"{folder} is cut off: it has no {', '.join(missing)}, which its index names"
                )
            return files
    raise BadInput(f"{folder} has no weights ({', '.join(_SINGLE + _INDEXES)})")


class Shard:
    """An open file of weights. A context manager: what it holds is let go of at the end.

    Tensors come straight from the mapped file, so that only those in use take memory; a .bin file
    of before torch 1.6 cannot be mapped and is held whole.

    Raises BadInput for a file that is cut off, or is not only tensors under names.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._tensors: dict[str, Tensor] = {}
        self._open: Any = None
        if file.suffix == ".safetensors":
            try:
                self._open = safe_open(file, framework="pt").__enter__()
            except (SafetensorError, OSError) as error:
                raise BadInput(f"{file} is cut off or no safetensors file: {error}") from error
        else:
            self._tensors = _load_bin(file)

    def entries(self) -> dict[str, Entry]:
        """Name, shape and dtype of every tensor, sorted by name."""
        if self._open is None:
            pairs = self._tensors.items()
            return {name: Entry(tuple(value.shape), value.dtype) for name, value in sorted(pairs)}
        found = {}
        for name in sorted(self._open.keys()):
            part = self._open.get_slice(name)
            shape = tuple(part.get_shape())
            empty = part[:0] if shape else self._open.get_tensor(name)
            found[name] = Entry(shape, empty.dtype)
        return found

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name] if self._open is None else self._open.get_tensor(name)

    def __enter__(self) -> Shard:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._tensors = {}
        if self._open is not None:
            self._open.__exit__(kind, error, trace)


def _load_bin(file: Path) -> dict[str, Tensor]:
    if not weights_only_is_safe():
        raise BadInput(
            f"{file} is a pickle, and torch {torch.__version__} can be made to run code by one "
            "even with weights_only (CVE-2025-32434): use torch 2.6 or newer, or safetensors"
        )
    how: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    try:
        with file.open("rb") as stream:
            mappable = stream.read(2) == b"PK"
        content = torch.load(file, mmap=mappable, **how)
    except pickle.UnpicklingError as error:
        raise BadInput(
            f"{file} holds more than tensors, or is cut off; such a file may run any code when it "
            f"is read, so it is not: {error}"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise BadInput(f"{file} is cut off or was not written by torch.save: {error}") from error
    tensors = isinstance(content, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in content.items()
    )
    if not tensors:
        raise BadInput(f"{file} is no state dict: it must hold tensors under names, no more")
    return content

"""Sinks: one predicted logit that stands for the visual keys of a blind head in the softmax of a
text query, and their file. Tensors and their checks; nothing of models, inputs or how they are
fitted (calibration/sink_fit.py), nor of what the engine makes of them.

In a plan's block sinks without `b` stand as numbers; with it they are in a safetensors file beside
the config, which the block names with a checksum. A block in memory has them with it: a config that
is copied there needs no file, one that is read from a file is held against the file beside it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from huggingface_hub import hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from yopo.files import write_whole
from yopo.plan.value_checks import as_numbers, integer

FILE = "yopo_sinks.safetensors"  # in a checkpoint's folder
REMEDY = "fit them: python -m yopo sinks CHECKPOINT --data FILE, or yopo.fit_sinks(model, samples)"
MOST = 1e4  # of a logit: beyond it no share changes, and half precision has no such products
_CHECKSUM = re.compile("sha256:[0-9a-f]{64}")


@dataclass(frozen=True, eq=False)
class Sinks:
    """The logit s = a + b·q of a head's text query q, before its rotation; N visual tokens before
    the query add log(N / tokens) to it.

    a: (L, H) float32. b: (L, H, D) float32; None: 0. tokens: how many visual tokens the logit
    stands for; None: for any number, nothing is added.

    Raises ValueError naming the field, its value and what is allowed.
    """

    a: Tensor
    b: Tensor | None = None
    tokens: int | None = 1

    def __post_init__(self) -> None:
        a = as_numbers("sinks.a", self.a, 2)
        object.__setattr__(self, "a", a)
        beyond = (a.abs() > MOST).nonzero().tolist()
        if beyond:
            at = beyond[0]
            raise ValueError(f"sinks.a{at} is {float(a[tuple(at)]):g}; allowed: -1e4 to 1e4")
        if self.b is not None:
            b = as_numbers("sinks.b", self.b, 3)
            if b.shape[:2] != a.shape or b.shape[2] == 0:
                raise ValueError(
                    f"sinks.b has shape {tuple(b.shape)}; allowed: sinks.a's, {tuple(a.shape)}, "
                    "and the size of a head"
                )
            object.__setattr__(self, "b", b)
        if self.tokens is not None:
            object.__setattr__(self, "tokens", integer("sinks.tokens", self.tokens, 1, None))

    @cached_property
    def checksum(self) -> str:
        """Of all three: "sha256:" and 64 digits."""
        digest = hashlib.sha256(repr((tuple(self.a.shape), self.tokens)).encode())
        for tensor in (self.a, self.b):
            digest.update(b"none" if tensor is None else tensor.numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sinks) and self.checksum == other.checksum

    def __hash__(self) -> int:
        return hash(self.checksum)

    def to_block(self, file: str = FILE) -> dict[str, Any]:
        """What the block of a plan says of them, `file` being where they are saved."""
        if self.b is None:
            return {"tokens": self.tokens, "a": self.a.tolist()}
        named = _Named(tokens=self.tokens, file=file, checksum=self.checksum)
        named.sinks = _ALIVE.setdefault(self.checksum, self)
        return named

    def save(self, folder: Path, name: str = FILE) -> None:
        """Writes the file that the block names, whole or not at all; none without `b`."""
        if self.b is not None:
            with write_whole(folder / name) as partial:  # not save_file: for others to read, too
                partial.write_bytes(save({"a": self.a, "b": self.b}, {"format": "pt"}))


def sinks_beside(plan_file: str) -> str:
    """The name of the file of sinks beside a plan file of that name."""
    return f"{plan_file}.sinks.safetensors"


class _Named(dict[str, Any]):
    """What a block in memory says of `sinks`, and these. As JSON, what it says alone."""

    sinks: Sinks


# Those that a block was made of, for configs as JSON of which nothing says where they are from.
_ALIVE: WeakValueDictionary[str, Sinks] = WeakValueDictionary()
_WHERE: ContextVar[Mapping[str, Any] | None] = ContextVar("yopo_where_sinks_are", default=None)
_UNREAD: ContextVar[bool] = ContextVar("yopo_unread_sinks", default=False)


@contextmanager
def looked_for(arguments: Mapping[str, Any]) -> Iterator[None]:
    """Within it files of sinks are where from_pretrained finds others by these `arguments`."""
    names = ("subfolder", "cache_dir", "token", "local_files_only")
    token = _WHERE.set({name: arguments[name] for name in names if arguments.get(name) is not None})
    try:
        yield
    finally:
        _WHERE.reset(token)


@contextmanager
def unread() -> Iterator[None]:
    """Within it the sinks of a block may be damaged, missing or null: 0 stands in their place. For
    a checkpoint that is to get others."""
    token = _UNREAD.set(True)
    try:
        yield
    finally:
        _UNREAD.reset(token)


def named(block: object) -> bool:
    """Whether the `sinks` of a plan's block are in a file."""
    return isinstance(block, dict) and "file" in block


def from_block(
    block: dict[str, Any],
    shape: tuple[int, int],
    checkpoint: str | None,
    revision: str | None = None,
) -> Sinks | None:
    """The sinks that the `block` of a plan of (layers, heads) names, which has them with it from
    now on; `checkpoint`: the folder or Hub repository that has their file. Raises ValueError for
    what cannot be, FileNotFoundError where the file is not; both say what to do."""
    if _UNREAD.get():
        return Sinks(torch.zeros(shape, device="cpu"))
    if block["sinks"] is None:
        return None
    try:
        sinks = _read(block["sinks"], checkpoint, revision)
    except ValueError as error:
        raise ValueError(f"{error}. To put it right, {REMEDY}") from error
    if sinks.b is not None:
        block["sinks"] = sinks.to_block(block["sinks"]["file"])
    return sinks


def _read(block: object, checkpoint: str | None, revision: str | None) -> Sinks:
    keys = set(block) if isinstance(block, dict) else set()
    if not isinstance(block, dict) or keys not in ({"tokens", "a"}, {"tokens", "file", "checksum"}):
        raise ValueError(
            f"sinks is {block!r:.80}; allowed: null, or an object with tokens and a, or with "
            "tokens, file and checksum"
        )
    if "a" in keys:
        return Sinks(block["a"], None, block["tokens"])
    name, checksum = block["file"], block["checksum"]
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
        raise ValueError(f"sinks.file is {name!r}; allowed: the name of a .safetensors file")
    if not isinstance(checksum, str) or not _CHECKSUM.fullmatch(checksum):
        raise ValueError(f"sinks.checksum is {checksum!r}; allowed: 'sha256:' and 64 hex digits")
    known = getattr(block, "sinks", None if checkpoint else _ALIVE.get(checksum))
    if known is not None and (known.checksum, known.tokens) == (checksum, block["tokens"]):
        return known
    path = _find(name, checkpoint, revision)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file, perhaps cut off: {error}") from error
    if set(tensors) != {"a", "b"}:
        raise ValueError(f"{path} holds {sorted(tensors)}; the sinks of a plan are a and b")
    try:
        sinks = Sinks(tensors["a"], tensors["b"], block["tokens"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if sinks.checksum != checksum:
        raise ValueError(
            f"{path} is not the file that the plan was saved with: its checksum is "
            f"{sinks.checksum}, the plan names {checksum!r}; take the one that came with this plan"
        )
    return sinks


def _find(name: str, checkpoint: str | None, revision: str | None) -> Path:
    """The file in the folder `checkpoint`, or of that Hub repository."""
    where, folder = _WHERE.get() or {}, Path(checkpoint or ".").expanduser()
    path = folder / where.get("subfolder", "") / name
    if path.is_file():
        return path
    why = ""
    if checkpoint and not folder.is_dir():
        try:
            return Path(hf_hub_download(checkpoint, name, revision=revision, **where))
        except (OSError, ValueError) as error:  # hub errors are OSErrors, of bad names ValueErrors
            why = f" ({error})"
    raise FileNotFoundError(
        f"the sinks of the plan are to be in {path}, which is not there{why}: copy it from where "
        f"the config came from, or {REMEDY}"
    )

"""Weights from file to file: each tensor read, made into its new form, written, read back. At most
one file's worth of tensors is held. Interrupted work is kept in DST.partial and gone on with.

Knows nothing of models, and of names only what a `Piece` says.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from yopo.checkpoint.shards import Shard
from yopo.errors import BadInput
from yopo.files import read_json, write_json

Make = Callable[[Tensor], Tensor]

_PROGRESS = "progress.json"
REPORT = "conversion.json"


@dataclass(frozen=True)
class Piece:
    """One tensor of the new checkpoint: `make` of the tensor `source` in `file`."""

    name: str
    source: str
    file: Path
    make: Make
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """In bytes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def stream(pieces: list[Piece], partial: Path, limit: int) -> dict[str, Any]:
    """Writes the pieces as safetensors files of at most `limit` bytes (one tensor may exceed it)
    into the folder `partial`, and their index. Returns the checksums, for the report.

    Files that an earlier, interrupted call finished are kept if their checksum holds. Raises
    BadInput where `partial` holds another conversion or the disk is too small.
    """
    shards = list(_shards(pieces, limit))
    job = _fingerprint(shards)
    done = _resume(partial, job)
    total = sum(piece.size for piece in pieces)
    left = total - sum(entry["bytes"] for entry in done["files"].values())
    free = shutil.disk_usage(partial.parent).free
    if left > free:
        raise BadInput(f"{partial.parent} has {free:,} bytes free, {left:,} are needed")
    bar = tqdm(total=total, unit="B", unit_scale=True, desc="convert", disable=None)
    with bar:
        for number, shard in enumerate(shards, 1):
            name = _shard_name(number, len(shards))
            if name not in done["files"]:
                done["tensors"] |= _write_shard(shard, partial / name, bar.update)
                done["files"][name] = _checksum(partial / name)
            else:
                bar.update(sum(piece.size for piece in shard))
            source = str(shard[0].file)
            last = number == len(shards) or shards[number][0].file != shard[0].file
            if last and source not in done["sources"]:
                done["sources"][source] = _checksum(shard[0].file)
            write_json(partial / _PROGRESS, done)
    if len(shards) > 1:
        weight_map = {
            piece.name: _shard_name(number, len(shards))
            for number, shard in enumerate(shards, 1)
            for piece in shard
        }
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(partial / "model.safetensors.index.json", index)
    return {"sources": done["sources"], "tensors": done["tensors"]}


def finish(partial: Path, target: Path, report: dict[str, Any]) -> None:
    """Adds the report, with the checksum of every file, and gives the folder its name. Interrupted
    at any point, it can be called again, or is done."""
    ours = (_PROGRESS, REPORT)
    files = sorted(p for p in partial.rglob("*") if p.is_file() and p.name not in ours)
    sums = {str(file.relative_to(partial)): _checksum(file) for file in files}
    write_json(partial / REPORT, {**report, "files": sums})
    try:
        partial.rename(target)
    except OSError as error:
        raise BadInput(f"DST {target} appeared meanwhile; what was made is {partial}") from error
    (target / _PROGRESS).unlink()


def _shards(pieces: list[Piece], limit: int) -> Iterator[list[Piece]]:
    """The pieces in the order of their files, cut where `limit` bytes are full or a file ends."""
    shard: list[Piece] = []
    for piece in pieces:
        full = sum(other.size for other in shard) + piece.size > limit
        if shard and (full or piece.file != shard[0].file):
            yield shard
            shard = []
        shard.append(piece)
    if shard:
        yield shard


def _write_shard(
    shard: list[Piece], file: Path, progress: Callable[[int], Any]
) -> dict[str, dict[str, Any]]:
    """Writes one file, all or nothing, and reads it back. Returns what the report says of each
    tensor; raises OSError where the disk gives back something else than was written."""
    draft = file.with_name(f"unchecked-{file.name}")
    told = {}
    with Shard(shard[0].file) as source:
        made = {}
        for piece in shard:
            made[piece.name] = piece.make(source.tensor(piece.source)).contiguous()
            progress(piece.size)
        save_file(made, draft, metadata={"format": "pt"})
        with Shard(draft) as written:
            for piece in shard:
                tensor = written.tensor(piece.name)
                if not torch.equal(_bytes(tensor), _bytes(made[piece.name])):
                    raise OSError(f"{file}: {piece.name} was not written as it is; try again")
                told[piece.name] = {
                    "from": piece.source,
                    "file": piece.file.name,
                    "shape": list(piece.shape),
                    "dtype": str(piece.dtype).removeprefix("torch."),
                    "sha256": hashlib.sha256(_bytes(tensor).numpy()).hexdigest(),
                }
    os.replace(draft, file)
    return told


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _resume(partial: Path, job: str) -> dict[str, Any]:
    """What `partial` has of this job already; an empty folder where it has nothing."""
    fresh: dict[str, Any] = {"job": job, "files": {}, "sources": {}, "tensors": {}}
    if partial.exists() and not partial.is_dir():
        raise BadInput(f"{partial} is in the way, a file: remove it")
    partial.mkdir(parents=True, exist_ok=True)
    file = partial / _PROGRESS
    if not file.is_file():
        if any(partial.iterdir()):
            raise BadInput(f"{partial} holds something else than a conversion; remove it")
        write_json(file, fresh)
        return fresh
    try:
        done = read_json(file)
    except ValueError as error:
        raise BadInput(f"{file} is corrupt: remove {partial} to begin anew") from error
    if done.get("job") != job:
        raise BadInput(
            f"{partial} is an unfinished conversion of something else, or the source has changed "
            "since: remove it to begin anew"
        )
    for name, entry in list(done["files"].items()):
        if not (partial / name).is_file() or _checksum(partial / name) != entry:
            del done["files"][name]
    for path in partial.iterdir():
        if path.name != _PROGRESS and path.name not in done["files"]:
            if path.is_dir():
                raise BadInput(f"{partial} holds something else than a conversion; remove it")
            path.unlink()
    return done


def _fingerprint(shards: list[list[Piece]]) -> str:
    """Changes with what is to be written and with the source's files."""
    content = [
        [piece.name, piece.source, piece.shape, str(piece.dtype)]
        for shard in shards
        for piece in shard
    ]
    files = sorted({piece.file for shard in shards for piece in shard})
    stats = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    text = json.dumps([content, stats, [len(shard) for shard in shards]])
    return hashlib.sha256(text.encode()).hexdigest()


def _shard_name(number: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"


def _checksum(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 22):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}

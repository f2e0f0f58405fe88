"""Packed rows: the tokens of one kind (text, or visual) of a batch as one 2-D tensor without
padding, and back.

Index arithmetic only. Attention alone needs the batch dimension; to give it, and to take it, is a
view where every row of the batch has equally many tokens of the kind, and one gather otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(x: T, device: torch.device) -> T:
    """`x` with every tensor in it moved: a tensor, a tuple, a dataclass of these, or anything else
    as it is.
    """
    # Towards the CPU, a copy that is not waited for could be read before it is there.
    return mapped(x, lambda each: each.to(device, non_blocking=device.type != "cpu"))


def mapped(x: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """`x` with `function` of every tensor in it in its place; see `to_device`."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, tuple):
        return tuple(mapped(part, function) for part in x)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: mapped(getattr(x, f.name), function) for f in fields(x)})
    return x


@dataclass(frozen=True)
class Packing:
    """The N tokens of one kind in a batch of `batch` rows; W is the most that one row has.

    rows: (N,) int64, positions in the flattened (B·n) batch, in order.
    order: (B, W) int64, place of each padded slot's token in its row's whole sequence; -1 in empty
    slots.
    gather: (B·W,) packed index of each padded slot (0 in empty ones); None where no slot is empty.
    scatter: (N,) padded slot of each packed row; None with `gather`.
    """

    batch: int
    width: int
    rows: Tensor
    order: Tensor
    gather: Tensor | None
    scatter: Tensor | None

    @classmethod
    def all_of(cls, batch: int, n: int, past: int, device: torch.device | str = "cpu") -> Packing:
        """Of all tokens of `batch` rows, `n` of each, the first at `past` in its sequence."""
        order = torch.arange(past, past + n, device=device).expand(batch, -1)
        rows = torch.arange(batch * n, device=device)
        return cls(batch, n if batch else 0, rows, order, None, None)

    @classmethod
    def build(cls, chosen: Tensor, past: int, width: int | None = None) -> Packing:
        """Packs the tokens where `chosen` (B, n) bool; the first column is position `past` of the
        sequence. `width`: gives each row so many slots, the empty ones as rows that stand for no
        token (B·n in `rows`).
        """
        batch, n = chosen.shape
        if width in (None, n) and bool(chosen.all()):
            return cls.all_of(batch, n, past)
        counts = chosen.sum(1)
        full = width is not None
        width = width if width is not None else int(counts.max()) if batch else 0
        rows = chosen.flatten().nonzero().flatten()
        row, column = rows // max(n, 1), rows % max(n, 1)
        rank = (chosen.long().cumsum(1) - 1).flatten()[rows]
        slot = row * width + rank
        order = torch.full((batch * width,), -1, dtype=torch.int64, device=chosen.device)
        order[slot] = column + past
        gather = scatter = None
        if full:
            every = torch.full((batch * width,), batch * n, device=chosen.device)
            every[slot] = rows
            return cls(batch, width, every, order.view(batch, width), None, None)
        if len(rows) != batch * width:
            gather = torch.zeros(batch * width, dtype=torch.int64, device=chosen.device)
            gather[slot] = torch.arange(len(rows), device=chosen.device)
            scatter = slot
        return cls(batch, width, rows, order.view(batch, width), gather, scatter)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def spread(self, x: Tensor) -> Tensor:
        """(N, …) packed to (B, W, …); empty slots repeat some packed row, to be masked."""
        if self.gather is not None:
            x = x[self.gather]
        return x.view(self.batch, self.width, *x.shape[1:])

    def gathered(self, x: Tensor) -> Tensor:
        """(B, W, …) to packed (N, …)."""
        x = x.flatten(0, 1)
        return x if self.scatter is None else x[self.scatter]

    def pad(self, x: Tensor) -> Tensor:
        """(N, H, D) packed to (B, H, W, D)."""
        if self.width == 1 and self.gather is None:
            return x.unsqueeze(2)
        return self.spread(x).transpose(1, 2)

    def unpad(self, x: Tensor) -> Tensor:
        """(B, H, W, D) to packed (N, H, D)."""
        if self.width == 1 and self.scatter is None:
            return x.squeeze(2)
        return self.gathered(x.transpose(1, 2))

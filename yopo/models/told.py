"""What is told of the visual tokens of one forward by what is called around the decoder: the masks
that a user gives a causal LM, the layout that a composite works out of its images. Forgotten at the
end of that forward; thread- and task-local."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from yopo.engine.layout import Grid, VisualLayout


@dataclass
class Call:
    """What is known of the visual tokens of the call in progress.

    layout: of the rows of this forward, by a composite; None: it is known that there is no image.
    visual_mask, grids: the user's arguments, describing the same; they come before `layout`.
    taken: whether a decoder under a plan was reached.
    """

    layout: VisualLayout | None = None
    visual_mask: Tensor | None = None
    grids: Sequence[Sequence[Grid]] | None = None
    taken: bool = False


CALL: ContextVar[Call | None] = ContextVar("yopo_call", default=None)


def told(visual_mask: Tensor | None, visual_grids: Sequence[Sequence[Grid]] | None) -> Call:
    """What a user's arguments say. Raises ValueError where they are not of the right kind."""
    if visual_mask is None:
        raise ValueError("visual_grids is given without visual_mask; pass both")
    if not isinstance(visual_mask, Tensor) or visual_mask.is_floating_point():
        kind = getattr(visual_mask, "dtype", type(visual_mask).__name__)
        raise ValueError(f"visual_mask is of {kind}; it must be a bool tensor (batch, tokens)")
    if visual_mask.dtype != torch.bool and bool((visual_mask & ~1).any()):
        value = int(visual_mask[(visual_mask & ~1) != 0][0])
        raise ValueError(f"visual_mask holds the value {value}; allowed: 0, 1 (or bool)")
    for row in visual_grids or ():
        if not all(isinstance(grid, Sequence) and len(grid) == 2 for grid in row):
            raise ValueError(
                f"visual_grids has {row!r} for a row; give each row of the batch a list of its "
                "images' (rows, cols): [[(24, 24)], [(24, 24), (12, 16)], …]"
            )
    return Call(visual_mask=visual_mask, grids=visual_grids)


@contextmanager
def during(known: Call) -> Iterator[Call]:
    """Opens a call; what is known of it is forgotten at its end. Thread- and task-local."""
    token = CALL.set(known)
    try:
        yield known
    finally:
        CALL.reset(token)


def call(layout: VisualLayout | None = None) -> AbstractContextManager[Call]:
    """Opens a call of rows with this layout; None: without an image."""
    return during(Call(layout))

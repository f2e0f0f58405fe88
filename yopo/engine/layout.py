"""Where the visual tokens of a batch are, and each one's place on its grid. Index arithmetic on the
CPU only: no model, no weights, no attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Grid = tuple[int, int]

RELEASED_GRID: Grid = (24, 24)  # what the released code hard-codes; used by `from_released` alone


@dataclass(frozen=True)
class VisualLayout:
    """The visual tokens of a batch of B rows, n columns wide. All tensors lie on the CPU.

    visual: (B, n) bool, True at visual tokens.
    image: (B, n) int64, which grid of its row a visual token belongs to; -1 elsewhere.
    row, col: (B, n) int64, its place on that grid; -1 elsewhere.
    grids: per batch row the (rows, cols) of each grid, `grids[b][image[b, j]]`.
    """

    visual: Tensor
    image: Tensor
    row: Tensor
    col: Tensor
    grids: tuple[tuple[Grid, ...], ...]

    @property
    def shape(self) -> tuple[int, int]:
        return self.visual.shape[0], self.visual.shape[1]

    @classmethod
    def empty(cls, batch: int, width: int = 0) -> VisualLayout:
        """A layout without visual tokens."""
        nowhere = torch.full((batch, width), -1, dtype=torch.int64, device="cpu")
        visual = torch.zeros(batch, width, dtype=torch.bool, device="cpu")
        return cls(visual, nowhere, nowhere, nowhere, ((),) * batch)

    @classmethod
    def from_mask(
        cls,
        visual_mask: Tensor,
        grids: Sequence[Sequence[Grid]] | None = None,
        before: VisualLayout | None = None,
    ) -> VisualLayout:
        """Layout of the columns that `visual_mask` (B, n) describes.

        Without `grids` each run of visual tokens is one square grid. With them, `grids[b]` lists
        (rows, cols), and the visual tokens of row b fill these one after the other (text, such as
        newline tokens, may lie between); only the last may be left incomplete, as a truncated image
        is. `before` is the layout of what is cached already: an image incomplete at its very end
        goes on if the first column here is visual.

        Raises ValueError: a run that is no square where no grids are given; grids that do not fit
        the tokens.
        """
        if visual_mask.dim() != 2:
            raise ValueError(
                f"visual_mask must be (batch, tokens), got shape {tuple(visual_mask.shape)}"
            )
        visual = visual_mask.detach().to("cpu", torch.bool)
        batch, width = visual.shape
        if grids is not None and len(grids) != batch:
            raise ValueError(
                f"visual_grids lists grids for {len(grids)} rows, but visual_mask has {batch}: "
                "give one list of (rows, cols) for each row of the batch"
            )
        known = before.grids if before is not None else ((),) * batch
        nowhere = torch.full((batch, width), -1, dtype=torch.int64, device="cpu")
        image, row, col = nowhere, nowhere.clone(), nowhere.clone()
        all_grids = []
        for b in range(batch):
            columns = visual[b].nonzero().flatten()
            lacking = 0
            if before is not None and width > 0 and bool(visual[b, 0]):
                lacking = before._open_cells(b)
            open_cells = min(lacking, len(columns))
            row_grids = list(known[b])
            pieces: list[tuple[int, int, int]] = []  # (image, first cell, cells)
            if open_cells:
                rows, cols = row_grids[-1]
                pieces.append((len(row_grids) - 1, rows * cols - lacking, open_cells))
            rest = columns[open_cells:]
            new = _square_runs(rest, b) if grids is None else _fill_grids(len(rest), grids[b], b)
            for grid, cells in new:
                row_grids.append(grid)
                pieces.append((len(row_grids) - 1, 0, cells))
            at = 0
            for index, first, cells in pieces:
                cell = torch.arange(first, first + cells, device="cpu")
                here = columns[at : at + cells]
                image[b, here] = index
                row[b, here] = cell // row_grids[index][1]
                col[b, here] = cell % row_grids[index][1]
                at += cells
            all_grids.append(tuple(row_grids))
        return cls(visual, image, row, col, tuple(all_grids))

    @classmethod
    def from_released(cls, valid: Tensor, sprompt_len: int) -> VisualLayout:
        """The released code's assumption: after `sprompt_len` tokens of a row stand the tokens of
        one 24 × 24 image.

        `valid` (B, n) bool: False at padding. A row too short for that has no image.
        """
        cells = RELEASED_GRID[0] * RELEASED_GRID[1]
        valid = valid.to("cpu", torch.bool)
        rank = valid.long().cumsum(1) - 1
        long_enough = valid.sum(1, keepdim=True) >= sprompt_len + cells
        visual = valid & (rank >= sprompt_len) & (rank < sprompt_len + cells) & long_enough
        return cls.from_mask(
            visual, [[RELEASED_GRID] if any_ else [] for any_ in visual.any(1).tolist()]
        )

    def _open_cells(self, b: int) -> int:
        """Cells that the last image of row b still lacks, if the row's columns end inside it; else
        0.
        """
        if self.visual.shape[1] == 0 or not self.visual[b, -1]:
            return 0
        rows, cols = self.grids[b][-1]
        return rows * cols - 1 - int(self.row[b, -1] * cols + self.col[b, -1])

    def is_whole(self, b: int) -> bool:
        """Whether the last image of row b, if there is one, has all its cells."""
        if not self.grids[b]:
            return True
        rows, cols = self.grids[b][-1]
        return int((self.image[b] == len(self.grids[b]) - 1).sum()) == rows * cols

    def columns(self, start: int, stop: int) -> VisualLayout:
        """The layout of columns start … stop−1; past the end is text."""
        width = self.visual.shape[1]
        taken = [x[:, start:stop] for x in (self.visual, self.image, self.row, self.col)]
        missing = (stop - start) - max(0, min(stop, width) - start)
        if missing > 0:
            tail = VisualLayout.empty(self.visual.shape[0], missing)
            tails = (tail.visual, tail.image, tail.row, tail.col)
            taken = [torch.cat(pair, dim=1) for pair in zip(taken, tails, strict=True)]
        visual, image, row, col = taken
        return VisualLayout(visual, image, row, col, self.grids)

    def first(self, width: int) -> VisualLayout:
        """The first columns, with the grids of the images in them."""
        left = self.columns(0, width)
        counts = left.image.amax(1).add(1).tolist() if width else [0] * len(self.grids)
        grids = tuple(row[:count] for row, count in zip(self.grids, counts, strict=True))
        return VisualLayout(left.visual, left.image, left.row, left.col, grids)

    def cuts_an_image(self, whole: VisualLayout) -> bool:
        """Whether this, the first columns of `whole`, ends within an image: of its last one there
        is more in the others."""
        rest = whole.image[:, self.shape[1] :]
        last = torch.tensor([[len(grids) - 1] for grids in self.grids], device="cpu")
        return bool(((rest == last) & (last >= 0)).any())

    @classmethod
    def joined(cls, layouts: Sequence[VisualLayout]) -> VisualLayout:
        """Layouts one after the other, the grids of each of which go on from those before."""
        visual, image, row, col = (
            torch.cat([getattr(layout, f) for layout in layouts], dim=1)
            for f in ("visual", "image", "row", "col")
        )
        return cls(visual, image, row, col, layouts[-1].grids)

    def after(self, before: VisualLayout) -> VisualLayout:
        """This layout renumbered so that its images come after those of `before`."""
        counts = torch.tensor([[len(grids)] for grids in before.grids], device="cpu")
        image = torch.where(self.visual, self.image + counts, self.image)
        grids = tuple(a + b for a, b in zip(before.grids, self.grids, strict=True))
        return VisualLayout(self.visual, image, self.row, self.col, grids)

    def rows(self, index: Tensor) -> VisualLayout:
        """The layout of the batch rows `index` (K,), in that order."""
        index = index.to("cpu")
        visual, image, row, col = (x[index] for x in (self.visual, self.image, self.row, self.col))
        return VisualLayout(visual, image, row, col, tuple(self.grids[i] for i in index.tolist()))

    def repeat_interleave(self, repeats: int) -> VisualLayout:
        """Each batch row `repeats` times in a row, as generate() does for beams and several return
        sequences.
        """
        rows = torch.arange(self.visual.shape[0], device="cpu")
        return self.rows(rows.repeat_interleave(repeats))


def _square_runs(columns: Tensor, b: int) -> list[tuple[Grid, int]]:
    """Grids and cell counts of the runs of consecutive `columns`, each of which must be a
    square.
    """
    if len(columns) == 0:
        return []
    cuts = ((columns[1:] - columns[:-1]) != 1).nonzero().flatten() + 1
    runs = []
    for run in torch.tensor_split(columns, cuts):
        side = math.isqrt(len(run))
        if side * side != len(run):
            raise ValueError(
                f"visual_mask: the run of {len(run)} visual tokens at column {int(run[0])} of row "
                f"{b} is no square grid, and no grid is given: pass visual_grids=[[(rows, cols), "
                "…], …] (one list for each row of the batch; a truncated image keeps its grid)"
            )
        runs.append(((side, side), len(run)))
    return runs


def _fill_grids(tokens: int, grids: Sequence[Grid], b: int) -> list[tuple[Grid, int]]:
    """Cell counts with which `tokens` visual tokens fill `grids` in turn; the last may stay
    incomplete.
    """
    filled: list[tuple[Grid, int]] = []
    left = tokens
    for rows, cols in grids:
        if rows < 1 or cols < 1:
            raise ValueError(
                f"visual_grids: row {b} names the grid {(rows, cols)}; allowed: 1 row and column up"
            )
        if left <= 0:
            raise ValueError(
                f"visual_grids: row {b} names {len(grids)} grids, but its {tokens} visual tokens "
                f"fill only {len(filled)}: name the grids that the row has"
            )
        cells = min(left, rows * cols)
        filled.append(((int(rows), int(cols)), cells))
        left -= cells
    if left:
        raise ValueError(
            f"visual_grids: row {b} has {tokens} visual tokens, {left} more than its grids "
            f"{list(grids)} hold: name every grid of the row"
        )
    return filled

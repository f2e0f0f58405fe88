"""What is known of embeddings: their layout travels with them, not with the moment they were made.

`remember` notes where the visual tokens of embeddings are, `recall` finds it again by what is in
them: for the tensor itself, for what generate() and others make of it (copies, casts, beams, some
of the rows, several batches in one, slices, chunks), and never for a tensor that has got other
contents since. Comparisons only; how a layout comes about is the business of those who remember it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count
from math import inf
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from yopo.engine.layout import VisualLayout
from yopo.versions import is_traced

FEATURES = 4  # kept of each position, by which it is known again
MOST_PROMPTS, MOST_POSITIONS = 256, 2**20  # kept of each kind, some 16 to 40 bytes a position


def remember(embeds: Tensor, layout: VisualLayout) -> None:
    """Notes the `layout` of embeddings (B, n, d); one without visual tokens says they are text."""
    if embeds.dim() != 3 or is_traced():
        return
    visual = bool(layout.visual.any())
    prompts = _Prompts.of(embeds, layout)
    if visual:  # for as long as there is the tensor, however many come after it
        _BY_OBJECT[embeds] = prompts
    if prompts.sample is not None:
        (_SHOWN if visual else _TEXT).add(prompts)


def recall(embeds: Tensor, before: VisualLayout, text: Sequence[int] = ()) -> VisualLayout | None:
    """The layout of the columns of `embeds` (B, n, d), which come after cached ones with the layout
    `before`; None where nothing is known of some row. The rows `text` are known to be text.

    Columns that go on from what is cached keep the numbers of their prompt's images; those of
    another prompt are numbered after them.
    """
    (batch, n), past = embeds.shape[:2], before.shape[1]
    if before.shape[0] != batch:
        return None
    own, asked = _BY_OBJECT.get(embeds), None
    if _is_plain(embeds):
        asked = _sample(embeds).cpu()
    if own is not None and (own.unchanged(embeds) if asked is None else own.are(asked)):
        return own.layout.after(before)
    if asked is None:
        return None
    found = {b: VisualLayout.empty(1, n).after(before.rows(_index(b))) for b in text}
    everything = [*_SHOWN.kept(), *_TEXT.kept()]
    for prompts in sorted(everything, key=lambda prompts: prompts.used, reverse=True):
        rows = [b for b in range(batch) if b not in found]
        if not rows:
            break
        if past == 0 and prompts.are(asked):
            prompts.used = next(_CLOCK)
            return prompts.layout
        pieces = prompts.find(asked, rows, past, before)
        found |= pieces
        if pieces:
            prompts.used = next(_CLOCK)
    return _stacked([found[b] for b in range(batch)]) if len(found) == batch else None


def tokens_in(embeds: Tensor, embedding: nn.Module) -> list[int]:
    """Which rows of a single column (B, 1, d) are what `embedding` makes of a token: text."""
    if not _is_plain(embeds):
        return []
    asked = embeds.detach()[:, 0]
    if _is_table(embedding):
        table = embedding.weight.detach()
    else:
        made = [one.flatten(0, 1) for one in list(_SINGLE) if one.shape[2] == embeds.shape[2]]
        table = torch.cat([asked[:0], *(one.to(asked) for one in made)])
    return _rows_among(asked, table)


def _rows_among(asked: Tensor, table: Tensor) -> list[int]:
    """Which of `asked` (B, d) are rows of `table` (N, d), by the first feature before the rest."""
    rows, places = (asked[:, :1] == table[:, 0].to(asked)).nonzero().unbind(1)
    same = (table[places.to(table.device)].to(asked) == asked[rows]).all(1)
    return sorted(set(rows[same].tolist()))


def visual_in(embeds: Tensor) -> list[int]:
    """Which rows of a single column (B, 1, d) are a visual token of something remembered."""
    visual = _SHOWN.visual()
    if not len(visual) or not _is_plain(embeds):
        return []
    return _rows_among(_sample(embeds).cpu()[:, 0], visual)


def watch_text(embedding: nn.Module) -> None:
    """Has what `embedding` makes of token ids remembered as text, if it is not so already."""
    if _remember_text not in embedding._forward_hooks.values():
        embedding.register_forward_hook(_remember_text)


def unwatch_text(embedding: nn.Module) -> None:
    for module in embedding.modules():  # an adapter may have been put around the watched one
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if hook is _remember_text]:
            del hooks[key]


def _remember_text(module: nn.Module, arguments: Any, embeds: Any) -> None:
    if not isinstance(embeds, Tensor) or embeds.dim() != 3:
        return
    if embeds.shape[1] > 1:
        remember(embeds, VisualLayout.empty(*embeds.shape[:2]))
    elif not _is_table(module) and _is_plain(embeds) and not is_traced():
        _SINGLE.append(embeds.detach().clone())


def _is_table(embedding: nn.Module) -> bool:
    """Whether what it makes of a token is a row of its weight: not scaled, adapted or elsewhere."""
    weight = getattr(embedding, "weight", None)
    own = type(embedding).forward is nn.Embedding.forward and "forward" not in vars(embedding)
    return own and _is_plain(weight) and weight.dim() == 2 and weight.shape[0] > 0


def _is_plain(embeds: Any) -> bool:
    """Whether it has values of its own to compare: not sharded, traced or on no device."""
    return type(embeds) in (Tensor, nn.Parameter) and not embeds.is_meta


def _sample(embeds: Tensor) -> Tensor:
    """(B, n, FEATURES): enough of every position to know it by; NaN made equal to itself."""
    apart = max(1, embeds.shape[2] // FEATURES)
    return embeds.detach()[:, :, ::apart][:, :, :FEATURES].nan_to_num(-1.0, inf, -inf)


@dataclass(eq=False)
class _Prompts:
    """Embeddings of some rows, as far as they are needed to know them again, and their layout.

    sample: (B, n, FEATURES); None for embeddings that have no values here to compare (sharded),
    which are then known as long as nobody counts a change in place (`version`).
    """

    sample: Tensor | Any
    layout: VisualLayout
    version: int | None
    made: Any  # a CUDA event after which the sample is there: another stream may ask for it
    used: int = 0  # when it was remembered or found last

    @classmethod
    def of(cls, embeds: Tensor, layout: VisualLayout) -> _Prompts:
        sample, made = _sample(embeds) if _is_plain(embeds) else None, None
        # Copied to the CPU when first asked for: nobody waits for it here.
        if sample is not None and sample.is_cuda:
            made = torch.cuda.Event()
            made.record(torch.cuda.current_stream(sample.device))
        version = None if embeds.is_inference() else embeds._version
        return cls(sample, layout, version, made, next(_CLOCK))

    @property
    def positions(self) -> int:
        return self.sample.shape[0] * self.sample.shape[1]

    def _here(self, dtype: torch.dtype) -> Tensor:
        if self.made is not None:
            self.made.synchronize()
        self.sample = self.sample.cpu()
        return self.sample.to(dtype)

    def unchanged(self, embeds: Tensor) -> bool:
        """Whether the very tensor that these are is what it was."""
        return self.version is not None and self.version == embeds._version

    def are(self, asked: Tensor) -> bool:
        """Whether `asked` (B, n, FEATURES) are all of these and nothing else."""
        return self.sample.shape == asked.shape and torch.equal(self._here(asked.dtype), asked)

    def visual(self) -> Tensor:
        """(N, FEATURES): its visual tokens."""
        return self._here(self.sample.dtype)[self.layout.visual]

    def find(
        self, asked: Tensor, rows: list[int], past: int, before: VisualLayout
    ) -> dict[int, VisualLayout]:
        """For each of the `rows` of `asked` (B, n, FEATURES) that is here, or a part of one that
        is, its layout (1, n)."""
        kept, asked = self._here(asked.dtype), asked[rows]
        n, width = asked.shape[1], kept.shape[1]
        if n > width:
            return {}
        # (kept, rows, places), by one feature: where the first position and the last one are these.
        may_be = kept[:, None, : width - n + 1, 0] == asked[None, :, :1, 0]
        may_be &= kept[:, None, n - 1 :, 0] == asked[None, :, -1:, 0]
        found: dict[int, VisualLayout] = {}
        hits = may_be.nonzero().tolist()
        for row, index, at in sorted(hits, key=lambda hit: (hit[2] != past, hit[2])):
            b = rows[index]
            if b in found or not torch.equal(kept[row, at : at + n], asked[index]):
                continue
            piece = _piece(self.layout, row, at, n, before.rows(_index(b)))
            if piece is not None:
                found[b] = piece
        return found


def _piece(
    layout: VisualLayout, index: int, at: int, n: int, before: VisualLayout
) -> VisualLayout | None:
    """Columns at … at+n−1 of the row `index` of `layout`, after the row `before`; None where an
    image of theirs has begun in earlier columns, which are not what is cached."""
    row = layout.rows(_index(index))
    columns, earlier = row.columns(at, at + n), row.columns(0, at)
    begun = int(row.image[0, : at + n].max()) + 1
    grids, known = row.grids[0][:begun], before.grids[0]
    same = before.shape == earlier.shape and torch.equal(before.image, earlier.image)
    if same and known == grids[: len(known)]:
        return replace(columns, grids=(grids,))
    first = int(earlier.image.max()) + 1 if at > 0 else 0
    if bool((columns.image[columns.visual] < first).any()):
        return None
    image = torch.where(columns.visual, columns.image - first, columns.image)
    return replace(columns, image=image, grids=(grids[first:],)).after(before)


def _index(row: int) -> Tensor:
    return torch.tensor([row], device="cpu")


def _stacked(rows: list[VisualLayout]) -> VisualLayout:
    fields = ("visual", "image", "row", "col")
    tensors = (torch.cat([getattr(row, field) for row in rows]) for field in fields)
    return VisualLayout(*tensors, tuple(row.grids[0] for row in rows))


class _Store:
    """The prompts of one kind remembered or found last, for any number of threads at once."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._kept: list[_Prompts] = []
        self._positions = 0
        self._visual: Tensor | None = None  # of all kept, when asked for

    def add(self, prompts: _Prompts) -> None:
        with self._lock:
            self._visual = None
            self._kept.append(prompts)
            self._positions += prompts.positions
            while len(self._kept) > 1 and (
                len(self._kept) > MOST_PROMPTS or self._positions > MOST_POSITIONS
            ):
                oldest = min(self._kept, key=lambda prompts: prompts.used)  # never the newest
                self._kept.remove(oldest)
                self._positions -= oldest.positions

    def kept(self) -> list[_Prompts]:
        with self._lock:
            return list(self._kept)

    def visual(self) -> Tensor:
        """(N, FEATURES): the visual tokens of all that is kept."""
        with self._lock:
            if self._visual is None:
                each = [prompts.visual() for prompts in self._kept]
                self._visual = torch.cat(each) if each else torch.empty(0, FEATURES, device="cpu")
            return self._visual


_CLOCK = count(1)
_BY_OBJECT = WeakIdKeyDictionary()
_SINGLE: deque[Tensor] = deque(maxlen=64)  # tokens that an embedding made that is no plain table
_SHOWN, _TEXT = _Store(), _Store()  # apart: much text must not crowd out the images

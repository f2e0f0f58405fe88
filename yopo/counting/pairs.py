"""How many (query, key) products one head has in a pass: those that a plan asks for (`useful`), and
those that the engine computes (`executed`), masked pairs, padding and whole bands included.

Of a prefill and of the decode step after it. Layouts and index arithmetic only: no shapes, FLOPs or
weights. What is executed is read off what the engine prepares for the same layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from yopo.engine.forward import packings, prepare
from yopo.engine.layer_plan import windows
from yopo.engine.layout import VisualLayout
from yopo.engine.packing import Packing
from yopo.engine.text_attention import Sight
from yopo.engine.visual_attention import Blocks, ImageGroup
from yopo.engine.visual_cache import VisualCache
from yopo.plan.pruning_plan import PruningPlan


@dataclass(frozen=True)
class Work:
    """One pass over a batch, seen by one head.

    text_rows, visual_rows: rows that go through projections and FFN.
    text, visual: products of a head's vectors, query · key and probability · value together, of all
        queries of that kind, for what they get from visual keys; visual ones for each of the plan's
        windows (`LayerPlan.window`).
    """

    text_rows: int
    visual_rows: int
    text: Mapping[Sight, int]
    visual: tuple[Mapping[Sight, int], ...]


def _products(own: int, visual: int) -> dict[Sight, int]:
    """Products with `own` pairs over text keys and `visual` pairs over visual ones."""
    return {
        Sight.ALL: 2 * (own + visual),
        Sight.MASS: 2 * own + visual,  # a score each, but no value
        Sight.SINK: 2 * own,  # and a logit, which flops.py counts
        Sight.NOTHING: 2 * own,
    }


NO_ROWS = (_products(0, 0),)


def useful(layout: VisualLayout, valid: Tensor, plan: PruningPlan | None = None) -> Work:
    """What a prefill must do: the pairs that see each other. valid (B, n) bool, False at padding.

    Without a window visual tokens see as text does, which is also what the dense model does.
    """
    seen = [(None, False)] if plan is None else [(w, plan.window_causal) for w in windows(plan)]
    text, visual = (valid & ~layout.visual).long(), (valid & layout.visual).long()
    n_text, n_visual = text.sum(1), visual.sum(1)
    text_text = int((n_text * (n_text + 1)).sum()) // 2
    text_visual = int((text * visual.cumsum(1)).sum())
    visual_text = int((visual * text.cumsum(1)).sum())
    return Work(
        text_rows=int(n_text.sum()),
        visual_rows=int(n_visual.sum()),
        text=_products(text_text, text_visual),
        visual=tuple(
            _products(visual_text, _visual_pairs(layout, valid, window, causal))
            for window, causal in seen
        ),
    )


def _visual_pairs(layout: VisualLayout, valid: Tensor, window: int | None, causal: bool) -> int:
    """Pairs of visual tokens that see each other."""
    if window is None:
        n_visual = (valid & layout.visual).long().sum(1)
        return int((n_visual * (n_visual + 1)).sum()) // 2
    total = 0
    for b, grids in enumerate(layout.grids):
        numbers = layout.image[b, valid[b] & layout.visual[b]]
        for number, cells in zip(*numbers.unique(return_counts=True), strict=True):
            pairs = _near_pairs(grids[int(number)][1], int(cells), (window - 1) // 2)
            total += (pairs + int(cells)) // 2 if causal else pairs
    return total


def _near_pairs(cols: int, cells: int, reach: int) -> int:
    """Ordered pairs, each cell with itself included, of the first `cells` cells of a grid of `cols`
    columns that are within `reach` rows and columns of each other."""
    widths = [min(cols, cells - start) for start in range(0, cells, cols)]
    return sum(
        _near_columns(width, other, reach)
        for row, width in enumerate(widths)
        for other in widths[max(0, row - reach) : row + reach + 1]
    )


@lru_cache(maxsize=256)
def _near_columns(width: int, other: int, reach: int) -> int:
    """Pairs (i < width, j < other) with |i − j| ≤ reach."""
    return sum(max(0, min(other, i + reach + 1) - max(0, i - reach)) for i in range(width))


def useful_step(layout: VisualLayout, valid: Tensor) -> Work:
    """One decode step after that prefill: a text token in each row that sees all before it."""
    batch = valid.shape[0]
    own = int((valid & ~layout.visual).sum()) + batch
    return Work(batch, 0, _products(own, int((valid & layout.visual).sum())), NO_ROWS)


def executed(layout: VisualLayout, valid: Tensor, plan: PruningPlan) -> Work:
    """What the engine computes in that prefill: text queries against every slot of their row, and
    visual queries, band by band, against every slot of the band."""
    batch = valid.shape[0]
    cache = VisualCache.adopt(None, plan, batch, valid[:, :0], [])  # its places, no keys or values
    index = prepare(layout, valid, cache, plan)
    text, visual = index.text, index.visual
    pairs = batch * text.width
    mass_text = _products(pairs * text.width, pairs * visual.width)
    if text.width > 1:  # several queries at once: their values are padded with zeros
        mass_text[Sight.MASS] = mass_text[Sight.ALL]
    of_visual = (_executed_visual(text, visual, sight) for sight in index.visual_sight)
    return Work(len(text), len(visual), mass_text, tuple(of_visual) or NO_ROWS)


def _executed_visual(
    text: Packing, visual: Packing, sight: tuple[ImageGroup, ...] | Blocks
) -> dict[Sight, int]:
    batch, n_visual = visual.batch, visual.width
    own = others = valueless = 0
    if isinstance(sight, Blocks):
        for queries, _, _ in sight.blocks:
            count = batch * (queries.stop - queries.start)
            own += count * text.width
            others += count * n_visual
            valueless += count * n_visual * (queries.stop - queries.start == 1)
    else:
        for group in sight:
            for band in group.bands:
                count = len(group.row) * (band.queries.stop - band.queries.start)
                own += count * group.text_slots
                others += count * (band.keys.stop - band.keys.start)
    mass_visual = _products(own, others)
    mass_visual[Sight.MASS] = mass_visual[Sight.ALL] - valueless
    return mass_visual


def executed_step(layout: VisualLayout, valid: Tensor) -> Work:
    """What the engine computes in the decode step after it: a query against every slot."""
    batch = valid.shape[0]
    text, visual = packings(layout, valid, 0)
    products = _products(batch * (text.width + 1), batch * visual.width)
    return Work(batch, 0, products, NO_ROWS)


def stock(layout: VisualLayout) -> Work:
    """What stock SDPA computes in a prefill: each of the n columns against all n, the masked half
    and padding included."""
    batch, n = layout.shape
    visual = int(layout.visual.sum())
    text = batch * n - visual
    return Work(text, visual, {Sight.ALL: 2 * text * n}, ({Sight.ALL: 2 * visual * n},))


def stock_step(layout: VisualLayout) -> Work:
    """What stock SDPA computes in the decode step after it."""
    batch, n = layout.shape
    return Work(batch, 0, {Sight.ALL: 2 * batch * (n + 1)}, NO_ROWS)

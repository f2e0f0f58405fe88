"""Attention of visual queries: each sees the text before it and its neighbours on its own grid.

An image is attended in bands of grid rows, each against these rows, the window around them and the
text before, so that on a CPU no n × n is computed (elsewhere one call is faster than many); without
a window (plain causal), or where a chunk cut an image in two, in
blocks of queries. Tensors in, tensors out; knows nothing of models and weights. Paper: YOPO (arXiv
2410.06169), section 3.1; released: attncut in modeling_llama_prune.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from yopo.engine.layout import VisualLayout
from yopo.engine.packing import Packing
from yopo.engine.text_attention import Sight, attend, heads
from yopo.engine.visual_cache import HeadStore, VisualCache

BAND_ROWS = 4  # grid rows of queries attended together on a CPU
BAND_QUERIES = 2048  # and elsewhere queries, in whole grid rows: most images are one call
BLOCK_QUERIES = 256  # visual queries attended together where there is no window


@dataclass(frozen=True)
class Band:
    """Some queries of an image and the keys that they may see.

    queries, keys: ranges of cells. mask: (G or 1, 1, Q, K + Tb), the cells, then text slots before
    the image; bool, or `additive`.
    some_text: (G or 1, 1, Q, 1) float32, 0 where no text precedes, else 1; None: always some.
    """

    queries: slice
    keys: slice
    mask: Tensor
    some_text: Tensor | None


@dataclass(frozen=True)
class ImageGroup:
    """G images of one grid and one number of cells, attended together, each within itself.

    row: (G,) batch row.
    slots: (G, cells) visual slots; None where images are the visual region, row by row.
    packed: (G·cells,) packed visual rows in that order; None where that is all of them in order.
    text_slots: Tb, how many text slots stand before any of the images.
    """

    row: Tensor
    slots: Tensor | None
    packed: Tensor | None
    cells: int
    text_slots: int
    bands: tuple[Band, ...]


@dataclass(frozen=True)
class Blocks:
    """Visual queries against every slot of their row, some at a time; for no window, and for an
    image cut by a chunk.

    blocks: (query slots, mask (B, 1, Q, V + T), some_text (B, 1, Q, 1)) as of a `Band`.
    """

    blocks: tuple[tuple[slice, Tensor, Tensor], ...]


def visual_sight(
    layout: VisualLayout,
    visual: Packing,
    cache: VisualCache,
    valid: Tensor,
    window: int | None,
    window_causal: bool,
    on_cpu: bool = True,
) -> tuple[ImageGroup, ...] | Blocks:
    """What each visual query of this forward sees. All tensors lie on the CPU; on_cpu: layers
    compute there.

    `layout` describes the columns of this forward, whose tokens stand in the cache's slots already;
    `cache.layout` the whole sequence; `valid` (B, length) bool.
    """
    # (rows, cols, cells) of images alike → (batch row, first packed row, first slot) of each
    images: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    first_slot = cache.visual_order.shape[1] - visual.width
    whole, packed = True, 0
    for b, grids in enumerate(layout.grids):
        columns = layout.visual[b].nonzero().flatten()
        numbers, counts = layout.image[b, columns].unique_consecutive(return_counts=True)
        at = 0
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            start = columns[at]
            whole = whole and int(layout.row[b, start]) == int(layout.col[b, start]) == 0
            images.setdefault((*grids[number], count), []).append((b, packed + at, first_slot + at))
            at += count
        packed += at
    if window is None or not whole:
        return _blocks(visual, cache, valid, window, window_causal)
    reach = (window - 1) // 2
    return tuple(
        _image_group(key, found, visual, cache, valid, reach, window_causal, on_cpu)
        for key, found in images.items()
    )


def _image_group(
    key: tuple[int, int, int],
    found: list[tuple[int, int, int]],
    visual: Packing,
    cache: VisualCache,
    valid: Tensor,
    reach: int,
    window_causal: bool,
    on_cpu: bool,
) -> ImageGroup:
    rows, cols, cells = key
    together = BAND_ROWS if on_cpu else max(1, BAND_QUERIES // cols)
    batch_row = torch.tensor([b for b, _, _ in found], device="cpu")
    steps = torch.arange(cells, device="cpu")
    slots = torch.tensor([slot for _, _, slot in found], device="cpu")[:, None] + steps
    packed = (torch.tensor([at for _, at, _ in found], device="cpu")[:, None] + steps).flatten()
    is_region = len(found) == visual.batch and cells == cache.visual_order.shape[1]

    query_order = cache.visual_order[batch_row[:, None], slots]  # (G, cells)
    text_order = cache.text_order[batch_row]  # (G, T)
    text_alive = (text_order >= 0) & valid[batch_row].gather(1, text_order.clamp(min=0))
    before = text_alive[:, None, :] & (
        text_order[:, None, :] < query_order[:, -1:, None]
    )  # of the last cell
    seen_slots = before.any(1).any(0).nonzero()
    n_text = int(seen_slots.max()) + 1 if len(seen_slots) else 0

    bands = []
    for first in range(0, rows, together):
        queries = slice(min(first * cols, cells), min((first + together) * cols, cells))
        keys = slice(max(0, (first - reach) * cols), min((first + together + reach) * cols, cells))
        if queries.start == queries.stop:
            break
        cells_in = queries.start, queries.stop, keys.start, keys.stop
        near = _near(cols, cells_in, reach, window_causal)
        text = text_alive[:, None, :n_text] & (
            text_order[:, None, :n_text] < query_order[:, queries, None]
        )
        same = bool((text == text[:1, :1]).all())
        text = text[:1, :1].expand(1, near.shape[0], n_text) if same else text
        some_text = text.any(-1)[:, None, :, None]
        mask = torch.cat([near.expand(text.shape[0], -1, -1), text], dim=2)[:, None]
        always = bool(some_text.all())
        bands.append(Band(queries, keys, mask, None if always else some_text.float()))
    in_order = len(packed) == len(visual) and torch.equal(packed, packed.sort().values)
    return ImageGroup(
        row=batch_row,
        slots=None if is_region else slots,
        packed=None if in_order else packed,
        cells=cells,
        text_slots=n_text,
        bands=tuple(bands),
    )


@lru_cache(maxsize=64)
def _near(cols: int, cells: tuple[int, int, int, int], reach: int, causal: bool) -> Tensor:
    """(Q, K) bool: which of the cells from the third to the fourth number are neighbours of those
    from the first to the second, on a grid with so many columns. Of one grid they are the same for
    every image; nobody writes into them."""
    mine = torch.arange(cells[0], cells[1], device="cpu")[:, None]
    other = torch.arange(cells[2], cells[3], device="cpu")[None]
    near = (mine // cols - other // cols).abs() <= reach
    near &= (mine % cols - other % cols).abs() <= reach
    return near & (other <= mine) if causal else near


def _blocks(
    visual: Packing, cache: VisualCache, valid: Tensor, window: int | None, window_causal: bool
) -> Blocks:
    order = torch.cat([cache.visual_order, cache.text_order], dim=1)  # (B, V + T)
    n_visual = cache.visual_order.shape[1]
    alive = (order >= 0) & valid.gather(1, order.clamp(min=0))
    layout = cache.layout
    place = {
        name: getattr(layout, name).gather(1, order[:, :n_visual].clamp(min=0))
        for name in ("image", "row", "col")
    }
    blocks = []
    for start in range(0, visual.width, BLOCK_QUERIES):
        queries = slice(start, min(start + BLOCK_QUERIES, visual.width))
        at = slice(n_visual - visual.width + queries.start, n_visual - visual.width + queries.stop)
        mine = order[:, at, None]  # (B, Q, 1)
        cells = order[:, None, :n_visual] >= 0
        if window is None or window_causal:
            cells = cells & (order[:, None, :n_visual] <= mine)
        if window is not None:
            reach = (window - 1) // 2
            cells = cells & (place["image"][:, at, None] == place["image"][:, None, :])
            for axis in ("row", "col"):
                cells = cells & (
                    (place[axis][:, at, None] - place[axis][:, None, :]).abs() <= reach
                )
        text = order[:, None, n_visual:] < mine
        mask = torch.cat([cells.expand(-1, mine.shape[1], -1), text], dim=2) & alive[:, None, :]
        some_text = mask[:, :, n_visual:].any(-1)
        mask |= mine < 0  # empty query slots: dropped later, but must not be NaN
        blocks.append((queries, mask[:, None], some_text[:, None, :, None].float()))
    return Blocks(tuple(blocks))


def visual_attention(
    q: Tensor,
    visual: Packing,
    store: HeadStore,
    kv_index: Tensor | None,
    sight: Sight,
    seen: tuple[ImageGroup, ...] | Blocks,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Visual queries q, packed (N, H, D), over one store → (N, H, D)."""
    if isinstance(seen, Blocks):
        return _attend_blocks(q, visual, store, kv_index, sight, seen, scale, dropout)
    out = q  # each group's output takes the place of its queries
    for group in seen:
        if group.packed is None:  # all rows in order, so there is no other group
            return _attend_images(q, store, kv_index, sight, group, scale, dropout)
        part = _attend_images(q[group.packed], store, kv_index, sight, group, scale, dropout)
        out = out.index_copy(0, group.packed, part)
    return out


def _attend_images(
    q: Tensor,
    store: HeadStore,
    kv_index: Tensor | None,
    sight: Sight,
    group: ImageGroup,
    scale: float,
    dropout: float,
) -> Tensor:
    """q (G·cells, H, D), each image's cells against its window and the text before it."""
    q = q.unflatten(0, (-1, group.cells)).transpose(1, 2)  # (G, H, cells, D)
    # One band that sees all cells finds them in front of the text already.
    beside = group.slots is None and [b.keys for b in group.bands] == [slice(0, group.cells)]

    def text(region: Tensor) -> Tensor:
        region = region[:, :, : group.text_slots]
        return heads(region if group.slots is None else region[group.row], kv_index)

    def cells(region: Tensor, n_visual: int) -> Tensor:
        region = region[:, :, : n_visual + (group.text_slots if beside else 0)]
        if group.slots is not None:
            region = region[group.row[:, None], :, group.slots].transpose(1, 2)
        return heads(region, kv_index)

    def with_text(region: Tensor, of_text: Tensor, band: Band) -> Tensor:
        return region if beside else torch.cat([region[:, :, band.keys], of_text], dim=2)

    (keys, values), (text_k, text_v) = store.read(), map(text, store.read_text())
    if sight.reads_keys:
        cell_k = cells(keys, store.visual_keys)
    if sight is Sight.ALL:
        cell_v = cells(values, store.visual_values)
    outs = []
    for band in group.bands:
        mine = q[:, :, band.queries]
        if sight.reads_keys:
            k = with_text(cell_k, text_k, band)
            if sight is Sight.ALL:
                v = with_text(cell_v, text_v, band)
            else:
                v = F.pad(text_v, (0, 0, k.shape[2] - group.text_slots, 0))
            outs.append(attend(mine, k, v, band.mask, scale, dropout))
        else:
            of_text = text_k, text_v, band.mask, band.some_text
            outs.append(_attend_text(mine, *of_text, scale, dropout))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=2)
    return out.transpose(1, 2).flatten(0, 1)


def _attend_blocks(
    q: Tensor,
    visual: Packing,
    store: HeadStore,
    kv_index: Tensor | None,
    sight: Sight,
    seen: Blocks,
    scale: float,
    dropout: float,
) -> Tensor:
    q = visual.pad(q)  # (B, H, Vw, D)
    text_k, text_v = heads(store.text_keys, kv_index), heads(store.text_values, kv_index)
    k = heads(store.keys, kv_index) if sight.reads_keys else text_k
    v = heads(store.values, kv_index) if sight is Sight.ALL else text_v
    outs = []
    for queries, mask, some_text in seen.blocks:
        mine = q[:, :, queries]
        if not sight.reads_keys:
            outs.append(_attend_text(mine, k, v, mask, some_text, scale, dropout))
        else:
            outs.append(attend(mine, k, v, mask, scale, dropout))
    return visual.unpad(torch.cat(outs, dim=2))


def _attend_text(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    some_text: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Attention over the text before a visual query, of which the last columns of mask are; 0
    where there is none."""
    n_text = k.shape[2]
    if n_text == 0:
        return torch.zeros_like(q)
    mask = mask[..., mask.shape[3] - n_text :]
    if some_text is None:
        # Not a slice: kernels of CUDA want memory that begins at a multiple of 16 bytes.
        return attend(q, k, v, mask.clone(), scale, dropout)
    out = attend(q, k, v, mask.masked_fill(some_text == 0, 0), scale, dropout)
    return out * some_text.to(out.dtype)

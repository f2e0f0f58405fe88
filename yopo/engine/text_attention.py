"""Softmax attention of text queries, and what both kinds of queries share: `attend` and `Sight`.

Tensors in, tensors out; masks are built once per forward, on the CPU, and shared by all layers.
Knows nothing of models, weights or a plan's head lists. Visual queries: visual_attention.py.
Formulas: YOPO (arXiv 2410.06169), section 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional as F

from yopo.engine.packing import Packing
from yopo.engine.visual_cache import HeadStore, VisualCache
from yopo.plan.sinks import Sinks
from yopo.versions import has_flash, has_log_sums, is_compiling


class Sight(Enum):
    """What a query gets from the visual keys that it may see.

    ALL: a share of the softmax, and their values. MASS: a share of the softmax but no value
    (`mass="exact"`: the released code zeroes probabilities after the softmax). SINK: a share that
    one predicted logit takes in their place ("sink"). NOTHING: they leave the softmax ("drop").
    """

    ALL = "all"
    MASS = "mass"
    SINK = "sink"
    NOTHING = "nothing"

    @property
    def reads_keys(self) -> bool:
        return self in (Sight.ALL, Sight.MASS)


NO_SINK = -1e4  # the logit of a sink that takes no share: finite, as 0 * inf is not a number


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float = 0.0,
    causal: bool = False,
    sink: Tensor | None = None,
) -> Tensor:
    """Softmax attention; q (B, H, Q, D), k (B, H, S, D), v (B, H, S − V, D) → (B, H, Q, D).

    The first V keys have no value (`Sight.MASS`): they take their share of the softmax and give
    nothing. `mask`, broadcast to (B, H, Q, S), is 0 where a query sees a key and -inf elsewhere.
    `causal`, in place of a mask: query i sees the keys up to i (which lets SDPA take its fastest
    kernels). `sink` (B, H, Q, 1): the logit of one more key without a value, which every query
    sees.
    """
    valueless = k.shape[2] - v.shape[2]
    if mask is not None and mask.dtype != q.dtype:
        mask = mask.to(q.dtype)
    if sink is not None and not (valueless or dropout):
        found = with_log_sum(q, k, v, mask, scale, causal)
        if found is not None:
            out, log_sum = found
            share = (log_sum[..., None] - sink).sigmoid_()  # that the keys keep
            return out.mul_(share if share.dtype == out.dtype else share.to(out.dtype))
    if (valueless or sink is not None) and q.shape[2] == 1 and not dropout:
        scores = ((q * scale) @ k.transpose(2, 3)).float()  # scaled first: float16 overflows
        if mask is not None:
            scores = scores + mask
        if sink is not None:
            scores = torch.cat([sink, scores], dim=-1)
            valueless += 1
        return scores.softmax(-1)[..., valueless:].to(v.dtype) @ v
    if sink is not None:
        return _attend_sink(q, k, v, mask, scale, dropout, causal, sink)
    if valueless:
        v = F.pad(v, (0, 0, valueless, 0))
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
    )


def with_log_sum(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor] | None:
    """Softmax attention, and of each query (B, H, Q) the logarithm of the sum of its softmax, which
    torch's kernels have at hand for their backward; None where there is no such kernel or it may
    not be taken (torch.nn.attention.sdpa_kernel), or gradients are asked for, which it has none
    for."""
    if torch.is_grad_enabled() or not has_log_sums() or 0 in (*q.shape, k.shape[2]):
        return None
    aten, dim, allowed = torch.ops.aten, q.shape[3], torch.backends.cuda
    flash_allowed = is_compiling() or allowed.flash_sdp_enabled()  # which knows of CPUs, too
    if q.device.type == "cpu":
        if not flash_allowed:
            return None
        of_cpu = aten._scaled_dot_product_flash_attention_for_cpu
        out, log_sum = of_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
        return out, log_sum
    if q.device.type != "cuda" or dim % 8 or dim > 256:
        return None
    if mask is None and q.element_size() == 2 and flash_allowed and has_flash(q.device):
        flash = aten._scaled_dot_product_flash_attention
        out, log_sum, *_ = flash(q, k, v, 0.0, causal, scale=scale)
        return out, log_sum
    if not (is_compiling() or allowed.mem_efficient_sdp_enabled()):
        return None
    if mask is not None:
        if k.shape[2] % 16:  # the kernel reads masks in such steps
            return None
        mask = mask.expand(*q.shape[:3], k.shape[2])
    efficient = aten._scaled_dot_product_efficient_attention
    out, log_sum, *_ = efficient(q, k, v, mask, True, 0.0, causal, scale=scale)
    return out, log_sum[:, :, : q.shape[2]]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as `attend` takes it."""
    return mask.to(dtype).log_()


def _attend_sink(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    dropout: float,
    causal: bool,
    sink: Tensor,
) -> Tensor:
    """`attend` with a sink, by a key in front whose product with each query is that query's logit:
    eight features more than the others have (kernels want multiples of eight), of which the first
    two are the logit in queries, 1 / scale in the sink's key and 0 in the others. Two, as half
    precision rounds a logit of 10 by up to 0.03: the second is what the first has rounded away.
    So no mask with a head dimension, (B, H, Q, S), is held.
    """
    high = sink.to(q.dtype)
    low = (sink - high).to(q.dtype)
    q = torch.cat([q, high, low, q.new_zeros(1).expand(*q.shape[:3], 6)], dim=-1)
    first = k.new_zeros(*k.shape[:2], 1, k.shape[3] + 8)
    first[..., k.shape[3] : k.shape[3] + 2] = 1 / scale
    k = torch.cat([first, F.pad(k, (0, 8))], dim=2)
    dim = v.shape[3]
    v = F.pad(v, (0, 8, 1, 0))
    if causal:  # query i sees the keys up to i: one query more, in front, keeps it so
        q = F.pad(q, (0, 0, 1, 0))
    elif mask is not None:
        mask = F.pad(mask, (1, 0))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale
    )
    return out[:, :, int(causal) :, :dim]


def heads(x: Tensor, index: Tensor | None) -> Tensor:
    """The key/value heads (B, H', S, D) that the query heads read: `index` (H,) into x's heads,
    None for all as is.
    """
    return x if index is None else x.index_select(1, index)


LONG = 512  # text queries in a row, from which on they see by `InTurn`


@dataclass(frozen=True)
class InTurn:
    """Visual and text slots in the order of the sequence, in which a query sees what comes up to
    it: no mask is needed, nor held for the backward, and SDPA may take its fastest kernels.

    slots: (B, V + T) of the visual, then text slots, empty ones last. places: (B, W) of each text
    query among them.
    """

    slots: Tensor
    places: Tensor

    @classmethod
    def of(cls, text: Packing, cache: VisualCache, order: Tensor, alive: Tensor) -> InTurn | None:
        """order, alive: (B, V + T), the place of each slot, and whether a token is there that may
        be seen. None where masks are better: short texts, and few in long sequences, whose masks
        are small; where earlier tokens are cached, or padding is among the tokens."""
        if text.width < LONG or 2 * text.width < order.shape[1]:
            return None
        filled = text.order >= 0
        as_they_lie = bool((filled[:, 1:] <= filled[:, :-1]).all())
        if not as_they_lie or not torch.equal(text.order, cache.text_order):
            return None
        if not torch.equal(alive, order >= 0):
            return None
        slots = order.masked_fill(~alive, torch.iinfo(order.dtype).max).argsort(dim=1, stable=True)
        return cls(slots, slots.argsort(dim=1)[:, cache.visual_slots :])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float, dropout: float) -> Tensor:
        """Text queries q (B, H, W, D), k and v (B, H, V + T, D) → (B, H, W, D). Between them are
        queries of nothing in visual tokens' places, of which there are no more than text's."""
        valueless = k.shape[2] - v.shape[2]
        if valueless:
            v = F.pad(v, (0, 0, valueless, 0))
        k, v = _at(k, self.slots), _at(v, self.slots)
        every = q.new_zeros(*q.shape[:2], *k.shape[2:])
        every = every.scatter(2, _expanded(self.places, q), q)
        out = F.scaled_dot_product_attention(
            every, k, v, dropout_p=dropout, is_causal=True, scale=scale
        )
        return _at(out, self.places)


def _expanded(places: Tensor, x: Tensor) -> Tensor:
    return places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])


def _at(x: Tensor, places: Tensor) -> Tensor:
    """x (B, H, S, D), places (B, n) → (B, H, n, D)."""
    return x.gather(2, _expanded(places, x))


@dataclass(frozen=True)
class TextSight:
    """What each text query of this forward sees.

    every: (B, 1, W, V + T) over visual then text slots, bool or `additive`; None: everything, or
        what `in_turn` says.
    text: (B, 1, W, T) likewise over the text slots; None: everything, or with `causal` those up to
        its own.
    sink_shift: (B, 1, W, 1) float32, what is added to the sinks' logits: log of how many visual
        tokens come before the query, over the number that they stand for; NO_SINK where none does.
        None: the plan uses no sinks.
    """

    every: Tensor | None
    text: Tensor | None
    causal: bool
    sink_shift: Tensor | None
    in_turn: InTurn | None = None

    @classmethod
    def build(
        cls, text: Packing, cache: VisualCache, valid: Tensor, sinks: Sinks | None = None
    ) -> TextSight:
        """`valid` (B, length) bool: which places of the whole sequence are no padding. sinks: those
        that the plan uses."""
        if cache.gapless and text.width == 1 and text.order[0, 0] == cache.length - 1:
            # One more token of each row, which sees all before it, as in each step of decoding.
            shift = None
            if sinks is not None:
                value = shift_behind(sinks, cache.visual_slots)
                shift = torch.full((text.batch, 1, 1, 1), value, device="cpu")
            return cls(None, None, False, shift)
        n_visual = cache.visual_slots
        order = torch.cat([cache.visual_order, cache.text_order], dim=1)  # (B, V + T)
        alive = (order >= 0) & valid.gather(1, order.clamp(min=0))
        in_turn = InTurn.of(text, cache, order, alive)
        if in_turn is not None:
            before = (in_turn.places - torch.arange(text.width))[:, None, :, None].float()
            shift = None if sinks is None else _shift(sinks, before)
            return cls(None, None, True, shift, in_turn)
        mine = text.order[:, :, None]
        every = alive[:, None, :] & (order[:, None, :] <= mine)  # (B, W, V + T)
        shift = None
        if sinks is not None:
            shift = _shift(sinks, every[:, None, :, :n_visual].sum(-1, keepdim=True).float())
        # Empty query slots see all: their output is dropped, but must not be NaN.
        every = (every | (mine < 0))[:, None]
        text_only = every[..., n_visual:]
        # A pad in the last column, behind nothing but an image: no text to see, and not NaN either.
        text_only = text_only | ~text_only.any(-1, keepdim=True)
        width, slots = text_only.shape[2:]
        causal = width == slots > 1 and bool((text_only == torch.ones_like(text_only).tril()).all())
        return cls(
            None if bool(every.all()) else every,
            None if causal or bool(text_only.all()) else text_only.contiguous(),
            causal,
            shift,
        )


def _shift(sinks: Sinks, before: Tensor) -> Tensor:
    """What is added to the sinks' logits of queries behind `before` visual tokens."""
    share = before.clamp(max=1) if sinks.tokens is None else before / sinks.tokens
    return share.log().clamp(min=NO_SINK)


def shift_behind(sinks: Sinks, visual: int) -> float:
    """What is added to the sinks' logits of queries behind so many visual tokens."""
    share = min(visual, 1) if sinks.tokens is None else visual / sinks.tokens
    return max(math.log(share), NO_SINK) if share else NO_SINK


def text_attention(
    q: Tensor,
    store: HeadStore,
    kv_index: Tensor | None,
    sight: Sight,
    masks: TextSight,
    scale: float,
    dropout: float = 0.0,
    sink: Tensor | None = None,
) -> Tensor:
    """Text queries q (B, H, W, D) over one store → (B, H, W, D); sink (B, H, W, 1): their logits
    with `Sight.SINK`."""
    causal = False
    if not sight.reads_keys:
        (k, v), mask, causal = store.read_text(), masks.text, masks.causal
    else:
        (k, v), mask = store.read(), masks.every
        if sight is Sight.MASS:
            v = store.text_values
    k, v = heads(k, kv_index), heads(v, kv_index)
    if sight.reads_keys and masks.in_turn is not None:
        return masks.in_turn.attend(q, k, v, scale, dropout)
    return attend(q, k, v, mask, scale, dropout, causal, sink)

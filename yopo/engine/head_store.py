"""Keys and values of some heads of one layer, grown as tokens come. Tensors only: no plan, layout
or attention here; visual_cache.py keeps those of all layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yopo.versions import is_compiling

GROWTH = (
    1.5  # a full buffer is copied into one this much longer, so that a decode step copies no prefix
)
SPARE = 64


@dataclass(frozen=True)
class StoredHeads:
    """What a store holds: its key/value heads, (H,), and whether of visual tokens it has as many
    values as keys (all, or none)."""

    heads: Tensor
    paired: bool


class HeadStore:
    """Keys and values of some heads: a visual region in front, then text slots in order of arrival.

    `keys` (B, H, Vk + T, D), `values` (B, H, Vv + T, D), where Vk and Vv are the visual slots
    stored of each: all, or 0 where the plan never reads them. `paired`: Vk = Vv, and both lie in
    one buffer, (2, B, H, V + T, D), so that one write adds both. `reserve`: how many text slots a
    new buffer has room for beyond what it is filled with; None: some, in proportion.
    """

    def __init__(self, paired: bool = True) -> None:
        self._paired = paired
        # Of keys and values together, or of each, (1, B, H, …, D). None until the first append.
        # `| Any` and not `| None`: who reads a store has filled it, and every layer reads, so there
        # is no check.
        self._buffers: tuple[Tensor, ...] | Any = None
        self.visual_keys = 0
        self.visual_values = 0
        self.text = 0
        self.reserve: int | None = None

    def read(self) -> tuple[Tensor, Tensor]:
        """`keys` and `values`."""
        return self._slots((0, self.visual_keys + self.text), (0, self.visual_values + self.text))

    def read_text(self) -> tuple[Tensor, Tensor]:
        """`text_keys` and `text_values`."""
        return self._slots((self.visual_keys, self.text), (self.visual_values, self.text))

    def _slots(self, keys: tuple[int, int], values: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Keys and values from the first number on, as many as the second."""
        if not self._paired:
            of_keys, of_values = self._buffers
            return of_keys[0].narrow(2, *keys), of_values[0].narrow(2, *values)
        of_keys, of_values = self._buffers[0].narrow(3, *keys).unbind(0)
        return of_keys, of_values

    @property
    def keys(self) -> Tensor:
        return self.read()[0]

    @property
    def values(self) -> Tensor:
        return self.read()[1]

    @property
    def text_keys(self) -> Tensor:
        return self.read_text()[0]

    @property
    def text_values(self) -> Tensor:
        return self.read_text()[1]

    def append(self, text: Tensor, visual: Tensor | None = None, spare: bool = True) -> None:
        """Adds `text` (2, B, H, slots, D), keys and values, and `visual` ones if given; (1, …) are
        keys alone, unless the store is paired.

        `spare=False` keeps no room for later tokens and writes nothing in place: the pass ends
        here, or has gradients.
        """
        new = 0 if visual is None else visual.shape[3]
        how = spare, self.reserve
        if self._paired:
            old = (None,) if self._buffers is None else self._buffers
            grown: tuple[Tensor, ...] = (
                _grown(old[0], self.visual_keys, self.text, visual, text, *how),
            )
            self.visual_values += new
        else:
            old = (None, None) if self._buffers is None else self._buffers
            keys = _grown(old[0], self.visual_keys, self.text, visual, text[:1], *how)
            grown = keys, _grown(old[1], self.visual_values, self.text, None, text[1:], *how)
        self._buffers = grown
        self.visual_keys += new
        self.text += text.shape[3]

    def fork(self) -> HeadStore:
        """A store with the same content, whose `append(spare=False)` leaves this one as it is."""
        other = HeadStore(self._paired)
        other.take(self)
        return other

    def take(self, other: HeadStore) -> None:
        """Holds what `other` holds."""
        self._buffers, self.text = other._buffers, other.text
        self.visual_keys, self.visual_values = other.visual_keys, other.visual_values

    def keep(self, visual: int, text: int) -> None:
        """Forgets all slots but the first `visual` and the first `text` ones."""
        if self._buffers is None:
            return
        counts = [self.visual_keys, self.visual_values][: len(self._buffers)]
        if any(count > visual for count in counts):  # then the text moves up
            self._buffers = tuple(
                torch.cat([x.narrow(3, 0, min(visual, n)), x.narrow(3, n, text)], dim=3)
                for x, n in zip(self._buffers, counts, strict=True)
            )
        self.visual_keys = min(self.visual_keys, visual)
        self.visual_values = min(self.visual_values, visual)
        self.text = min(self.text, text)

    def select(self, index: Tensor) -> None:
        """Keeps the batch rows `index`, in that order (beams)."""
        if self._buffers is not None:
            self._buffers = tuple(x.index_select(1, index.to(x.device)) for x in self._buffers)

    def nbytes(self, visual_only: bool = False) -> int:
        """Bytes of the filled slots."""
        if self._buffers is None:
            return 0
        slots = self.visual_keys + self.visual_values + (0 if visual_only else 2 * self.text)
        slot = self._buffers[0][0, :, :, :1]
        return slots * slot.numel() * slot.element_size()

    def make_room(self, slots: int) -> None:
        """Gets room for so many more text slots, and a buffer that may be written into."""
        if self._buffers is None:
            return
        visual = self.visual_keys, self.visual_values
        for number, (x, count) in enumerate(zip(self._buffers, visual, strict=False)):
            filled, needed = count + self.text, count + self.text + slots
            if needed <= x.shape[3] and not is_frozen(x):
                continue
            room = needed + _spare(self.text + slots, self.reserve)
            buffer = x.new_empty(*x.shape[:3], room, x.shape[4])
            buffer[:, :, :, :filled] = x[:, :, :, :filled]
            self._buffers = (*self._buffers[:number], buffer, *self._buffers[number + 1 :])

    def buffers(self) -> tuple[Tensor, ...]:
        return self._buffers or ()

    def say(self, visual: int, text: int) -> None:
        """Has it count by these numbers, which are its own already: to torch.compile the counts of
        all stores are then two numbers, and not three of each."""
        if self._buffers is not None:
            self.text = text
            self.visual_keys = visual if self.visual_keys else 0
            self.visual_values = visual if self.visual_values else 0

    def part(self) -> None:
        """Gets a buffer of its own."""
        self._buffers = tuple(buffer.clone() for buffer in self._buffers)

    def allocated(self) -> int:
        """Bytes of its buffers."""
        buffers = self._buffers or ()
        return sum(buffer.numel() * buffer.element_size() for buffer in buffers)


def empty_stores(
    stored: Iterable[tuple[StoredHeads, StoredHeads]],
) -> list[tuple[HeadStore, HeadStore]]:
    """For each layer two stores for what is told of it."""
    return [(HeadStore(first.paired), HeadStore(second.paired)) for first, second in stored]


class StaticStore(HeadStore):
    """A paired store whose buffer never grows or moves, for steps that are captured: one more text
    token is written at a slot that the device knows, and all slots are read, under a mask."""

    def __init__(self, like: Tensor, heads: int, head_dim: int, slots: int, at: Tensor) -> None:
        super().__init__()
        # Zeros: what a mask hides must not be NaN either.
        self._buffers = (like.new_zeros(2, like.shape[0], heads, slots, head_dim),)
        self._at = at

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = self._buffers[0].unbind(0)
        return keys, values

    read_text = read

    def append(self, text: Tensor, visual: Tensor | None = None, spare: bool = True) -> None:
        self._buffers[0].index_copy_(3, self._at, text)

    def is_of(self, store: HeadStore) -> bool:
        """Whether `store` keeps what it holds here."""
        return store._buffers is not None and store._buffers[0] is self._buffers[0]

    def hold(self, store: HeadStore) -> None:
        """Takes over what `store` holds, which goes on from here."""
        mine = self._buffers[0]
        filled = store.visual_keys + store.text
        mine.narrow(3, 0, filled).copy_(store._buffers[0].narrow(3, 0, filled))
        mine.narrow(3, filled, mine.shape[3] - filled).zero_()
        store._buffers = self._buffers


def is_frozen(buffer: Tensor) -> bool:
    """Whether it was made in inference mode, and may not be written into here."""
    if is_compiling():  # which cannot tell; it is asked before
        return False
    return buffer.is_inference() and not torch.is_inference_mode_enabled()


def _spare(text: int, reserve: int | None) -> int:
    """How many slots a new buffer has beyond those that are needed."""
    return int((GROWTH - 1) * text) + SPARE if reserve is None else reserve


def _grown(
    old: Tensor | None,
    visual: int,
    text: int,
    new_visual: Tensor | None,
    new_text: Tensor,
    spare: bool,
    reserve: int | None,
) -> Tensor:
    """The buffer (P, B, H, S, D) with room for, and filled with, the new visual and text slots."""
    used = visual + text
    # torch.compile takes minutes over sizes like GROWTH's: room is made before it (make_room).
    if not spare or (is_compiling() and (old is None or new_visual is not None)):
        parts = [] if old is None else [old[:, :, :, :visual]]
        parts += [] if new_visual is None else [new_visual]
        parts += [] if old is None else [old[:, :, :, visual:used]]
        return torch.cat([*parts, new_text], dim=3)
    extra = 0 if new_visual is None else new_visual.shape[3]
    added = new_text.shape[3]
    needed = used + extra + added
    if old is None or extra or needed > old.shape[3] or is_frozen(old):
        # The visual region stays in front: it never grows while decoding, the text behind it does.
        room = needed + _spare(text + added, reserve)
        buffer = new_text.new_empty(*new_text.shape[:3], room, new_text.shape[4])
        if old is not None:
            buffer[:, :, :, :visual] = old[:, :, :, :visual]
            buffer[:, :, :, visual + extra : used + extra] = old[:, :, :, visual:used]
        if new_visual is not None:
            buffer[:, :, :, visual : visual + extra] = new_visual
        old = buffer
    old.narrow(3, used + extra, added).copy_(new_text)
    return old

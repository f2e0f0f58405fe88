"""Masks that lie on a device and of which the CPU has a copy, so that a step waits for no transfer.
Knows when a copy is out of date; what a mask means is the business of those who ask."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from yopo.versions import is_compiling


@dataclass(frozen=True)
class _Copy:
    """state: by which a change in place of the tensor shows. on_cpu: what was in it then."""

    state: tuple[int, int]
    on_cpu: Tensor


_COPIES: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor → _Copy


def on_cpu(mask: Tensor) -> Tensor:
    """`mask` on the CPU, from the device only if it is not known here, or was changed since."""
    mask = mask.detach() if mask.requires_grad else mask
    if is_here(mask):
        return mask
    if is_compiling():
        return fetch(mask)
    known = _known(mask)
    if known is None:
        known = fetch(mask)
        if not mask.is_inference():
            _COPIES[mask] = _Copy(_state(mask), known)
    return known


def note_ones_after(before: Tensor, after: Tensor) -> None:
    """Notes that `after` (B, n + k) is `before` (B, n) with ones behind it."""
    if (known := _known(before)) is not None and not after.is_inference():
        longer = F.pad(known, (0, after.shape[1] - before.shape[1]), value=1)
        _COPIES[after] = _Copy(_state(after), longer)


def is_here(mask: Tensor) -> bool:
    return mask.device.type == "cpu"


def fetch(mask: Tensor) -> Tensor:
    """Waits for the device."""
    return mask.cpu()


def _known(mask: Tensor) -> Tensor | None:
    """Nobody counts the changes of a tensor made in inference mode."""
    copy = None if mask.is_inference() else _COPIES.get(mask)
    return copy.on_cpu if copy is not None and copy.state == _state(mask) else None


def _state(mask: Tensor) -> tuple[int, int]:
    return mask._version, mask.data_ptr()

"""Packing: every token once, in order, and back in its place."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from yopo.engine.packing import Packing, to_device


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_pad_and_unpad_are_inverse_and_orders_tell_the_place(rows: list[list[bool]]) -> None:
    chosen = torch.tensor(rows)
    packing = Packing.build(chosen, past=7)
    assert torch.equal(packing.rows, chosen.flatten().nonzero().flatten())
    x = torch.arange(len(packing) * 6.0).view(-1, 2, 3)
    padded = packing.pad(x)
    assert padded.shape == (len(rows), 2, int(chosen.sum(1).max()), 3)
    assert torch.equal(packing.unpad(padded), x)
    for b, row in enumerate(chosen):
        order = packing.order[b]
        assert order[order >= 0].tolist() == (row.nonzero().flatten() + 7).tolist()
        slots = (order >= 0).nonzero().flatten()
        mine = packing.rows // 5 == b
        assert torch.equal(padded[b][:, slots].transpose(0, 1), x[mine])


def test_equal_rows_need_no_gather() -> None:
    assert Packing.build(torch.tensor([[True, False], [False, True]]), 0).gather is None
    assert Packing.build(torch.tensor([[True, True], [False, True]]), 0).gather is not None


def test_to_device_reaches_every_tensor() -> None:
    packing = Packing.build(torch.tensor([[True, True], [False, True]]), 0)
    moved = to_device((packing, 3, None), torch.device("meta"))
    assert moved[0].rows.is_meta and moved[0].order.is_meta and moved[0].gather.is_meta
    assert moved[1:] == (3, None)
    assert not packing.rows.is_meta

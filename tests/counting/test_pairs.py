"""Products of one head, against counting pair by pair."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import Case, a_plan, cases, make_case

from yopo.counting.pairs import executed, executed_step, useful, useful_step
from yopo.engine.layer_plan import windows
from yopo.engine.layout import VisualLayout
from yopo.engine.text_attention import Sight


def sees(case: Case, b: int, i: int, j: int, window: int | None, causal: bool) -> bool:
    """Whether token i of row b sees token j; both are no padding."""
    if window is None or not (case.visual[b, i] and case.visual[b, j]):
        return j <= i
    near = case.image[b, i] == case.image[b, j]
    for axis in (case.row, case.col):
        near &= abs(axis[b, i] - axis[b, j]) <= (window - 1) // 2
    return bool(near) and (j <= i or not causal)


def by_hand(case: Case, window: int | None, causal: bool) -> dict[bool, dict[Sight, int]]:
    """Products of text (False) and of visual (True) queries."""
    found = {kind: dict.fromkeys(Sight, 0) for kind in (False, True)}
    for b in range(case.shape[0]):
        tokens = case.valid[b].nonzero().flatten().tolist()
        for i in tokens:
            for j in tokens:
                if not sees(case, b, i, j, window, causal):
                    continue
                products = found[bool(case.visual[b, i])]
                products[Sight.ALL] += 2
                products[Sight.MASS] += 1 if case.visual[b, j] else 2
                for sight in (Sight.SINK, Sight.NOTHING):
                    products[sight] += 0 if case.visual[b, j] else 2
    return found


@given(case=cases(8), window=st.sampled_from([None, 1, 2, 3, 5, 8]), causal=st.booleans())
@settings(max_examples=150)
def test_useful_products_are_the_pairs_that_see_each_other(
    case: Case, window: int | None, causal: bool
) -> None:
    layout = VisualLayout.from_mask(case.visual, case.grids)
    plan = a_plan(window=[1, window, window], window_causal=causal)
    work = useful(layout, case.valid, plan)
    for number, each in enumerate(windows(plan)):
        truth = by_hand(case, each, causal)
        assert work.text == truth[False]
        assert work.visual[number] == truth[True]
    assert work.text_rows == int((case.valid & ~case.visual).sum())
    assert work.visual_rows == int((case.valid & case.visual).sum())
    step = useful_step(layout, case.valid)
    seen = int(case.valid.sum()) + len(case.valid)
    assert step.text[Sight.ALL] == 2 * seen
    assert step.text[Sight.MASS] == 2 * seen - work.visual_rows


@given(case=cases(8), window=st.sampled_from([None, 3, 5]), causal=st.booleans())
@settings(max_examples=60)
def test_the_engine_executes_at_least_what_is_useful(
    case: Case, window: int | None, causal: bool
) -> None:
    layout = VisualLayout.from_mask(case.visual, case.grids)
    plan = a_plan(window=[window, 1, 1], window_causal=causal)
    needed, done = useful(layout, case.valid, plan), executed(layout, case.valid, plan)
    assert done.text_rows >= needed.text_rows and done.visual_rows == needed.visual_rows
    for sight in Sight:
        assert done.text[sight] >= needed.text[sight]
        assert all(
            done.visual[w][sight] >= needed.visual[w][sight] for w in range(len(done.visual))
        )


@pytest.mark.parametrize("window", [5, None])
def test_a_band_is_four_grid_rows_and_the_window_around_them(window: int | None) -> None:
    """24 rows of one column, no text: bands of 4 rows read 6, 8, 8, 8, 8 and 6 rows; without a
    window all is read in one block."""
    case = make_case([[("image", 24, 1, False)]], 8)
    layout = VisualLayout.from_mask(case.visual, case.grids)
    done = executed(layout, case.valid, a_plan(window=window))
    pairs = 4 * (6 + 8 * 4 + 6) if window else 24**2
    assert [products[Sight.ALL] for products in done.visual] == [2 * pairs]
    assert done.visual[0][Sight.NOTHING] == 0
    assert executed_step(layout, case.valid).text[Sight.MASS] == 24 + 2

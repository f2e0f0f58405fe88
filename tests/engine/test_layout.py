"""Where visual tokens are: grids, truncation, several images, later chunks, what a call knows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from yopo.engine.layout import VisualLayout
from yopo.models.told import CALL, call, told


def mask(*rows: str) -> torch.Tensor:
    """A visual mask, from one character a token: v is visual."""
    return torch.tensor([[c == "v" for c in row] for row in rows])


def places(layout: VisualLayout, b: int) -> list[tuple[int, int, int]]:
    columns = layout.visual[b].nonzero().flatten().tolist()
    return [tuple(int(x[b, j]) for x in (layout.image, layout.row, layout.col)) for j in columns]


def test_each_run_is_a_square_grid() -> None:
    layout = VisualLayout.from_mask(mask("tvvvvtv", "ttttttt"))
    assert layout.grids == (((2, 2), (1, 1)), ())
    assert places(layout, 0) == [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0)]
    assert places(layout, 1) == []
    assert (layout.image[~layout.visual] == -1).all()


def test_grids_part_adjacent_images_and_leave_room_for_newlines() -> None:
    layout = VisualLayout.from_mask(mask("vvvtvvtvv"), [[(1, 2), (3, 2)]])
    assert [image for image, _, _ in places(layout, 0)] == [0, 0, 1, 1, 1, 1, 1]
    assert places(layout, 0)[-1] == (1, 2, 0)  # truncated: five of six cells


@pytest.mark.parametrize(
    ("row", "grids", "message"),
    [
        ("vvv", None, "no square grid"),
        ("tvvtvvv", None, "run of 2 visual tokens at column 1 of row 0"),
        ("vvvv", [[(1, 2)]], "2 more than its grids"),
        ("vv", [[(1, 2), (2, 2)]], "fill only 1"),
        ("vv", [[(2, 0)]], r"\(2, 0\)"),
        ("vv", [[(1, 2)], []], "grids for 2 rows"),
        ("tt", [[(1, 2)]], "fill only 0"),
    ],
)
def test_what_fits_no_grid_is_refused(row: str, grids: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VisualLayout.from_mask(mask(row), grids)


def test_visual_mask_of_one_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got shape \(3,\)"):
        VisualLayout.from_mask(mask("vvv")[0])


def test_a_later_chunk_goes_on_with_the_image_it_cuts() -> None:
    whole = VisualLayout.from_mask(mask("tvvvvvvtv"), [[(2, 3), (1, 1)]])
    first = VisualLayout.from_mask(mask("tvvvv"), [[(2, 3)]])
    later = VisualLayout.from_mask(mask("vvtv"), None, first)
    joined = VisualLayout.joined([first, later])
    assert joined.grids == whole.grids
    for name in ("visual", "image", "row", "col"):
        assert torch.equal(getattr(joined, name), getattr(whole, name)), name


def test_a_finished_or_interrupted_image_is_not_gone_on_with() -> None:
    for first, grids in ((mask("vvvv"), None), (mask("vvvvt"), [[(2, 3)]])):
        later = VisualLayout.from_mask(mask("v"), None, VisualLayout.from_mask(first, grids))
        assert places(later, 0) == [(1, 0, 0)]


def test_released_position_counts_from_the_first_real_token() -> None:
    valid = torch.ones(3, 600, dtype=torch.bool)
    valid[1, :4] = False  # padded left: 596 real tokens
    valid[2, 580:] = False  # too short for an image after ten tokens
    layout = VisualLayout.from_released(valid, 10)
    assert layout.visual[0].nonzero().flatten().tolist() == list(range(10, 586))
    assert layout.visual[1].nonzero().flatten().tolist() == list(range(14, 590))
    assert not layout.visual[2].any()
    assert places(layout, 0)[25] == (0, 1, 1)


def test_columns_rows_and_repeats_take_what_they_say() -> None:
    layout = VisualLayout.from_mask(mask("tvvt", "vttt"), [[(1, 2)], [(1, 1)]])
    part = layout.columns(2, 6)
    assert part.visual.tolist() == [[True, False, False, False], [False] * 4]
    assert part.shape == (2, 4)
    twice = layout.repeat_interleave(2)
    assert twice.grids == (((1, 2),), ((1, 2),), ((1, 1),), ((1, 1),))
    assert torch.equal(
        twice.rows(torch.tensor([2, 0])).visual, layout.rows(torch.tensor([1, 0])).visual
    )


def test_a_call_ends_with_its_block_and_is_not_seen_by_other_threads() -> None:
    assert CALL.get() is None
    with call() as known:
        known.layout = VisualLayout.empty(1, 3)
        assert CALL.get() is known
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(CALL.get).result() is None
    assert CALL.get() is None


def test_grids_without_a_mask_are_refused() -> None:
    with pytest.raises(ValueError, match="without visual_mask"):
        told(None, [[(1, 1)]])

"""A photograph put to a family's model through its own processor, and the layout that it has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from random_families import (
    IMAGE,
    Batch,
    Kind,
    places,
)
from tiny_processors import inputs, photos
from torch import Tensor

QUESTIONS = ("What is this?", "And which of the two is older?")


def one_photo(kind: Kind) -> dict[str, Tensor]:
    return inputs(kind, [(QUESTIONS[0], [photos()[0]])])


def size_of(kind: Kind, given: dict[str, Tensor]) -> Any:
    """The one picture in `given`, as random_families names sizes."""
    for name in ("image_sizes", "image_grid_thw"):
        if name in given:
            return tuple(given[name][0].tolist())
    return len(given["pixel_values"]) if kind.cls.startswith("InternVL") else None


def described(kind: Kind, given: dict[str, Tensor]) -> Batch:
    """The batch of one row that the processor made, with its layout counted here."""
    ids = given["input_ids"]
    grids, marks = places(kind, size_of(kind, given))
    places_of = torch.full((3, *ids.shape), -1)
    at = (ids[0] == IMAGE).nonzero().flatten()
    assert len(at) == len(marks)
    for column, mark in zip(at.tolist(), marks, strict=True):
        if mark is not None:
            places_of[:, 0, column] = torch.tensor(mark)
    image, row, col = places_of
    layout = SimpleNamespace(visual=image >= 0, image=image, row=row, col=col)
    return Batch(kind, [], 0, ids, given["attention_mask"], layout, [list(grids)])

"""LLaVA-NeXT: an image is two grids, the base view and what is left of its tiles without padding.
The newline embedding at the end of each row of the tiles is text. Tells layouts only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.models.llava_next import modeling_llava_next as stock

from yopo.models.families.composite import Composite, Image, size_given
from yopo.models.families.llava import image_token, patches


class Family(Composite):
    hands_on = True

    def token(self, kind: str) -> int:
        return image_token(self.config)

    def images(self, kind: str, given: Mapping[str, Any]) -> Sequence[Image]:
        return [_image(self.config, size) for size in size_given(given, "image_sizes")]


def _image(config: Any, size: list[int]) -> Image:
    """As transformers' pack_image_features puts it together, by its own helpers; `size` is the
    picture's (height, width) in pixels."""
    base = patches(config)
    tower = config.vision_config
    side = tower.image_size // tower.patch_size
    down, across = stock.get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, tower.image_size
    )
    tiles = torch.empty(1, down * side, across * side)
    _, rows, cols = stock.unpad_image(tiles, size).shape
    return Image((*base.grids, (rows, cols)), base.cells + ((True,) * cols + (False,)) * rows)

"""InternVL: each tile of an image, its thumbnail and each frame of a video is a grid of its own, as
they stand one after the other in the prompt. Tells layouts only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yopo.models.families.composite import Composite, Image


class Family(Composite):
    hands_on = True

    def token(self, kind: str) -> int:
        return self.config.image_token_id

    def images(self, kind: str, given: Mapping[str, Any]) -> Sequence[Image]:
        tower, ratio = self.config.vision_config, self.config.downsample_ratio
        # The pixel shuffle merges 1/ratio patches a side.
        sides = zip(tower.image_size, tower.patch_size, strict=True)
        rows, cols = (int(size // patch * ratio) for size, patch in sides)
        return [Image.of((rows, cols))] * len(given["pixel_values"])

"""Qwen2-VL and Qwen2.5-VL: a grid for each image, one for each (merged) frame of a video, of the
sizes in image_grid_thw and video_grid_thw after the spatial merge. Tells layouts only.

Their positions (M-RoPE) run in three dimensions and go back at each row of an image, but who sees
whom follows from the order in the sequence, as in the other families: causal masks are made of
that, positions turn queries and keys only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yopo.models.families.composite import Composite, Image, size_given


class Family(Composite):
    def token(self, kind: str) -> int:
        return self.config.image_token_id if kind == "image" else self.config.video_token_id

    def images(self, kind: str, given: Mapping[str, Any]) -> Sequence[Image]:
        merge = self.config.vision_config.spatial_merge_size  # a side of patches to a feature
        sizes = size_given(given, f"{kind}_grid_thw")  # (time, height, width) in patches
        return [Image.of(*[(h // merge, w // merge)] * frames) for frames, h, w in sizes]

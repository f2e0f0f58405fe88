"""transformers' own LLaVA: each image is one grid of the tower's patches (with a Pixtral tower, of
that image's). Tells layouts only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from yopo.models.families.composite import Composite, Image, size_given


class Family(Composite):
    hands_on = True

    def token(self, kind: str) -> int:
        return image_token(self.config)

    def images(self, kind: str, given: Mapping[str, Any]) -> Sequence[Image]:
        if given.get("image_sizes") is not None:
            patch = self.config.vision_config.patch_size
            sizes = size_given(given, "image_sizes")  # (height, width) in pixels
            return [Image.of((height // patch, width // patch)) for height, width in sizes]
        strategy = given.get("vision_feature_select_strategy")
        return [patches(self.config, strategy)] * len(given["pixel_values"])


def image_token(config: Any) -> int:
    """The placeholder's id; `image_token_index` up to 4.51."""
    token = getattr(config, "image_token_id", None)
    return config.image_token_index if token is None else token


def patches(config: Any, strategy: str | None = None) -> Image:
    """What the tower gives of one picture: a square of patches; before it the class token, a grid
    of its own, if the model keeps that ("full") and its tower (CLIP's, not SigLIP's) has one."""
    tower = config.vision_config
    side = tower.image_size // tower.patch_size
    strategy = config.vision_feature_select_strategy if strategy is None else strategy
    if strategy == "full" and tower.model_type == "clip_vision_model":
        return Image.of((1, 1), (side, side))
    return Image.of((side, side))

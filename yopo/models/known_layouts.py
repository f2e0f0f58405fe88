"""What is known of embeddings: the layout travels with them."""

from __future__ import annotations

from torch import Tensor

from yopo.engine.layout import VisualLayout


def remember(embeds: Tensor, layout: VisualLayout) -> None:
    embeds.yopo_layout = layout


def recall(embeds: Tensor, past: int) -> VisualLayout | None:
    return getattr(embeds, "yopo_layout", None)

"""Step 4: how it grows. More images in a prompt; and a model whose images have 2,000 tokens and
whose query heads share key heads."""

from __future__ import annotations

from gpu_steps.arms import FEW
from gpu_steps.race import Race, run
from gpu_steps.scale import Scale
from gpu_steps.session import Session

SHARE = 15.0  # of a race


def races(scale: Scale) -> list[Race]:
    more = [Race("scaling", "7b", 1, images, FEW) for images in scale.images]
    return [*more, Race("scaling", "qwen2-vl-7b", 1, 1, FEW)]


def shares(scale: Scale) -> dict[str, float]:
    return {race.name: SHARE for race in races(scale)}


def step(session: Session) -> None:
    for race in races(session.scale):
        run(session, race)

"""Step 2: how fast. One image a row, all batches, every arm; 7B, then 13B. torch.compile comes at
the end of the whole run: it takes a minute for one model and batch, of which any may be the last.
"""

from __future__ import annotations

from gpu_steps.arms import ALL, MAIN, STOCK, STOCK_COMPILED, Arm
from gpu_steps.race import Race, run
from gpu_steps.scale import Scale
from gpu_steps.session import Session
from gpu_steps.tables import SKIPPED

SHARES = {"7b": 50.0, "13b": 35.0}  # of a race
COMPILED_SHARE = 75.0


def races(scale: Scale) -> list[Race]:
    def arms(model: str, batch: int) -> tuple[Arm, ...]:
        return ALL if (model, batch) == ("7b", scale.batches[0]) else MAIN

    return [Race("fast", m, b, 1, arms(m, b)) for m in scale.raced or SHARES for b in scale.batches]


def shares(scale: Scale) -> dict[str, float]:
    return {race.name: SHARES[race.model] for race in races(scale)}


def step(session: Session) -> None:
    for race in races(session.scale):
        run(session, race)


def compiled_race(scale: Scale) -> Race:
    arms = (STOCK, Arm("25", "drop"), STOCK_COMPILED)
    return Race("compiled", "7b", scale.batches[0], 1, arms)


def compiled_shares(scale: Scale) -> dict[str, float]:
    return {compiled_race(scale).name: COMPILED_SHARE}


def compiled_step(session: Session) -> None:
    run(session, compiled_race(session.scale))
    what = f"{STOCK_COMPILED.name}, with other models and batches"
    note = "a compilation for each would take all the time there is"
    session.journal.add("compiled", what, SKIPPED, note=note)

"""Plans from the dense reader's statistics: samples for yopo's calibration and its budget search.

Thin: the statistics, the ranking of neurons and the search are yopo's own.
"""

import json
import random
from pathlib import Path
from typing import Any

import torch
from network import VISUAL, Reader
from pictures import Task, draw_turns, tokens
from torch import Tensor

from yopo import PruningPlan
from yopo.calibration.collect import collect
from yopo.calibration.config import SearchConfig
from yopo.calibration.divergence import references
from yopo.calibration.mass_fit import fit_text_mass
from yopo.calibration.neurons import put, ranked, reorder
from yopo.calibration.sample_statistics import Statistics
from yopo.calibration.search import search

__all__ = ["put", "ranked", "reorder"]

SAMPLES = 100  # for the head mask, as released
HELD_OUT = 80  # other ones, for the search
EVALUATIONS = 40


def samples(
    reader: Reader, data: list[tuple[Task, Tensor]], count: int, seed: int
) -> list[dict[str, Any]]:
    """Training pictures with one question and its answer each, both tasks in turn."""
    dice, made = random.Random(seed), []
    words = reader.llama.get_input_embeddings()
    with torch.no_grad():
        for index in range(count):
            task, stored = data[index % len(data)]
            picture = dice.randrange(len(stored))
            _, question, answer = draw_turns(task, picture, 1, dice)[0]
            asked = words(torch.tensor([tokens(question)]))
            rows = torch.cat([reader.prefix(stored[picture, None].float()), asked], dim=1)
            place = torch.arange(rows.shape[1])[None]
            made.append(
                {
                    "inputs_embeds": rows,
                    "visual_mask": (place > 0) & (place <= VISUAL),
                    "answer_ids": torch.tensor([tokens(answer)]),
                }
            )
    return made


def statistics(reader: Reader, among: list[dict[str, Any]], path: Path) -> Statistics:
    """What yopo's calibration measures, kept in `path`."""
    return collect(reader.llama, among, path=path, influence=False, progress=True)


def searched(
    reader: Reader,
    measured: Statistics,
    held_out: list[dict[str, Any]],
    budget: int,
    start: PruningPlan,
    path: Path,
) -> PruningPlan:
    """The plan that yopo's search finds within `budget` percent under "calibrated", from `start`
    on, kept in `path` with its log."""
    if not path.exists():
        log: list[dict[str, Any]] = []

        def note(one: Any) -> None:
            log.append({"why": one.why, "flops": one.visual_flops, "kl": one.divergence})

        config = SearchConfig(budget=budget / 100, mass="calibrated", evaluations=EVALUATIONS)
        known = references(reader.llama, held_out)
        found = search(
            reader.llama, known, measured, config, start=[start], progress=True, log=note
        )
        holder = dict(reader.config.to_dict())
        found.plan.save_to(holder)
        path.write_text(json.dumps({**holder, "log": log}, default=str))
    plan = PruningPlan.from_config(json.loads(path.read_text()))
    assert plan is not None
    return plan


def fitted(
    reader: Reader,
    plan: PruningPlan,
    known: list[dict[str, Any]],
    held_out: list[dict[str, Any]],
) -> PruningPlan:
    """`plan` with its calibrated constants fitted together to the dense reader's answers."""
    if plan.layer_cut == plan.num_layers and plan.head_keep.all():
        return plan  # nothing is blind: no constant is ever used
    ours, theirs = (references(reader.llama, some) for some in (known, held_out))
    return fit_text_mass(reader.llama, plan, ours, theirs)

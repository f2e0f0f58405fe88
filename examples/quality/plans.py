"""Plans from the dense reader's statistics and answers: samples for yopo's calibration, its search,
sinks, and which layers a recipe takes first.

Thin: the statistics, the ranking of neurons, the search and the sinks are yopo's own.
"""

import random
from pathlib import Path
from typing import Any

import torch
import variants
from network import VISUAL, Reader
from pictures import Task, draw_turns, tokens
from torch import Tensor

from yopo import PruningPlan, fit_sinks
from yopo.calibration.collect import collect
from yopo.calibration.config import SearchConfig
from yopo.calibration.divergence import Reference, mean_kl
from yopo.calibration.neurons import put, ranked, reorder
from yopo.calibration.sample_statistics import Statistics
from yopo.calibration.search import search
from yopo.files import read_json, write_json

__all__ = ["put", "ranked", "reorder"]

SAMPLES = 100  # for the head mask, as released, and for sinks
HELD_OUT = 600  # other ones, for the search
EVALUATIONS = 400  # plans it tries for each budget


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
    known: list[Reference],
    budget: int,
    start: list[PruningPlan],
    path: Path,
) -> PruningPlan:
    """The plan that yopo's search finds within `budget` percent under drop, of `start` and those
    that it makes; kept in `path` with its log."""
    if not path.exists():
        log: list[dict[str, Any]] = []

        def note(one: Any) -> None:
            log.append({"why": one.why, "flops": one.visual_flops, "kl": one.divergence})

        config = SearchConfig(budget=budget / 100, mass="drop", evaluations=EVALUATIONS)
        trials = path.with_name("trials.jsonl")  # of all budgets: they have many in common
        plan = search(
            reader.llama,
            known,
            measured,
            config,
            start=start,
            path=trials,
            progress=True,
            log=note,
        ).plan
        holder: dict[str, Any] = {}
        plan.save_to(holder)
        write_json(path, {"summary": plan.summary(), **holder, "log": log})
    return PruningPlan.load(path)


def ranking(reader: Reader, known: list[Reference], rule: str, path: Path) -> list[int]:
    """The layers, first the one that changes answers least when it alone loses what the recipe
    takes (ShortV's own criterion); kept in `path`."""
    if not path.exists():
        layers = range(reader.config.num_hidden_layers)
        plans = [variants.recipe(reader.config, rule, [layer]) for layer in layers]
        change = [mean_kl(reader.llama, plan, known) for plan in plans]
        write_json(path, {"kl": change, "order": sorted(layers, key=change.__getitem__)})
    return read_json(path)["order"]


def with_sinks(reader: Reader, plan: PruningPlan, among: list[dict[str, Any]]) -> PruningPlan:
    """`plan` under sinks that give the dense reader's mass."""
    fit = fit_sinks(reader.llama, among, plan, target="dense")
    print(fit)
    return fit.plan

"""Times arms against each other: one model, one prompt, all arms in turn in each round, so that a
machine that speeds up or slows down does so for all. Which races there are is the steps' business.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpu_steps.arms import COMPILED, GRAPHED, STOCK, Arm, entered
from gpu_steps.clock import Deadline, Late, time_limit
from gpu_steps.journal import TIME_IS_UP, words
from gpu_steps.marks import Marks
from gpu_steps.scale import DTYPE
from gpu_steps.session import Session
from gpu_steps.tables import ABSENT, FAILED, OK, SKIPPED
from yopo.bench.arms import last_only
from yopo.bench.floor import Rates, decode_floor, prefill_floor
from yopo.bench.memory import cache_bytes, peak_of
from yopo.bench.random_model import Case
from yopo.counting.flops import Prompt

WARM_STEPS = 2  # of decoding, before any is timed


@dataclass(frozen=True)
class Race:
    """step: whose rows they are. model: a name of the scale's. images: in each row of the batch."""

    step: str
    model: str
    batch: int
    images: int
    arms: Sequence[Arm]

    @property
    def name(self) -> str:
        return f"{self.step}: {self.model}, batch {self.batch}, images {self.images}"


@dataclass
class Runner:
    """An arm in a race, and what it took: seconds of each prefill, decode step, and whole answer;
    bytes. failed: why there is nothing."""

    arm: Arm
    prefill_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    kv_bytes: int | None = None
    failed: str | None = None


class Track:
    """The model and the prompt of a race. Calls the model; measures nothing but what it is told to
    by its caller's marks."""

    def __init__(self, session: Session, race: Race) -> None:
        self.model, self.shape = session.model(race.model)
        self.device = session.device
        self.prompt = Prompt.around((self.shape.grid,) * race.images, session.scale.text_tokens)
        self._whole = self._input(self.prompt, race.batch)
        self._short = self._input(Prompt.around(((2, 2),), 4), 1)
        self._compiler = session.scale.compiler
        self._compiled: Any = None

    def _input(self, prompt: Prompt, batch: int) -> tuple[dict[str, Any], dict[str, Any]]:
        """What every arm is given, and what those with a plan are told besides."""
        case = Case.of(prompt, batch, self.shape, DTYPE, self.device)
        given = {"inputs_embeds": case.embeds, "use_cache": True, **last_only(self.model)}
        visual = case.layout.visual.to(self.device)
        return given, {"visual_mask": visual, "visual_grids": [prompt.grids] * batch}

    def entered(self, arm: Arm) -> Any:
        """A context with what to call as the model."""
        if arm.way == COMPILED and self._compiled is None:
            self._compiled = torch.compile(self.model, backend=self._compiler, dynamic=True)
        return entered(self.model, self.shape, arm, self._compiled)

    def warm(self, called: Any, arm: Arm) -> None:
        """What an arm does once after it is entered, and not for each prompt."""
        out = self.prefill(called, arm, short=arm.way != GRAPHED)  # a graph is of one length
        self.decode(called, out)

    def prefill(self, called: Any, arm: Arm, short: bool = False) -> Any:
        given, told = self._short if short else self._whole
        return called(**given) if arm.plan is None else called(**given, **told)

    def decode(self, called: Any, out: Any) -> Any:
        """One greedy step after `out`; the host waits for nothing."""
        token: Tensor = out.logits[:, -1:].argmax(-1)
        return called(input_ids=token, past_key_values=out.past_key_values, use_cache=True)


def run(session: Session, race: Race) -> None:
    """Adds a row for each arm. Whatever fails is a row, too."""
    deadline, journal = session.clock.deadline(race.name), session.journal
    try:
        track = Track(session, race)
    except Exception as error:
        journal.add(race.step, race.name, FAILED, **_about(race), error=words(error))
        return
    runners = []
    chosen = session.scale.arms
    for arm in race.arms:
        if chosen is not None and arm.name not in chosen:
            continue
        if why := arm.absent(track.shape):
            journal.add(race.step, arm.name, ABSENT, **_about(race), arm=arm.name, note=why)
        else:
            runners.append(Runner(arm))
    for runner in runners:  # each is timed once before the next is warmed up: time may be short
        _attempt(session, deadline, runner, partial(_first, track, runner, deadline))
        _attempt(session, deadline, runner, partial(_timed, track, runner, session.scale.steps))
    for _ in range(session.scale.rounds - 1):
        for runner in runners:
            _attempt(session, deadline, runner, partial(_timed, track, runner, 0))
    _write(session, race, track, runners)


def _attempt(
    session: Session, deadline: Deadline, runner: Runner, work: Callable[[], None]
) -> None:
    if deadline.over or runner.failed is not None:
        return
    try:
        with torch.inference_mode():
            work()
    except Late:  # stopped anywhere, it may have left the model half changed
        session.free()
        deadline.end()
    except Exception as error:
        runner.failed = words(error)
        if session.on_gpu:
            torch.cuda.empty_cache()


def _first(track: Track, runner: Runner, deadline: Deadline) -> None:
    """Whatever happens once, out of the way of the times, a compilation for one; and the memory."""
    arm = runner.arm
    with time_limit(deadline.left), track.entered(arm) as called:
        track.warm(called, arm)
        out = track.prefill(called, arm)
        del out
        runner.peak_bytes, out = peak_of(lambda: track.prefill(called, arm), track.device)
        runner.kv_bytes = cache_bytes(out.past_key_values)
        for _ in range(WARM_STEPS):
            out = track.decode(called, out)


def _timed(track: Track, runner: Runner, steps: int) -> None:
    arm = runner.arm
    with track.entered(arm) as called:
        track.warm(called, arm)
        marks = Marks(track.device)
        marks.set()
        out = track.prefill(called, arm)
        marks.set()
        for _ in range(steps):
            out = track.decode(called, out)
            marks.set()
        prefill, *decode = marks.gaps()
    runner.prefill_s.append(prefill)
    runner.decode_s += decode
    if steps:  # as many tokens as steps: the first comes with the prefill
        runner.answer_s.append(prefill + sum(decode[:-1]))


def _about(race: Race) -> dict[str, Any]:
    return {"model": race.model, "batch": race.batch, "images": race.images}


def _write(session: Session, race: Race, track: Track, runners: list[Runner]) -> None:
    timed = any(runner.prefill_s for runner in runners)
    rates = session.rates() if timed else None
    stock = next((runner for runner in runners if runner.arm == STOCK), None)
    for runner in runners:
        about = {**_about(race), "arm": runner.arm.name}
        if runner.failed is not None:
            session.journal.add(race.step, runner.arm.name, FAILED, **about, error=runner.failed)
        elif not runner.prefill_s:
            session.journal.add(race.step, runner.arm.name, SKIPPED, **about, note=TIME_IS_UP)
        else:
            figures = _figures(session, race, track, runner, stock, rates)
            session.journal.add(race.step, runner.arm.name, OK, **about, **figures)
    session.journal.write_table()


def _figures(
    session: Session,
    race: Race,
    track: Track,
    runner: Runner,
    stock: Runner | None,
    rates: Rates | None,
) -> dict[str, Any]:
    """Of one arm. Times in ms, medians; ratios are stock's time over the arm's in the same round,
    of their median."""
    figures: dict[str, Any] = {
        "layers": track.shape.num_hidden_layers,
        "visual_tokens": track.prompt.visual,
        "text_tokens": track.prompt.text,
        "rounds": len(runner.prefill_s),
        "steps": len(runner.decode_s),
        "peak_bytes": runner.peak_bytes,
        "kv_bytes": runner.kv_bytes,
    }
    for part in ("prefill", "decode", "answer"):
        mine = getattr(runner, f"{part}_s")
        if not mine:
            continue
        figures[f"{part}_ms"] = 1e3 * statistics.median(mine)
        figures[f"{part}_spread_ms"] = [1e3 * min(mine), 1e3 * max(mine)]
        pairs = list(zip(getattr(stock, f"{part}_s"), mine, strict=False)) if stock else []
        if pairs:
            figures[f"{part}_ratio"] = statistics.median([a / b for a, b in pairs])
    if rates is not None:
        shape, size = track.shape, DTYPE.itemsize
        plan, kv_bytes = runner.arm.plan_for(shape), runner.kv_bytes or 0
        floor = prefill_floor(shape, track.prompt, plan, race.batch, size, rates)
        figures["prefill_floor_ms"] = 1e3 * floor
        figures["decode_floor_ms"] = 1e3 * decode_floor(shape, kv_bytes, size, rates)
    return figures

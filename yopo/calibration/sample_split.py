"""Which samples are for what: to take statistics of, to choose a plan by, to judge it. Looks at no
sample and runs no model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from yopo.calibration.config import CalibrationConfig
from yopo.prompts.sample import Sample

JUDGING = 3  # of the samples held out every third judges the plan and chooses nothing
SHOWN = 25  # samples that show what a plan by a rule changes, for which none are held out
FITTED = 100  # samples, of those that statistics are taken of, that sinks are fitted to


@dataclass(frozen=True)
class SampleSplit:
    """taken: for statistics, to be read once. fitting: to fit sinks to, to be read after `taken`.
    choosing: by whose answers a plan is chosen, to be read once. judging: whose answers say what it
    changes. judges: what these are, in words.
    """

    taken: Iterable[Sample]
    fitting: Sequence[Sample]
    choosing: Iterable[Sample]
    judging: Sequence[Sample]
    judges: str


def split(samples: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """(for statistics, held out): every second sample is held out. Fewer would do for statistics
    of the rest, but the search chooses by the few that are, and what it finds is best for these."""
    if len(samples) < 2:
        raise ValueError(f"{len(samples)} samples: a search holds every second out; give more")
    return samples[::2], samples[1::2]


def split_for(
    config: CalibrationConfig,
    samples: Iterable[Sample],
    held_out: Iterable[Sample] | None,
    measured: bool,
) -> SampleSplit:
    """How `samples` are used under `config`. held_out: others, none of which statistics are taken
    of; None: every second of `samples`. measured: no statistics are taken of any.

    Sequences are sliced, not read: samples may be made when they are asked for (questions.Samples).
    """
    if not config.holds_out:
        if held_out is not None:
            raise ValueError(
                "held_out is given without a budget: nothing else is chosen by samples held out"
            )
        if measured:
            given = _sequence(samples, min(FITTED, config.limit or FITTED))
            return SampleSplit((), given, (), given[:SHOWN], "of those given")
        taken, first, shown = _with_first(samples, (FITTED, SHOWN), config.limit)
        return SampleSplit(taken, first, (), shown, "of those that the statistics were taken of")
    if held_out is None:
        taken, rest = split(_sequence(samples, config.limit))
    else:
        taken, rest = _sequence(samples, config.limit), _sequence(held_out, None)
    fitting, judging = taken[:FITTED], rest[JUDGING - 1 :: JUDGING]
    if not len(judging):
        return SampleSplit(taken, fitting, rest, rest, "held out, which chose it")
    judges = "held out, by which the plan was not chosen"
    choosing = (one for i, one in enumerate(rest) if i % JUDGING != JUDGING - 1)
    return SampleSplit(taken, fitting, choosing, judging, judges)


def _sequence(samples: Iterable[Sample], limit: int | None) -> Sequence[Sample]:
    if isinstance(samples, Sequence):
        return samples[:limit]
    return list(islice(samples, limit))


def _with_first(
    samples: Iterable[Sample], counts: tuple[int, int], limit: int | None
) -> tuple[Iterable[Sample], Sequence[Sample], Sequence[Sample]]:
    """All of `samples` to the limit, and the first so many of them once more: of a stream, those
    that have been taken from it."""
    if isinstance(samples, Sequence):
        within = samples[:limit]
        return within, within[: counts[0]], within[: counts[1]]
    kept: tuple[list[Sample], list[Sample]] = ([], [])

    def keeping() -> Iterator[Sample]:
        for sample in islice(samples, limit):
            for first, count in zip(kept, counts, strict=True):
                if len(first) < count:
                    first.append(sample)
            yield sample

    return keeping(), *kept

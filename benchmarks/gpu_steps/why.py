"""Step 3: why. One prefill and one decode step under torch.profiler, stock and ours: how many
kernels a layer takes, what the device's time goes to, and how long it has nothing to do."""

from __future__ import annotations

import json
import math
import re
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import ZIP_DEFLATED, ZipFile

import torch
from torch.profiler import ProfilerActivity, profile

from gpu_steps.arms import FUSED, GRAPHED, STOCK, Arm
from gpu_steps.journal import TIME_IS_UP
from gpu_steps.marks import seconds
from gpu_steps.race import Race, Track
from gpu_steps.scale import Scale
from gpu_steps.session import Session
from gpu_steps.tables import ABSENT, SKIPPED

SHARE = 20.0
ARMS = (
    STOCK,
    Arm("25", "drop", FUSED),
    Arm("12", "sink", FUSED),
    Arm("25", "drop"),
    Arm("25", "exact", FUSED),
    Arm("12", "sink", GRAPHED),
)
WARM = 3  # calls before the one that is watched
SHOWN = 8  # kernels told by name
TRACES = "traces.zip"

# Of a kernel the first kind whose words are in its name; on a CPU of an operation.
KINDS = {
    "attention": r"flash|fmha|attention|sdpa",
    "products": r"gemm|gemv|nvjet|cutlass|xmma|splitk|cublas|matmul|linear|::(add|b)?mm\b",
    "copies": r"copy|memcpy|memset|gather|scatter|index|fill|catarray|::cat\b|::stack\b|dtod|htod",
    "reductions": r"reduce|norm|mean|softmax|::sum\b|argmax|sort",
    "elementwise": r"elementwise|silu|mul|add|neg|rsqrt|pow|where|sigmoid|exp|triton",
}
OTHER = "other"
WHOLE = ("attention", "products")  # of an operation, with whatever is inside


class Work(NamedTuple):
    """One kernel, or on a CPU one operation: microseconds."""

    name: str
    start: float
    end: float


def shares(scale: Scale) -> dict[str, float]:
    return {"why": SHARE}


def step(session: Session) -> None:
    deadline = session.clock.deadline("why")
    (session.journal.folder / TRACES).unlink(missing_ok=True)  # of an earlier run
    race = Race("why", "7b", session.scale.batches[0], 1, ARMS)
    track, chosen = Track(session, race), session.scale.arms
    for arm in ARMS:
        if chosen is not None and arm.name not in chosen:
            continue
        if absent := arm.absent(track.shape):
            session.journal.add("why", arm.name, ABSENT, arm=arm.name, note=absent)
        for phase in () if absent else ("prefill", "decode"):
            what = f"{arm.name}: {phase}"
            if deadline.over:
                session.journal.add("why", what, SKIPPED, arm=arm.name, note=TIME_IS_UP)
            else:
                session.journal.attempt("why", what, partial(_row, session, track, arm, phase))


@torch.inference_mode()
def _row(session: Session, track: Track, arm: Arm, phase: str) -> dict[str, Any]:
    with track.entered(arm) as called:
        out = track.prefill(called, arm)
        work = partial(track.prefill, called, arm)
        if phase == "decode":
            work = partial(track.decode, called, out)  # from the same prompt on, each time longer
        wall = [seconds(work, session.device) for _ in range(WARM)]
        slug = re.sub(r"\W+", "-", f"{arm.name} {phase}").lower()
        done = _watched(work, session, f"{slug}.json")
    figures = summary(done, track.shape.num_hidden_layers)
    if session.on_gpu:  # the profiler slows the host down, not the kernels: idle in its absence
        idle = 1 - figures["busy_ms"] / (1e3 * statistics.median(wall))
        figures["idle_share"] = max(0.0, idle)
    return {"arm": arm.name, "phase": phase, "wall_ms": 1e3 * statistics.median(wall), **figures}


def _watched(work: Callable[[], Any], session: Session, name: str) -> list[Work]:
    """What the device did, once. The trace of a GPU stays, under that name."""
    activities = [ProfilerActivity.CPU]
    if session.on_gpu:
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as watched:
        work()
        if session.on_gpu:
            torch.cuda.synchronize(session.device)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / name
        watched.export_chrome_trace(str(file))
        events = json.loads(file.read_bytes())["traceEvents"]
        if not session.on_gpu:
            return host_work(events)
        with ZipFile(session.journal.folder / TRACES, "a", ZIP_DEFLATED) as kept:
            kept.write(file, name)
    return device_work(events)


def device_work(events: Iterable[dict[str, Any]]) -> list[Work]:
    """The kernels, copies and fills of a trace, in order."""
    kinds = ("kernel", "gpu_memcpy", "gpu_memset")
    return _works(event for event in events if event.get("cat") in kinds)


def host_work(events: Iterable[dict[str, Any]]) -> list[Work]:
    """The operations of a trace of one thread, in order: products and attention whole, of others
    those that have none inside."""
    works = _works(event for event in events if event.get("cat") == "cpu_op")
    done, until = [], -math.inf
    for work, following in zip(works, [*works[1:], None], strict=True):
        alone = following is None or following.start >= work.end
        if work.start >= until and (alone or kind_of(work.name) in WHOLE):
            done.append(work)
            until = work.end
    return done


def _works(events: Iterable[dict[str, Any]]) -> list[Work]:
    works = [Work(event["name"], event["ts"], event["ts"] + event["dur"]) for event in events]
    return sorted(works, key=lambda work: (work.start, -work.end))


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if re.search(words, lower)), OTHER)


def summary(works: list[Work], layers: int) -> dict[str, Any]:
    """Counts and times of `works`, by kind and the longest by name. Raises RuntimeError without
    any: then the profiler saw nothing."""
    if not works:
        raise RuntimeError("the profiler saw no kernel: is CUPTI there, and nobody else using it?")
    by_kind, by_name = Counter(), Counter()
    busy, until = 0.0, works[0].start
    for work in works:
        by_kind[kind_of(work.name)] += work.end - work.start
        by_name[work.name] += work.end - work.start
        busy += max(0.0, work.end - max(work.start, until))
        until = max(until, work.end)
    return {
        "kernels": len(works),
        "kernels_per_layer": len(works) / layers,
        "busy_ms": busy / 1e3,
        "by_kind_ms": {kind: by_kind[kind] / 1e3 for kind in (*KINDS, OTHER) if by_kind[kind]},
        "longest_ms": {name[:120]: us / 1e3 for name, us in by_name.most_common(SHOWN)},
    }

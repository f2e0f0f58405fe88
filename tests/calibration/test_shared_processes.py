"""Two processes that share the samples come to the plan of one, to the bit; what fails in one fails
in both."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from process_pair import Processes
from shared_calibration import SHAPE, calibrated, fails, unlike

import yopo
from yopo.calibration.processes import by_first, count, in_turn, is_first


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    made = Processes(tmp_path_factory.mktemp("processes"))
    yield made
    made.stop()


def same(ours: Any, expected: Any) -> bool:
    (fields, tensors, _), (their_fields, theirs, _) = ours, expected
    names = tensors.keys() == theirs.keys()
    return (
        names
        and str(fields) == str(their_fields)
        and all(torch.equal(x.nan_to_num(), theirs[n].nan_to_num()) for n, x in tensors.items())
    )


@pytest.mark.parametrize("budget", [None, 0.3])
def test_processes_that_share_samples_find_what_one_finds(
    processes: Processes, tmp_path: Path, budget: float | None
) -> None:
    threads = torch.get_num_threads()
    alone = calibrated(0, None, budget, False)
    torch.set_num_threads(threads)
    first, second = processes.run(calibrated, str(tmp_path), budget, True)
    assert same(first, alone) and same(second, alone)
    assert first[2] == alone[2] and second[2] == []
    assert (tmp_path / "statistics.safetensors").is_file()
    again, _ = processes.run(calibrated, str(tmp_path), budget, True)  # all of it is known
    assert same(again, alone)


def test_a_sample_that_one_cannot_use_is_an_error_of_all(processes: Processes) -> None:
    first, second = processes.run(fails)
    assert first == second and first.startswith("sample 3 (the first is 0)")


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("shards", "do not have the same samples in the same order"),
        ("another order", "do not have the same samples in the same order"),
        ("fewer", "do not have the same samples in the same order"),
        ("settings", "were called with other settings"),
    ],
)
def test_processes_that_were_given_unlike_things_all_say_so(
    processes: Processes, what: str, said: str
) -> None:
    assert all(said in one for one in processes.run(unlike, what))


def test_distributed_without_processes_is_refused() -> None:
    from calibration_samples import sample
    from layouts import build

    with pytest.raises(ValueError, match="joins no processes: start them by `accelerate launch`"):
        yopo.calibrate(build(SHAPE), [sample(0, SHAPE)], distributed=True)


def test_alone_work_is_done_when_it_is_asked_for() -> None:
    done: list[int] = []
    results = in_turn("ab", lambda number, item: done.append(number) or item * 2)
    assert next(results) == "aa" and done == [0]
    assert list(results) == ["bb"] and by_first(lambda: 3) == 3
    assert count() == 1 and is_first()

"""benchmarks/gpu.py, rehearsed on the CPU: every step leaves its rows, and what fails or has no
time leaves one, too, and stops nothing else. Its times are no business of tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version

if Version(transformers.__version__) < Version("4.57"):
    pytest.skip("the check is written for a machine with recent versions", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import gpu
from gpu_steps import arms, fast, race, right, scale, scaling, session
from gpu_steps.clock import Deadline, Late

import yopo

Row = dict[str, Any]
Run = Callable[..., tuple[int, list[Row], str]]
LEAST = replace(scale.SMALL, batches=(1,), images=(1,), layouts=1, rounds=1, steps=2)


def rehearse(folder: Path, *words: str) -> tuple[int, list[Row], str]:
    """The exit status, the rows, and the table."""
    rehearsal = ["--device", "cpu", "--small", "--minutes", "60"]  # a busy machine is no failure
    status = gpu.main(["--out", str(folder), *rehearsal, *words])
    lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
    return status, [json.loads(line) for line in lines], (folder / "table.md").read_text("utf-8")


@pytest.fixture
def least(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """A rehearsal as short as it can be."""
    monkeypatch.setattr(gpu, "SMALL", LEAST)
    return lambda *words: rehearse(tmp_path, *words)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[Row], str]:
    return rehearse(tmp_path_factory.mktemp("gpu"))


def of(rows: list[Row], step: str, **about: Any) -> list[Row]:
    return [row for row in rows if row["step"] == step and about.items() <= row.items()]


def test_nothing_fails_and_the_first_line_names_the_machine(
    whole: tuple[int, list[Row], str],
) -> None:
    status, rows, table = whole
    assert status == 0, [row for row in rows if row.get("status") == "failed"]
    assert rows[0]["step"] == "machine" and torch.__version__ in rows[0]["device"]
    assert rows[0]["device"] in table


def test_golden_files_and_random_layouts_are_right(whole: tuple[int, list[Row], str]) -> None:
    rows = of(whole[1], "right")
    goldens = [row for row in rows if row["what"].startswith("golden file")]
    assert len(goldens) == 7 and all(row["worst"] <= 1e-3 for row in goldens)
    layouts = {row["what"]: row for row in rows if row["what"].startswith("random layouts")}
    assert {row["layouts"] for row in layouts.values()} == {scale.SMALL.layouts}
    assert layouts["random layouts, float32"]["worst"] <= 1e-4
    assert 1e-4 < layouts["random layouts, bfloat16"]["worst"] <= 0.05
    (generated,) = (row for row in rows if row["what"] == "generate 32 tokens")
    assert generated["worst"] == 0


def test_what_only_a_gpu_can_tell_is_said_to_be_missing(
    whole: tuple[int, list[Row], str],
) -> None:
    rows = [row for row in of(whole[1], "right") if "synchronisation" in row["what"]]
    assert len(rows) == len(right.MASSES)
    assert {(row["status"], row["note"]) for row in rows} == {("not run", "not on a CPU")}


@pytest.mark.parametrize("step", ["fast", "scaling", "compiled"])
def test_every_arm_of_every_race_is_timed_or_said_not_to_be_there(
    whole: tuple[int, list[Row], str], step: str
) -> None:
    small = scale.SMALL
    races = {
        "fast": fast.races(small),
        "scaling": scaling.races(small),
        "compiled": [fast.compiled_race(small)],
    }
    for raced in races[step]:
        about = {"model": raced.model, "batch": raced.batch, "images": raced.images}
        rows = of(whole[1], step, **about)
        assert {row.get("arm") for row in rows} == {arm.name for arm in raced.arms}
        timed = [row for row in rows if row["status"] == "ok"]
        assert {row["status"] for row in rows} <= {"ok", "not there yet"}
        assert {row["arm"] for row in timed} >= {"stock SDPA", "25 drop"}
        for row in timed:
            assert (row["rounds"], row["steps"]) == (small.rounds, small.steps)
            parts = ("prefill", "decode", "answer")
            assert all(row[f"{p}_ms"] > 0 and row[f"{p}_ratio"] > 0 for p in parts)
            assert row["prefill_floor_ms"] > 0 and row["decode_floor_ms"] > 0


def test_memory_is_that_of_the_plan(whole: tuple[int, list[Row], str]) -> None:
    """Of 28 tokens 16 are visual; drop keeps them in half the heads of half the layers, exact all
    keys and these values."""
    rows = {row["arm"]: row for row in of(whole[1], "fast", model="7b", batch=1)}
    stock = rows["stock SDPA"]["kv_bytes"]
    assert rows["25 drop"]["kv_bytes"] / stock == (12 + 16 / 4) / 28
    assert rows["25 exact"]["kv_bytes"] / stock == (12 + 16 / 2 + 16 / 8) / 28
    assert all(row["peak_bytes"] > 0 for row in rows.values() if row["status"] == "ok")


def test_kernels_are_counted_for_stock_and_ours(whole: tuple[int, list[Row], str]) -> None:
    rows = [row for row in of(whole[1], "why") if row["status"] == "ok"]
    told = {(row["arm"], row["phase"]) for row in rows}
    assert told >= {(arm, phase) for arm in ("stock SDPA", "25 drop") for phase in PHASES}
    for row in rows:
        assert row["kernels"] == row["kernels_per_layer"] * 2 > 0
        assert sum(row["by_kind_ms"].values()) == pytest.approx(row["busy_ms"])


PHASES = ("prefill", "decode")


def test_a_step_that_breaks_is_a_row_and_the_others_run(
    least: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(session: Any) -> None:
        raise RuntimeError("broken for a test")

    monkeypatch.setitem(gpu.STEPS, "fast", gpu.STEPS["fast"]._replace(run=broken))
    status, rows, table = least()
    assert status == 1
    (row,) = of(rows, "fast")
    assert (row["status"], row["error"]) == ("failed", "RuntimeError: broken for a test")
    assert "broken for a test" in table
    for step in ("right", "why", "scaling", "compiled"):
        assert of(rows, step, status="ok") and not of(rows, step, status="failed")


@pytest.fixture
def one_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole run only its first race."""
    monkeypatch.setattr(gpu, "STEPS", {"fast": gpu.STEPS["fast"]})
    monkeypatch.setattr(fast, "SHARES", {"7b": 1.0})


def test_an_arm_that_breaks_is_a_row_and_the_others_are_timed(
    least: Run, one_race: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = race.Track.prefill

    def prefill(self: race.Track, called: Any, arm: arms.Arm, short: bool = False) -> Any:
        if arm.name == "25 exact":
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if arm.name == "12 exact":
            raise ValueError("of another kind\nwith more to say")
        return stock(self, called, arm, short)

    monkeypatch.setattr(race.Track, "prefill", prefill)
    status, rows, table = least()
    assert status == 1
    errors = {row["arm"]: row["error"] for row in of(rows, "fast", status="failed")}
    assert errors == {"25 exact": "out of memory", "12 exact": "ValueError: of another kind"}
    assert all(error in table for error in errors.values())
    assert {"stock SDPA", "25 drop", "12 exact/drop"} <= {
        row.get("arm") for row in of(rows, "fast", status="ok")
    }


def test_an_arm_that_breaks_leaves_the_model_as_stock(
    monkeypatch: pytest.MonkeyPatch, least: Run, one_race: None
) -> None:
    plans, write = [], race._write

    def written(session: Any, raced: Any, track: race.Track, runners: Any) -> None:
        plans.append(yopo.plan_of(track.model))
        write(session, raced, track, runners)

    monkeypatch.setattr(race.Track, "decode", lambda *_: 1 / 0)
    monkeypatch.setattr(race, "_write", written)
    status, rows, _ = least()
    assert status == 1 and plans == [None]
    errors = {row["error"] for row in of(rows, "fast", status="failed")}
    assert errors == {"ZeroDivisionError: division by zero"}


def test_arms_of_fused_weights_and_graphs_run_where_yopo_has_them(
    least: Run, one_race: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def noted(name: str) -> Callable[[Any], Any]:
        return lambda model: calls.append(name) or model

    for name in ("fuse", "unfuse", "graphed"):
        monkeypatch.setattr(yopo, name, noted(name), raising=False)
    status, rows, _ = least()
    assert status == 0
    timed = {row.get("arm") for row in of(rows, "fast", status="ok")}
    assert {"25 drop, fused", "12 drop, graphed"} <= timed
    assert calls.count("fuse") == calls.count("unfuse") > calls.count("graphed") > 0
    assert right.live_is_fused(torch.device("cpu"))["worst"] == 0


def test_without_time_every_arm_and_check_is_a_row(least: Run) -> None:
    status, rows, _ = least("--minutes", "0")
    assert status == 0
    late = [row for row in rows[1:] if row.get("note") == "time is up"]
    assert {row["step"] for row in late} == {*gpu.STEPS}
    assert {row["status"] for row in rows[1:]} == {"not run"}


def test_a_compilation_that_takes_too_long_is_stopped(
    least: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile(model: Any, **_: Any) -> Any:
        raise Late("took too long")

    def random_model(*args: Any) -> Any:
        built.append(build_one(*args))
        return built[-1]

    built: list[Any] = []
    build_one = session.random_model
    monkeypatch.setattr(session, "random_model", random_model)
    monkeypatch.setattr(gpu, "STEPS", {name: gpu.STEPS[name] for name in ("compiled", "why")})
    monkeypatch.setattr(torch, "compile", compile)
    status, rows, _ = least()
    assert status == 0 and of(rows, "why", status="ok")
    (late,) = of(rows, "compiled", status="not run", note="time is up")
    assert late["arm"] == "stock SDPA, compiled"
    assert {row["arm"] for row in of(rows, "compiled", status="ok")} == {"stock SDPA", "25 drop"}
    assert len(built) == 2, "a model that may be half changed must not be used again"


@pytest.mark.parametrize("words", [["--device", "cpu"], ["--device", "meta"], ["--device", "no"]])
def test_a_device_that_does_not_do_is_refused_with_what_does(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main(["--out", str(tmp_path / "out"), *words])
    assert end.value.code == 2
    assert "--device" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_arm_is_timed_before_the_next_is_warmed_up(
    least: Run, one_race: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Warming all of them up could take all of the time."""
    first = race._first

    def late_after_stock(track: race.Track, runner: race.Runner, deadline: Deadline) -> None:
        if runner.arm != arms.STOCK:
            deadline.end()
            return
        first(track, runner, deadline)

    monkeypatch.setattr(race, "_first", late_after_stock)
    _, rows, table = least()
    (timed,) = of(rows, "fast", status="ok")
    assert timed["arm"] == "stock SDPA" and timed["steps"] == LEAST.steps
    assert "not run: time is up" in table

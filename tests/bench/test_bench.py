"""The benchmark's plumbing on a tiny shape (figures are no business of tests), and bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import yopo.bench.memory
from yopo.bench import arms, measure
from yopo.bench.arms import Arm
from yopo.bench.random_model import Case, random_model
from yopo.bench.report import table
from yopo.commands import command_line as cli
from yopo.counting.flops import Prompt
from yopo.counting.presets import PRESETS, Shape
from yopo.engine.visual_cache import VisualCache
from yopo.models.attach import plan_of
from yopo.plan import recipes
from yopo.versions import attention_is_switchable

SIZES = ("num_hidden_layers", "num_attention_heads", "intermediate_size")
TINY = Shape(64, 96, 4, 4, 2, 128, (6, 4))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tabulate")
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    base = ["bench", "--preset", "tiny", "--dtype", "float32", "--rounds", "2", "--steps", "2"]
    assert cli.main([*base, *words]) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("mass", ["drop", "exact", "exact/drop", "sink"])
@pytest.mark.parametrize("batch", ["1", "3"])
def test_last_line_is_json_with_every_arm(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, mass: str, batch: str
) -> None:
    words = ["--mass", mass, "--batch", batch, "--images", "2", "--out", str(tmp_path)]
    result = run(capsys, *words)
    assert result["mass"] == mass
    for key in ("prefill_ratio_vs_sdpa", "prefill_ideal_ratio", "decode_ratio_vs_sdpa"):
        assert result[key] > 0
    names = {"stock SDPA", "stock eager", "masked simulation", "yopo"}
    names |= {"yopo, drop"} if mass == "sink" else set()
    assert result["prefill_median_s"].keys() == names
    old = {} if attention_is_switchable() else {"stock eager": "needs transformers 4.48"}
    assert result.get("failed", {}) == old
    assert all(result["prefill_median_s"][name] for name in names - old.keys())
    rows = list(csv.DictReader((tmp_path / "results.csv").open(encoding="utf-8")))
    assert {row["arm"] for row in rows} == names
    assert (tmp_path / "results.png").read_bytes()[:4] == b"\x89PNG"


def test_ours_by_live_weights_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "--arms", "live")
    assert result["prefill_median_s"].keys() == {"stock SDPA", "yopo, live", "yopo"}


@pytest.mark.parametrize(("plan", "fraction"), [("25", 0.25), ("12", 0.125)])
def test_visual_keys_and_values_kept_are_those_of_the_plan(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, plan: str, fraction: float
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", Shape(64, 96, 4, 4, 4, 128, (6, 4)))
    result = run(capsys, "--plan", plan, "--arms", "yopo")
    assert result["kv_visual_fraction"] == fraction


# Key heads read: both, then one, then none in two layers; exact mass takes the keys of the others.
@pytest.mark.parametrize(("mass", "fraction"), [("drop", 6 / 16), ("exact", 11 / 16)])
def test_of_shared_key_heads_the_visual_share_is_what_the_cache_holds(
    capsys: pytest.CaptureFixture[str], mass: str, fraction: float
) -> None:
    assert run(capsys, "--mass", mass, "--arms", "yopo")["kv_visual_fraction"] == fraction


def test_a_plan_for_all_layers_is_thinned_out_for_some(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    recipes.paper_25(4, 4).with_mass("exact/drop").save_to(
        config := dict.fromkeys(SIZES, 4) | {"intermediate_size": 96}
    )
    (tmp_path / "plan.json").write_text(json.dumps(config["yopo"]))
    words = ["--plan", str(tmp_path / "plan.json"), "--arms", "yopo", "--layers", "2"]
    assert run(capsys, *words)["layers"] == 2


def test_a_plan_per_layer_is_timed_without_the_released_codes_simulation(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sizes = dict.fromkeys(SIZES, 4) | {"intermediate_size": 96}
    recipes.vica(sizes, layers=[1, 2]).save(tmp_path / "vica.json")
    result = run(capsys, "--plan", str(tmp_path / "vica.json"), "--layers", "4", "--mass", "sink")
    assert "masked simulation" not in result["prefill_median_s"]
    assert "yopo" not in result.get("failed", {})
    assert result["kv_visual_fraction"] == 0.5 and result["mass"] == "sink"
    # Drop in the sinks' place runs beside it, for what sinks cost.
    assert result["prefill_ratio_vs_drop"] > 0 and result["decode_ratio_vs_drop"] > 0


def test_arms_whose_scores_do_not_fit_are_left_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is overcommitted nothing would be raised: the process would be killed."""
    monkeypatch.setattr(measure, "square_bytes", lambda *_: 2**50)
    result = run(capsys)
    assert "out of memory: needs about" in result["failed"]["masked simulation"]
    assert "stock eager" in result["failed"]
    assert result["prefill_ratio_vs_sdpa"] > 0 and len(result["failed"]) == 2


def test_peaks_do_not_depend_on_who_ran_before(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a plan both arms run the same code, and take the same memory."""
    monkeypatch.setitem(PRESETS, "tiny", Shape(512, 2048, 2, 4, 4, 128, (24, 24)))
    peaks = run(capsys, "--plan", "none", "--batch", "4", "--arms", "yopo")["peak_bytes"]
    assert peaks["stock SDPA"] > 2**24
    assert peaks["yopo"] == pytest.approx(peaks["stock SDPA"], rel=0.01)


def test_the_peak_is_of_what_is_held_at_once() -> None:
    def work() -> int:
        first = torch.zeros(1000, 100)
        second = torch.zeros(3000, 100)
        del first
        return int(torch.zeros(500, 100).sum() + second.sum())

    peak, result = yopo.bench.memory.peak_of(work, torch.device("cpu"))
    assert result == 0 and 1_600_000 <= peak < 1_610_000


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("CUDA out of memory. Tried to allocate 2 GiB", True),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate", True),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_which_errors_are_of_memory(message: str, expected: bool) -> None:
    assert yopo.bench.memory.is_out_of_memory(RuntimeError(message)) == expected
    assert not yopo.bench.memory.is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(("words", "mass"), [([], "exact/drop"), (["--mass", "exact"], "exact")])
def test_masses_of_a_plan_from_a_file_hold_unless_told_otherwise(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: list[str], mass: str
) -> None:
    recipes.paper_25(4, 4).with_mass("exact/drop").save_to(
        config := dict.fromkeys(SIZES, 4) | {"intermediate_size": 96}
    )
    (tmp_path / "plan.json").write_text(json.dumps(config))
    words = ["--plan", str(tmp_path / "plan.json"), "--arms", "yopo", "--steps", "0", *words]
    assert run(capsys, *words)["mass"] == mass


def test_without_a_plan_nothing_is_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, "--plan", "none")
    assert result["prefill_ideal_ratio"] == 1
    assert "masked simulation" not in result["prefill_median_s"]


@torch.inference_mode()
def test_stock_arms_run_stock_and_ours_runs_pruned() -> None:
    """In any order, since each round goes through all of them."""
    device = torch.device("cpu")
    model = random_model(TINY, torch.float32, device)
    case = Case.of(Prompt.around((TINY.grid,), 6), 1, TINY, torch.float32, device)
    plan = recipes.paper_25(4, 4)
    every = arms.arms_of(arms.ARMS, model, plan, case)
    for arm in every + every:
        if arm.failed:  # eager, where this transformers cannot switch to it
            continue
        arm.enter()
        ours = arm.name == "yopo"
        assert (plan_of(model) == plan) if ours else (plan_of(model) is None)
        assert (type(model) is transformers.LlamaForCausalLM) != ours
        assert isinstance(arm.prefill(), VisualCache) == ours


def test_out_of_memory_in_one_arm_leaves_the_others(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(arms, "simulate", full)
    result = run(capsys)
    assert result["failed"]["masked simulation"] == "out of memory"
    assert result["prefill_ratio_vs_sdpa"] > 0


def test_an_error_that_is_not_memory_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(arms, "simulate", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main(["bench", "--preset", "tiny", "--dtype", "float32"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "llava-9"], "allowed: llava-1.5-7b"),
        (["--layers", "5"], "tiny has 4"),
        (["--layers", "0"], "tiny has 4"),
        (["--device", "cuda:77"], "--device cuda:77 cannot be used here"),
        (["--dtype", "int4"], "allowed: bfloat16"),
        (["--plan", "26"], "--plan is '26'"),
        (["--mass", "some"], "--mass is 'some'"),
        (["--batch", "0"], "--batch is 0"),
        (["--text-tokens", "1"], "--text-tokens is 1"),
        (["--arms", "sdpa,flash"], "flash"),
        (["--threads", "0"], "--threads is 0"),
        (["--device", "meta"], "--device is 'meta'; allowed: cpu"),
        (["--plan", "none", "--mass", "some"], "--mass is 'some'"),
        (["--grid", "4"], "--grid is '4'"),
        (["--out", __file__], "cannot be made"),
        (["--plan", __file__], "is not JSON"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert cli.main(["bench", "--preset", "tiny", *words]) == 2
    error = capsys.readouterr().err.splitlines()
    assert [line for line in error if message in line and line.startswith("yopo: error:")]


def test_shapes_that_do_not_fit_say_what_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Memory", (), {"available": 2 * 2**30})
    monkeypatch.setattr(yopo.bench.memory.psutil, "virtual_memory", lambda: free)
    assert cli.main(["bench", "--preset", "llava-1.5-7b"]) == 2
    assert "--layers 3 would" in capsys.readouterr().err


def test_table_leaves_out_what_was_not_measured() -> None:
    failed = Arm("stock SDPA", lambda: None, failed="out of memory")
    done = Arm("yopo", lambda: None, prefill_s=[1.0, 3.0, 2.0])
    result = {"prefill_ideal_ratio": 3.0, "kv_visual_fraction": None, "prefill_floor_s": {}}
    lines = table([failed, done], result).splitlines()
    assert "out of memory" in lines[2]
    assert "2.000" in lines[3] and "1.000–3.000" in lines[3]

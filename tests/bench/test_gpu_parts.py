"""The parts of benchmarks/gpu.py that a rehearsal on the CPU does not reach: its clock, what it
counts in a trace of a GPU, what it takes for wrong, and how it watches the layers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layouts import SHAPE, a_plan, build, left_padded
from packaging.version import Version

if Version(transformers.__version__) < Version("4.57"):
    pytest.skip("the check is written for a machine with recent versions", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpu_steps import right, why
from gpu_steps.clock import Clock, Late, time_limit
from gpu_steps.watch import Watch

import yopo

Row = dict[str, Any]


def test_the_bell_rings_only_within_its_time() -> None:
    with pytest.raises(Late), time_limit(0.01):
        while True:
            pass
    with time_limit(60):
        pass


def test_what_one_part_leaves_over_goes_to_the_next() -> None:
    clock = Clock(1000, {"a": 1, "b": 1, "c": 2})
    assert clock.deadline("a").left == pytest.approx(250, abs=1)
    assert clock.deadline("b").left == pytest.approx(1000 / 3, abs=1)
    assert clock.deadline("c").left == pytest.approx(1000, abs=1)
    assert Clock(0, {"a": 1}).deadline("a").over


def test_fused_weights_that_compute_something_else_are_found_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def spoil(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight.data.mul_(1.01)

    monkeypatch.setattr(yopo, "fuse", spoil, raising=False)
    monkeypatch.setattr(yopo, "unfuse", lambda model: model, raising=False)
    row = right.live_is_fused(torch.device("cpu"))
    assert row["status"] == "failed" and row["worst"] > row["allowed"]


def test_nan_is_not_right() -> None:
    assert right.judged(float("nan"), 1.0)["status"] == "failed"
    worst = right._worst([0.1, float("nan"), 0.2])
    assert worst != worst


def test_the_host_may_not_wait_in_the_layers_but_between_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes = ["default"]
    seen: list[tuple[str, str]] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    model = yopo.apply(build(SHAPE, cls=transformers.LlamaForCausalLM), a_plan())
    for name in ("norm", "embed_tokens"):
        getattr(model.model, name).register_forward_hook(lambda *_: seen.append(("out", modes[-1])))
    for layer in model.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda *_: seen.append(("in", modes[-1])))
    with torch.no_grad(), Watch(model.model.layers) as watch:
        model(**left_padded().kwargs())
    assert watch.calls == SHAPE.layers and modes[-1] == "default"
    assert {*seen} == {("in", "error"), ("out", "default")}


def test_a_wait_in_a_layer_fails_and_the_mode_is_taken_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    model = build(SHAPE, cls=transformers.LlamaForCausalLM)

    def wait(*_: Any) -> None:
        assert modes[-1] != "error", "waits for the device"

    model.model.layers[1].mlp.register_forward_pre_hook(wait)
    with pytest.raises(AssertionError, match="waits"), Watch(model.model.layers):
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    assert modes[-1] == "default"
    model(input_ids=torch.ones(1, 3, dtype=torch.long))  # nothing is left watching


@pytest.mark.parametrize("mass", right.MASSES)
def test_every_call_of_a_layer_is_watched(mass: str, monkeypatch: pytest.MonkeyPatch) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    row = right.watched(mass, torch.device("cpu"))
    if mass == "sink" and "status" in row:
        assert row["status"] == "not there yet" and "sink" in row["note"]
    else:
        assert row["calls"] == modes.count("error") == SHAPE.layers * (1 + right.DECODED)


NAMES = {
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64, 4>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::Params)": "attention",
    "nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT": "products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64": "products",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16>": "products",
    "void cublasLt::splitKreduce_kernel<32, 16, int>": "products",
    "Memcpy HtoD (Pageable -> Device)": "copies",
    "void at::native::elementwise_kernel<128, 4, direct_copy_kernel_cuda>": "copies",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy<OpaqueType<2>>": "copies",
    "void at::native::vectorized_gather_kernel<16, long>": "copies",
    "void at::native::reduce_kernel<512, 1, ReduceOp<float, MeanOps>>": "reductions",
    "void at::native::vectorized_elementwise_kernel<4, silu_kernel>": "elementwise",
    "void at::native::vectorized_elementwise_kernel<4, MulFunctor<float>>": "elementwise",
    "aten::addmm": "products",
    "aten::mul": "elementwise",
    "something_else": "other",
}


@pytest.mark.parametrize("name", NAMES)
def test_kernels_are_told_apart_by_name(name: str) -> None:
    assert why.kind_of(name) == NAMES[name]


def test_a_trace_of_a_gpu_gives_the_time_it_was_busy() -> None:
    """Two kernels at once count once; what ran on the host does not count."""

    def event(category: str, name: str, start: float, took: float) -> Row:
        return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": took}

    trace = [
        event("kernel", "nvjet_a", 100, 50),
        event("kernel", "flash_fwd", 120, 50),
        event("gpu_memcpy", "Memcpy DtoD", 300, 10),
        event("cpu_op", "aten::mm", 0, 90),
        event("gpu_user_annotation", "ProfilerStep", 0, 900),
        {"ph": "M", "name": "process_name"},
    ]
    figures = why.summary(why.device_work(trace), layers=3)
    assert (figures["kernels"], figures["kernels_per_layer"]) == (3, 1)
    assert figures["busy_ms"] == pytest.approx(0.08)
    assert figures["by_kind_ms"] == {"attention": 0.05, "products": 0.05, "copies": 0.01}
    with pytest.raises(RuntimeError, match="no kernel"):
        why.summary([], layers=3)


def test_a_trace_of_a_cpu_counts_no_operation_twice() -> None:
    spans = {
        "aten::linear": (0, 9),
        "aten::mm": (1, 2),
        "aten::to": (10, 9),
        "aten::copy_": (11, 5),
        "aten::view": (20, 1),
    }
    trace = [
        {"cat": "cpu_op", "name": name, "ts": start, "dur": took}
        for name, (start, took) in spans.items()
    ]
    found = [work.name for work in why.host_work(trace)]
    assert found == ["aten::linear", "aten::copy_", "aten::view"]

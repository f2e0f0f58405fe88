"""Two processes with a model in parts, or a copy each: as one process with a whole model, or
refused by name. A hang fails by gloo's own patience (process_pair.py)."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import layouts
import pytest
import torch
import transformers
from packaging.version import Version
from process_pair import COUNT, Processes
from random_families import KINDS
from sharded import (
    Outcome,
    Setting,
    alone,
    alone_on_the_first,
    in_ddp,
    in_fsdp,
    in_fsdp_by_transformers,
    in_tp,
    in_zero,
    remove_in_parts,
    split,
    split_by_hand,
)

import yopo

TOLERANCE = 1e-5

pytestmark = pytest.mark.skipif(
    not KINDS["llava-llama"].exists, reason="this transformers is older than the families' support"
)
expected = lru_cache(maxsize=None)(alone)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    made = Processes(tmp_path_factory.mktemp("processes"))
    yield made
    made.stop()


def check(found: list[Outcome], setting: Setting, tolerance: float = TOLERANCE) -> None:
    whole = Setting(setting.kind, setting.images, setting.masses)
    for ours, theirs in zip(found, expected(whole), strict=True):
        for mine, right in ((ours.before, theirs.before), (ours.after, theirs.after)):
            assert (mine[0] - right[0]).abs().max() < tolerance
            if tolerance == TOLERANCE:
                assert torch.equal(mine[1], right[1])
        assert abs(ours.loss - theirs.loss) < tolerance
        assert ours.weights.keys() == theirs.weights.keys()
        for name, weight in ours.weights.items():
            assert (weight - theirs.weights[name]).abs().max() < tolerance, name


needs_fsdp = pytest.mark.skipif(
    Version(torch.__version__).release < (2, 6), reason="fully_shard is new in torch 2.6"
)


def has_module(name: str) -> bool:
    """Whether a module is there; find_spec alone raises where the package around it is not."""
    package = name.rpartition(".")[0]
    return (not package or has_module(package)) and importlib.util.find_spec(name) is not None


needs_loading_in_parts = pytest.mark.skipif(
    not has_module("transformers.distributed.mixin"),
    reason="this transformers does not shard while it loads",
)
ONE_IMAGE = Setting(images="first only", masses=("drop", "drop"))


@needs_fsdp
@pytest.mark.parametrize(
    "setting",
    [
        Setting(),
        Setting(masses=("drop", "drop"), apply="after"),
        Setting(checkpointing=True),
        ONE_IMAGE,
        replace(ONE_IMAGE, checkpointing=True, apply="after"),
        replace(ONE_IMAGE, kind="llama"),
        Setting(kind="internvl-phi3"),
        Setting(options=(("reshard_after_forward", False),)),
        Setting(options=(("offload", True),)),
        Setting(options=(("decoder", True),), apply="after"),
        Setting(options=(("parts", ("self_attn", "mlp")),), apply="after"),
        Setting(options=(("parts", ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj")),)),
    ],
    ids=str,
)
def test_fsdp_is_one_process(setting: Setting, processes: Processes) -> None:
    check(processes.run(in_fsdp, setting), setting)


@needs_fsdp
@pytest.mark.parametrize("images", ["both", "first only"])
def test_fsdp_in_bfloat16_is_near(images: str, processes: Processes) -> None:
    setting = Setting(images=images, options=(("bfloat16", True),))
    check(processes.run(in_fsdp, setting), setting, tolerance=0.2)


@needs_fsdp
def test_a_plan_is_taken_off_a_sharded_model_or_stays(processes: Processes) -> None:
    assert processes.run(remove_in_parts, Setting(apply="after")) == [""] * COUNT
    for said in processes.run(remove_in_parts, Setting()):
        assert "as FSDP2's fully_shard does" in said and "remove the plan before that" in said


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    setting, made = Setting(), tmp_path_factory.mktemp("pruned")
    yopo.apply(setting.model(), setting.plan).save_pretrained(made)
    return str(made)


@needs_loading_in_parts
def test_a_pruned_checkpoint_loaded_in_parts(processes: Processes, folder: str) -> None:
    setting = Setting(apply="by loading")
    check(processes.run(in_fsdp_by_transformers, setting, folder), setting)


SHARED = {
    "exact": Setting(),
    "drop": Setting(masses=("drop", "drop"), apply="after"),
    "sink": Setting(masses=("sink", "sink"), apply="by loading"),
    "exact, lopsided": Setting(lopsided=True, apply="after"),
    "drop, lopsided": Setting(masses=("drop", "drop"), lopsided=True, apply="by loading"),
    "sink/drop, lopsided": Setting(masses=("sink", "drop"), lopsided=True, apply="after"),
}


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.57"), reason="not tried with older transformers"
)
@pytest.mark.parametrize("setting", SHARED.values(), ids=SHARED)
@pytest.mark.parametrize(
    "given",
    [{"tp_plan": "auto"}, pytest.param({"tp_size": COUNT}, marks=needs_loading_in_parts)],
    ids=str,
)
def test_tensor_parallelism_of_transformers(
    given: dict[str, Any], setting: Setting, processes: Processes, tmp_path: Path
) -> None:
    model = setting.model()
    if setting.apply != "after":
        yopo.apply(model, setting.plan)
    model.save_pretrained(tmp_path)
    right = alone_on_the_first(setting)
    for found in processes.run(in_tp, setting, str(tmp_path), given):
        for ours, theirs in ((found.before, right.before), (found.after, right.after)):
            assert (ours[0] - theirs[0]).abs().max() < TOLERANCE
            assert torch.equal(ours[1], theirs[1])
        assert abs(found.loss - right.loss) < TOLERANCE
        assert found.weights.keys() == right.weights.keys()
        for name, weight in found.weights.items():
            assert (weight - right.weights[name]).abs().max() < TOLERANCE, name


@needs_loading_in_parts
@pytest.mark.parametrize("when", ["by loading", "after"])
def test_pipeline_parallelism_of_transformers_is_refused(
    when: str, processes: Processes, tmp_path: Path
) -> None:
    from transformers import LlamaForCausalLM

    model = layouts.build(layouts.SHAPE, None, LlamaForCausalLM)
    yopo.apply(model, Setting().plan).save_pretrained(tmp_path)
    given = {"distributed_config": {"pp_size": COUNT}}
    for said in processes.run(split, Setting(apply=when), LlamaForCausalLM, str(tmp_path), given):
        assert "TypeError: this LlamaForCausalLM is split over processes by pipeline" in said


@needs_fsdp
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    "parts",
    [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
        ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    ],
    ids=["heads", "neurons"],
)
def test_projections_split_by_hand_are_refused(
    parts: tuple[str, ...], when: str, processes: Processes
) -> None:
    for said in processes.run(split_by_hand, Setting(apply=when), parts):
        assert "split over processes" in said and "Load the model whole" in said


@pytest.mark.parametrize(
    "setting",
    [
        Setting(apply="after"),
        ONE_IMAGE,
        replace(ONE_IMAGE, checkpointing=True),
        replace(ONE_IMAGE, options=(("find_unused_parameters", True),)),
        replace(ONE_IMAGE, options=(("static_graph", True),)),
    ],
    ids=str,
)
def test_a_copy_in_each_process_is_one_process(setting: Setting, processes: Processes) -> None:
    check(processes.run(in_ddp, setting), setting)


@pytest.fixture(scope="module")
def zero_processes(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Processes]:
    """Of their own: what DeepSpeed sets up lasts as long as the process."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    made = Processes(tmp_path_factory.mktemp("zero"))
    yield made
    made.stop()


@pytest.mark.parametrize("leaf", [False, True], ids=["as yopo has it", "every layer"])
@pytest.mark.parametrize(
    "setting",
    [
        Setting(),
        Setting(masses=("drop", "drop"), checkpointing=True, apply="after"),
        Setting("internvl-phi3"),
        # The tower would be gathered for by one process only, pruned or not.
        replace(ONE_IMAGE, kind="llama"),
        replace(ONE_IMAGE, kind="llama", checkpointing=True, apply="after"),
    ],
    ids=str,
)
def test_zero_3_is_one_process(setting: Setting, leaf: bool, zero_processes: Processes) -> None:
    setting = replace(setting, options=(("leaf", leaf),))
    check(zero_processes.run(in_zero, setting), setting)

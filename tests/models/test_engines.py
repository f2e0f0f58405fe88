"""Several steps of training, a checkpoint, and going on from one, by each engine in two processes:
as in one process with a whole model. What is shown differs from process to process, and from step
to step. A hang fails by gloo's own patience (process_pair.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import accelerate
import pytest
import torch
import transformers
from engines import (
    Course,
    leaves,
    loaded,
    logits_of,
    resumed,
    saved,
    saved_by_tensor_parallelism,
    trained,
    trained_alone,
)
from packaging.version import Version
from process_pair import COUNT, Processes
from random_families import KINDS
from sharded import Setting

import yopo

TOLERANCE = 1e-5
DROP, SINK = ("drop", "drop"), ("sink", "sink")

pytestmark = pytest.mark.skipif(
    not KINDS["llava-llama"].exists, reason="this transformers is older than the families' support"
)
ENGINES = ["ddp", "fsdp", "zero-1", "zero-2", "zero-3"]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    made = Processes(tmp_path_factory.mktemp("engines"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def zero_processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Of their own: what DeepSpeed sets up lasts as long as the process."""
    made = Processes(tmp_path_factory.mktemp("zero"))
    yield made
    made.stop()


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(engine: str, request: pytest.FixtureRequest) -> Processes:
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
        return request.getfixturevalue("zero_processes")
    if engine == "fsdp" and Version(torch.__version__).release < (2, 6):
        pytest.skip("fully_shard is new in torch 2.6")
    return request.getfixturevalue("processes")


@pytest.mark.parametrize("shown", ["both", "changing"])
@pytest.mark.parametrize(
    "setting",
    [
        Setting(),
        Setting(masses=DROP, checkpointing=True, apply="after"),
        Setting(masses=SINK),
        Setting(masses=DROP, lopsided=True, checkpointing=True),
    ],
    ids=["exact", "drop, checkpointing, apply after", "sink", "lopsided, checkpointing"],
)
def test_training_is_one_process_s(
    engine: str, shown: str, setting: Setting, pair: Processes
) -> None:
    if engine == "zero-3" and shown == "changing":
        # The tower would be gathered for by one process only, pruned or not.
        setting = replace(setting, kind="llama")
    check(pair, Course(engine, shown, setting))


def check(pair: Processes, course: Course) -> None:
    for ours, theirs in zip(pair.run(trained, course), trained_alone(course), strict=True):
        assert ours.losses == pytest.approx(theirs.losses, abs=TOLERANCE)
        assert ours.weights.keys() == theirs.weights.keys()
        for name, weight in ours.weights.items():
            assert (weight - theirs.weights[name]).abs().max() < TOLERANCE, name


FROZEN = {
    "embeddings": ("embed_tokens",),
    "and a layer": ("embed_tokens", "layers.0."),
    "all but the projector": ("embed_tokens", "language_model", "lm_head"),
}


@pytest.mark.parametrize("frozen", FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_of_parts_is_one_process_s(
    engine: str, frozen: tuple[str, ...], checkpointing: bool, pair: Processes
) -> None:
    setting = Setting(masses=DROP, checkpointing=checkpointing)
    check(pair, Course(engine, setting=setting, frozen=frozen))


@pytest.mark.parametrize("way", ["fused", "distilled", "tightened"])
def test_other_ways_of_training_are_one_process_s(engine: str, way: str, pair: Processes) -> None:
    check(pair, Course(engine, setting=Setting(masses=DROP), way=way))


def test_a_copy_whose_projector_not_every_process_uses(processes: Processes) -> None:
    """Has a plan or has none: DDP must be told, or names the parameters."""
    course = Course("ddp", "unused", Setting(masses=DROP))
    with pytest.raises(AssertionError, match="did not receive grad for rank [01]: 0 1 2 3"):
        processes.run(trained, course)
    setting = replace(course.setting, options=(("find_unused_parameters", True),))
    check(processes, replace(course, setting=setting))


@pytest.mark.skipif(
    Version(accelerate.__version__) < Version("1.6") or Version(torch.__version__).release < (2, 6),
    reason="accelerate's FSDP2 is newer",
)
@pytest.mark.parametrize("shown", ["both", "changing"])
def test_fsdp_as_accelerate_prepares_it(shown: str, processes: Processes) -> None:
    check(processes, Course("accelerate", shown, Setting(masses=SINK)))


# The first layer's input may need no gradient; then DeepSpeed would reduce a leaf's too early.
LEAVES = [
    (Course("zero-3"), (), [False, True, True]),
    (Course("zero-3"), (1,), [False, False, True]),
    (Course("zero-3", frozen=FROZEN["and a layer"]), (), [True, False, True]),
    (Course("zero-3", frozen=FROZEN["all but the projector"]), (), [True, True, True]),
    (Course("zero-3", "changing", Setting("llama", masses=DROP)), (), [False, True, True]),
]


@pytest.mark.parametrize("case", LEAVES, ids=str)
def test_layers_are_leaf_modules_under_zero_3_unless_unset(
    case: tuple[Course, tuple[int, ...], list[bool]], zero_processes: Processes
) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    course, unset, expected = case
    hooked = 7 * expected.count(False)
    assert zero_processes.run(leaves, course, unset) == [(expected, hooked)] * COUNT


@pytest.mark.parametrize("masses", [SINK, DROP], ids=["sink", "drop"])
@pytest.mark.parametrize("apply", ["before", "after"])
def test_what_is_saved_is_loaded_with_its_plan(
    engine: str, masses: tuple[str, str], apply: str, pair: Processes, tmp_path: Path
) -> None:
    course = Course(engine, setting=Setting(masses=masses, apply=apply))
    found = pair.run(saved, course, str(tmp_path))
    for rank in range(COUNT):
        right = logits_of(loaded(course, str(tmp_path)), course.steps(rank)[-1])
        assert (found[rank] - right).abs().max() < TOLERANCE


def test_training_goes_on_where_it_was_stopped(
    engine: str, pair: Processes, tmp_path: Path
) -> None:
    course = Course(engine, setting=Setting(masses=SINK))
    for on, again in pair.run(resumed, course, str(tmp_path)):
        assert again == pytest.approx(on, abs=1e-6)


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.57"), reason="not tried with older transformers"
)
@pytest.mark.parametrize("lopsided", [False, True])
def test_what_is_saved_under_tensor_parallelism_is_loaded_with_its_plan(
    lopsided: bool, processes: Processes, tmp_path: Path
) -> None:
    setting = Setting(masses=SINK, lopsided=lopsided)
    dense, folder = str(tmp_path / "dense"), str(tmp_path / "pruned")
    setting.model().save_pretrained(dense)
    given = {"tp_plan": "auto"}
    found = processes.run(saved_by_tensor_parallelism, setting, dense, folder, given)
    right = logits_of(loaded(Course("", setting=setting), folder), setting.seen(0))
    for rank in range(COUNT):
        assert (found[rank] - right).abs().max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3], ids=["ddp", "zero-2", "zero-3"])
def test_a_script_with_transformers_trainer(stage: int, one_process: Path, tmp_path: Path) -> None:
    """Which prepares by accelerate; ZeRO-3 has weights in parts as they are loaded, with a plan."""
    if stage:
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={COUNT}"]
    run_script(launch, one_process / "pruned", tmp_path, stage)
    folders = tmp_path, one_process
    ours, theirs = (json.loads((path / "losses.json").read_text()) for path in folders)
    assert ours == pytest.approx(theirs, abs=TOLERANCE)
    # Loaded, not read: under ZeRO-3 transformers saves other names, which it reads again.
    course = Course("", setting=Setting(masses=SINK))
    weights, right = (dict(loaded(course, str(path)).named_parameters()) for path in folders)
    assert weights.keys() == right.keys()
    for name, weight in weights.items():
        assert (weight - right[name]).abs().max() < TOLERANCE, name


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a plan in "pruned", and what the script makes of it in one process."""
    folder, setting = tmp_path_factory.mktemp("trainer"), Setting(masses=SINK)
    yopo.apply(setting.model(), setting.plan).save_pretrained(folder / "pruned")
    run_script([], folder / "pruned", folder, 0)
    return folder


def run_script(launch: list[str], checkpoint: Path, output: Path, stage: int) -> None:
    script = Path(__file__).parents[1] / "support" / "trainer_script.py"
    paths = os.pathsep.join(map(str, (script.parents[2], script.parent)))
    done = subprocess.run(
        [sys.executable, *launch, script, checkpoint, output, str(stage)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr

"""The engines that people train on, each used as their own documentation has it: a model in parts,
or a copy each, in two processes. What test_engines.py compares with one process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from process_pair import COUNT
from sharded import Seen, Setting, loss_of, patched, stack_of
from torch import Tensor

import yopo
from yopo.plan.pruning_plan import PruningPlan

RATE, MOMENTUM = 0.05, 0.9
# By name, what is shown step by step (see BATCHES): what processes do in a step differs from the
# step before, and from process to process.
COURSES = {
    "both": ("both", "lengths", "both"),
    "changing": ("both", "first only", "none", "lengths", "second only"),
    # The projector is trained, and not used by each process.
    "unused": ("first only", "second only", "both"),
}


@dataclass(frozen=True)
class Course:
    """Some steps of training. engine: "ddp", "fsdp", "accelerate" (its FSDP2) or "zero-" and a
    stage; shown: one of COURSES; frozen: parts of names of parameters, beside those that the
    setting freezes. way: "fused", by a model whose weights are; "distilled", by its dense self;
    "tightened", under another plan in the first step."""

    engine: str
    shown: str = "both"
    setting: Setting = field(default_factory=Setting)
    frozen: tuple[str, ...] = ()
    way: str = ""

    def steps(self, rank: int) -> list[Seen]:
        names = COURSES[self.shown]
        return [replace(self.setting, images=name).seen(rank) for name in names]

    def model(self) -> Any:
        """With its plan, unless that comes later."""
        setting = replace(self.setting, images=COURSES[self.shown][-1])
        model = setting.model()
        for name, parameter in model.named_parameters():
            if any(part in name for part in self.frozen):
                parameter.requires_grad_(False)
        if setting.checkpointing:
            model.gradient_checkpointing_enable()
        if setting.apply == "before":
            yopo.apply(model, setting.plan)
        return yopo.fuse(model) if self.way == "fused" else model

    def loss(self, model: Any, seen: Seen) -> Tensor:
        if self.way == "distilled":
            return yopo.distillation_loss(model, {**seen.given, "labels": seen.labels})[0]
        return loss_of(model, seen, False)

    def plan_of(self, number: int) -> PruningPlan:
        """Of the step of this number."""
        plan = self.setting.plan
        if number or self.way != "tightened":
            return plan
        return replace(plan, head_keep=torch.ones_like(plan.head_keep), layer_cut=None)


def optimizer_of(model: Any) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=RATE, momentum=MOMENTUM)


class Copies:
    """DistributedDataParallel."""

    def __init__(self, model: Any, **options: Any) -> None:
        from torch.nn.parallel import DistributedDataParallel

        self.called = DistributedDataParallel(model, **options)
        self.model = model
        self.optimizer = optimizer_of(model)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}

    def save(self, folder: str, rank: int) -> None:
        if rank == 0:
            self.model.save_pretrained(folder)

    def keep(self, folder: str) -> None:
        held = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(held, Path(folder, "kept.pt"))

    def take_up(self, folder: str) -> None:
        held = torch.load(Path(folder, "kept.pt"), weights_only=True)
        self.model.load_state_dict(held["model"])
        self.optimizer.load_state_dict(held["optimizer"])


class Sharded(Copies):
    """FSDP2, a layer a unit; checkpoints by torch.distributed.checkpoint."""

    def __init__(self, model: Any, **options: Any) -> None:
        from torch.distributed.fsdp import fully_shard

        for layer in stack_of(model).layers:
            fully_shard(layer, **options)
        self.called = self.model = fully_shard(model, **options)
        self.optimizer = optimizer_of(model)

    def weights(self) -> dict[str, Tensor]:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
        )

        # Rank 0 alone has it where it goes to the CPU.
        whole = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))
        return {name: whole[name] for name, _ in self.model.named_parameters()}

    def save(self, folder: str, rank: int) -> None:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            get_model_state_dict,
        )

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_model_state_dict(self.model, options=options)
        if rank == 0:
            self.model.save_pretrained(folder, state_dict=state)

    def keep(self, folder: str) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)

    def take_up(self, folder: str) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

        model, optimizer = get_state_dict(self.model, self.optimizer)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        set_state_dict(
            self.model, self.optimizer, model_state_dict=model, optim_state_dict=optimizer
        )


class AccelerateSharded(Sharded):
    """FSDP2 as accelerate prepares it, which on CPUs does not do so by itself."""

    def __init__(self, model: Any) -> None:
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState, DistributedType

        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            "LOCAL_WORLD_SIZE": f"{COUNT}",
        }
        layer = type(stack_of(model).layers[0]).__name__
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=[layer],
        )
        AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = Accelerator(cpu=True)
        self.accelerator.state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = plugin
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer_of(model))
        self.called = self.model


class Zero(Copies):
    """DeepSpeed's ZeRO, of a `stage`."""

    def __init__(self, model: Any, stage: int, **options: Any) -> None:
        import deepspeed

        small = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": stage} | small | options,
        }
        given = dict(model=model, optimizer=optimizer_of(model), config=config)
        self.model, self.stage = model, stage
        self.called = deepspeed.initialize(**given)[0]

    def step(self, loss: Tensor) -> None:
        self.called.backward(loss)
        self.called.step()

    def weights(self) -> dict[str, Tensor]:
        import deepspeed

        weights = {}
        for name, parameter in self.model.named_parameters():
            held = [parameter] if self.stage == 3 else []
            with deepspeed.zero.GatheredParameters(held):
                weights[name] = parameter.detach().clone()
        return weights

    def save(self, folder: str, rank: int) -> None:
        # What accelerate's get_state_dict does; of the others each process has a whole copy.
        state = self.called._zero3_consolidated_16bit_state_dict() if self.stage == 3 else None
        if rank == 0:
            self.model.save_pretrained(folder, state_dict=state)

    def keep(self, folder: str) -> None:
        self.called.save_checkpoint(folder)

    def take_up(self, folder: str) -> None:
        path, _ = self.called.load_checkpoint(folder)
        assert path


@contextmanager
def made(course: Course) -> Iterator[Any]:
    name, _, stage = course.engine.partition("-")
    options = dict(course.setting.options)
    if stage:
        options["stage"] = int(stage)
    model = course.model()
    engine = {"ddp": Copies, "fsdp": Sharded, "accelerate": AccelerateSharded, "zero": Zero}[name](
        model, **options
    )
    if course.setting.apply == "after":
        yopo.apply(engine.model, course.setting.plan)
    engine.called.train()
    yield engine


@dataclass
class Trained:
    losses: list[float]
    weights: dict[str, Tensor]


def trained(rank: int, course: Course) -> Trained:
    """By an engine."""
    with made(course) as engine:
        losses = []
        for number, seen in enumerate(course.steps(rank)):
            yopo.apply(engine.model, course.plan_of(number))
            losses.append(stepped(engine, course, seen))
        if course.engine != "ddp":  # where weights lie as they lay
            assert not any("_yopo_laid" in vars(module) for module in engine.model.modules())
        return Trained(losses, engine.weights())


def stepped(engine: Any, course: Course, seen: Seen) -> float:
    loss = course.loss(engine.called, seen)
    engine.step(loss)
    return loss.item()


def trained_alone(course: Course) -> list[Trained]:
    """What each process should find, in one process with a whole model."""
    model = replace(course, setting=replace(course.setting, apply="before"), way="").model()
    optimizer = optimizer_of(model)
    model.train()
    losses = []
    steps = zip(*(course.steps(rank) for rank in range(COUNT)), strict=True)
    for number, every in enumerate(steps):
        yopo.apply(model, course.plan_of(number))
        each = [course.loss(model, seen) for seen in every]
        torch.stack(each).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append([loss.item() for loss in each])
    weights = {name: p.detach() for name, p in model.named_parameters()}
    return [Trained(list(ours), weights) for ours in zip(*losses, strict=True)]


def logits_of(model: Any, seen: Seen) -> Tensor:
    with torch.no_grad():
        return model(**seen.given, use_cache=False).logits[seen.labels >= 0]


def saved(rank: int, course: Course, folder: str) -> Tensor:
    """Trains, saves, and gives the logits at the last step's tokens."""
    with made(course) as engine:
        for seen in course.steps(rank):
            stepped(engine, course, seen)
        engine.called.eval()
        logits = logits_of(engine.called, seen)
        engine.save(folder, rank)
        torch.distributed.barrier()
        return logits


def loaded(course: Course, folder: str) -> Any:
    """The model in the folder, which has the plan, in one process."""
    with patched():
        model = type(course.setting.model()).from_pretrained(folder).eval()
    assert yopo.plan_of(model) == course.setting.plan
    return model


def resumed(rank: int, course: Course, folder: str) -> tuple[list[float], list[float]]:
    """Losses of the steps after the first, by an engine that stops to keep its state there and goes
    on, and by one that takes it up."""
    first, *rest = course.steps(rank)
    with made(course) as engine:
        stepped(engine, course, first)
        engine.keep(folder)
        torch.distributed.barrier()
        on = [stepped(engine, course, seen) for seen in rest]
    with made(course) as engine:
        engine.take_up(folder)
        return on, [stepped(engine, course, seen) for seen in rest]


def saved_by_tensor_parallelism(
    rank: int, setting: Setting, dense: str, folder: str, given: dict[str, Any]
) -> Tensor:
    """The same by a model that transformers splits while it loads it; both processes see the first
    one's rows."""
    with patched():
        model = type(setting.model()).from_pretrained(dense, **given)
    yopo.apply(model, setting.plan)
    setting.frozen(model).train()
    seen, optimizer = setting.seen(0), optimizer_of(model)
    loss_of(model, seen, False).backward()
    optimizer.step()
    model.eval()
    model.save_pretrained(folder)
    torch.distributed.barrier()
    return logits_of(model, seen)


def leaves(rank: int, course: Course, unset: tuple[int, ...]) -> tuple[list[bool], int]:
    """Of ZeRO-3, after the steps: which layers are its leaf modules, where the user has unset those
    of numbers in `unset`; and how many linears of layers have hooks."""
    import deepspeed

    model = course.model()
    for number in unset:
        deepspeed.utils.set_z3_leaf_module(stack_of(model).layers[number], False)
    engine = Zero(model, 3)
    for seen in course.steps(rank):
        stepped(engine, course, seen)
    layers = stack_of(model).layers
    hooked = [m for m in layers.modules() if isinstance(m, torch.nn.Linear) and m._forward_hooks]
    return [deepspeed.utils.z3_leaf_module(layer) for layer in layers], len(hooked)

"""What the processes of test_processes.py run: a tiny model, whole or in parts, that sees its own
half of the batches, takes one step of training and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import layouts
import torch
from family_checks import a_plan, some_sinks
from process_pair import COUNT
from random_families import KINDS, build, make
from torch import Tensor

import yopo
from yopo.plan.pruning_plan import PruningPlan

RATE = 0.1
PICTURE = [("text", 3), ("image", 0), ("text", 4)]
# By name, what each process sees: rows of different lengths, in different numbers.
BATCHES = {
    "both": ([PICTURE, [("text", 6)]], [[("image", 0), ("text", 2), ("image", 0), ("text", 5)]]),
    "first only": ([PICTURE, [("text", 6)]], [[("text", 9)], [("text", 5)], [("text", 7)]]),
    "second only": ([[("text", 4)]], [PICTURE, [*PICTURE, *PICTURE], [("text", 6)]]),
    "none": ([[("text", 6)], [("text", 3)]], [[("text", 9)]]),
    "lengths": ([[*PICTURE, ("text", 30)]], [[("image", 0), ("text", 2)]]),
}


@dataclass(frozen=True)
class Seen:
    """One process's batch: the arguments of forward, and labels (-100 at padding)."""

    given: dict[str, Any]
    labels: Tensor


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    kind: of random_families.py, or "llama" by itself, given embeddings. images: which of BATCHES.
    masses: of the plan. checkpointing: of gradients. apply: the plan "before" or "after" the model
    is put in parts. options: of what puts it in parts. lopsided: the plan keeps heads and neurons
    of one half alone, or none.
    """

    kind: str = "llava-llama"
    images: str = "both"
    masses: tuple[str, str] = ("exact", "exact")
    checkpointing: bool = False
    apply: str = "before"
    options: tuple[tuple[str, Any], ...] = ()
    lopsided: bool = False

    @property
    def plan(self) -> PruningPlan:
        changes: dict[str, Any] = dict(head_mass=self.masses[0], cut_mass=self.masses[1])
        if "sink" in self.masses:
            # Of the same sizes as this Llama's.
            changes["sinks"] = some_sinks(KINDS.get(self.kind, KINDS["llava-llama"]))
        plan = a_plan(**changes)
        if not self.lopsided:
            return plan
        keep = plan.head_keep.clone()
        keep[0, plan.num_heads // 2 :], keep[1] = False, False
        keep[0, 0] = True
        ffn = (3, 0) + (None,) * (plan.num_layers - 2)
        attends = (True,) + (False,) * (plan.num_layers - 1)
        return replace(
            plan, head_keep=keep, ffn_ratio=1, ffn=ffn, visual_attention=attends, layer_cut=2
        )

    def model(self) -> Any:
        """Without the plan."""
        if self.kind == "llama":
            from transformers import LlamaForCausalLM

            return layouts.build(layouts.SHAPE, None, LlamaForCausalLM)
        return self.frozen(build(KINDS[self.kind]))

    def frozen(self, model: Any) -> Any:
        """With the tower frozen, as LLaVA trains; where one process sees no image the projector,
        too: torch waits for gradients that are not there, pruned or not."""
        names = ["vision_tower"] + ["projector"] * (self.images not in ("both", "lengths"))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in names))
        return model

    def seen(self, rank: int) -> Seen:
        rows = BATCHES[self.images][rank]
        if self.kind == "llama":
            sides = {"text": lambda n: ("text", n), "image": lambda _: ("image", 3, 3, False)}
            laid = [[sides[what](number) for what, number in row] for row in rows]
            case = layouts.make_case(laid, layouts.SHAPE.heads * layouts.HEAD_DIM, seed=rank)
            generator = torch.Generator().manual_seed(rank)
            labels = torch.randint(layouts.VOCAB, case.shape, generator=generator)
            # Of embeddings without a gradient DeepSpeed frees the first layer before its backward.
            case.inputs_embeds.requires_grad_()
            return Seen(case.kwargs(), labels.masked_fill(~case.valid, -100))
        batch = make(KINDS[self.kind], rows, seed=rank)
        # Positions are not this model's business: stock makes them.
        given = batch.inputs(None, positions=False)
        return Seen(given, batch.ids.masked_fill(batch.mask == 0, -100))


def stack_of(model: Any) -> Any:
    return getattr(model.model, "language_model", model.model)


@contextmanager
def patched() -> Iterator[None]:
    """yopo.patch within the block, also where its import has just brought it."""
    from yopo import patch

    patch.enable()
    try:
        yield
    finally:
        patch.undo()


def answers(model: Any, seen: Seen) -> tuple[Tensor, Tensor]:
    """Logits at the tokens, without a cache and with one; and the tokens that are generated."""
    inner = getattr(model, "module", model)
    with torch.no_grad():
        outs = [model(**seen.given, use_cache=cached).logits for cached in (False, True)]
        tokens = inner.generate(**seen.given, max_new_tokens=3, do_sample=False)
    return torch.stack([out[seen.labels >= 0] for out in outs]).float(), tokens


def loss_of(model: Any, seen: Seen, cached: bool) -> Tensor:
    return model(**seen.given, labels=seen.labels, use_cache=cached).loss


@dataclass
class Outcome:
    """before, after: the answers on both sides of the step; loss: of it; weights: after it, whole,
    by name."""

    before: tuple[Tensor, Tensor]
    after: tuple[Tensor, Tensor]
    loss: float
    weights: dict[str, Tensor]


def alone(setting: Setting) -> list[Outcome]:
    """What each process should find, in one process with a whole model."""
    model = yopo.apply(setting.model(), setting.plan)
    every = [setting.seen(rank) for rank in range(COUNT)]
    before = [answers(model, seen) for seen in every]
    model.train()
    losses = [loss_of(model, seen, False) for seen in every]
    torch.stack(losses).mean().backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    model.eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = [answers(model, seen) for seen in every]
    return [
        Outcome(*of_one, loss.item(), weights)
        for *of_one, loss in zip(before, after, losses, strict=True)
    ]


def stepped(
    setting: Setting,
    rank: int,
    put_in_parts: Callable[[Any], Any],
    whole: Callable[[Any], dict[str, Tensor]],
    step: Callable[[Any, Tensor], None] | None = None,
) -> Outcome:
    """The same by a model that `put_in_parts` made of a whole one; `whole` gives its weights,
    `step` takes a step down the loss."""
    model = setting.model()
    if setting.apply == "before":
        yopo.apply(model, setting.plan)
    parts = put_in_parts(model)
    if setting.apply == "after":
        yopo.apply(parts, setting.plan)
    parts.eval()
    seen = setting.seen(rank)
    before = answers(parts, seen)
    parts.train()
    if setting.checkpointing:
        getattr(parts, "module", parts).gradient_checkpointing_enable()
    loss = loss_of(parts, seen, setting.checkpointing)
    (step or _step)(parts, loss)
    parts.eval()
    return Outcome(before, answers(parts, seen), loss.item(), whole(parts))


def _step(model: Any, loss: Tensor) -> None:
    loss.backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()


def in_fsdp(rank: int, setting: Setting) -> Outcome:
    """FSDP2: every layer, then all that is around them. "parts": of layers, by themselves;
    "decoder": so is it, and the token embeddings, which are called from outside it."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options = dict(setting.options)
    parts, decoder_too = options.pop("parts", ()), options.pop("decoder", False)
    if options.pop("bfloat16", False):
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    if options.pop("offload", False):
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)

    def put_in_parts(model: Any) -> Any:
        chosen = [layer.get_submodule(part) for layer in stack_of(model).layers for part in parts]
        stack = stack_of(model)
        decoder = (stack.embed_tokens, stack) if decoder_too else ()
        for module in (*chosen, *stack.layers, *decoder, model):
            fully_shard(module, **options)
        return model

    return stepped(setting, rank, put_in_parts, whole_weights)


def whole_weights(model: Any) -> dict[str, Tensor]:
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    return {name: p.detach().full_tensor() for name, p in model.named_parameters()}


def in_fsdp_by_transformers(rank: int, setting: Setting, folder: str) -> Outcome:
    """Loaded in parts from a checkpoint with a plan."""
    from transformers.distributed import DistributedConfig

    def put_in_parts(model: Any) -> Any:
        config = DistributedConfig(fsdp_size=COUNT)
        with patched():
            return setting.frozen(model.from_pretrained(folder, distributed_config=config).eval())

    return stepped(setting, rank, put_in_parts, whole_weights)


def remove_in_parts(rank: int, setting: Setting) -> str:
    """What is said where the plan is taken off again."""
    from torch.distributed.fsdp import fully_shard

    model = setting.model()
    seen = setting.seen(rank)
    dense, _ = answers(model, seen)
    if setting.apply == "before":
        yopo.apply(model, setting.plan)
    for layer in stack_of(model).layers:
        fully_shard(layer)
    if setting.apply == "after":
        yopo.apply(model, setting.plan)
    pruned, _ = answers(model, seen)
    assert not torch.equal(pruned, dense)
    try:
        yopo.remove(model)
    except ValueError as error:
        assert torch.equal(answers(model, seen)[0], pruned), "a refused remove changed the model"
        return str(error)
    assert torch.equal(answers(model, seen)[0], dense)
    return ""


def in_tp(rank: int, setting: Setting, folder: str, given: dict[str, Any]) -> Outcome:
    """Tensor parallelism by transformers: both processes see the first one's rows, and the loss is
    of these alone. The model is loaded with its plan, or dense and the plan put on."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor

    with patched():
        model = type(setting.model()).from_pretrained(folder, **given).eval()
    if setting.apply == "after":
        yopo.apply(model, setting.plan)
    assert dist.get_world_size() == COUNT and any(
        isinstance(p, DTensor) for p in stack_of(model).parameters()
    )
    setting.frozen(model)
    seen = setting.seen(0)
    before = answers(model, seen)
    model.train()
    loss = loss_of(model, seen, False)
    _step(model, loss)
    model.eval()
    weights = {
        name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for name, p in model.named_parameters()
    }
    return Outcome(before, answers(model, seen), loss.item(), weights)


def alone_on_the_first(setting: Setting) -> Outcome:
    """What each of `in_tp` should find."""
    model, seen = yopo.apply(setting.model(), setting.plan), setting.seen(0)
    before = answers(model, seen)
    model.train()
    loss = loss_of(model, seen, False)
    _step(model, loss)
    model.eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    return Outcome(before, answers(model, seen), loss.item(), weights)


def split(rank: int, setting: Setting, model: Any, folder: str, given: dict[str, Any]) -> str:
    """What is said of a `model` that transformers' parallelism splits while it loads it."""
    try:
        if setting.apply == "after":
            yopo.apply(model.from_pretrained(folder, **given), setting.plan)
        else:
            with patched():
                model.from_pretrained(folder, **given)
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def split_by_hand(rank: int, setting: Setting, parts: tuple[str, ...]) -> str:
    """What is said at an image where torch's own parallelize_module split projections."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model = setting.model()
    if setting.apply == "before":
        yopo.apply(model, setting.plan)
    ways = {"o_proj": RowwiseParallel, "down_proj": RowwiseParallel}
    styles = {part: ways.get(part.rpartition(".")[2], ColwiseParallel)() for part in parts}
    for layer in stack_of(model).layers:
        parallelize_module(layer, init_device_mesh("cpu", (COUNT,)), styles)
    if setting.apply == "after":
        yopo.apply(model, setting.plan)
    try:
        answers(model, setting.seen(0))  # each sees all rows
    except (TypeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def in_ddp(rank: int, setting: Setting) -> Outcome:
    """DistributedDataParallel: a whole copy each."""
    from torch.nn.parallel import DistributedDataParallel

    def whole(model: Any) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in model.module.named_parameters()}

    def put_in_parts(model: Any) -> Any:
        return DistributedDataParallel(model, **dict(setting.options))

    return stepped(setting, rank, put_in_parts, whole)


def in_zero(rank: int, setting: Setting) -> Outcome:
    """DeepSpeed's ZeRO-3; "leaf": the user has set that every layer is one."""
    import deepspeed

    def put_in_parts(model: Any) -> Any:
        if dict(setting.options).get("leaf"):
            deepspeed.utils.set_z3_leaf_modules(model, [type(stack_of(model).layers[0])])
        trained = [p for p in model.parameters() if p.requires_grad]
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        }
        optimizer = torch.optim.SGD(trained, lr=RATE)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def step(engine: Any, loss: Tensor) -> None:
        engine.backward(loss)
        engine.step()

    def whole(engine: Any) -> dict[str, Tensor]:
        weights = {}
        for name, parameter in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        return weights

    return stepped(setting, rank, put_in_parts, whole, step)

"""What the processes of test_processes.py run: a tiny model, whole or in parts, that sees its own
half of the batches, takes one step of training and answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from family_checks import a_plan
from processes import COUNT
from random_families import KINDS, Batch, build, make
from torch import Tensor, nn

import yopo
from yopo.plan.pruning_plan import PruningPlan

RATE = 0.1
PICTURE = [("text", 3), ("image", 0), ("text", 4)]
# By name, what each process sees: rows of different lengths, in different numbers.
BATCHES = {
    "both": ([PICTURE, [("text", 6)]], [[("image", 0), ("text", 2), ("image", 0), ("text", 5)]]),
    "first only": ([PICTURE, [("text", 6)]], [[("text", 9)], [("text", 5)], [("text", 7)]]),
}


@dataclass(frozen=True)
class Setting:
    """images: which of BATCHES. masses: of the plan. checkpointing: of gradients. apply: the plan
    "before" or "after" the model is put in parts. options: of what puts it in parts."""

    kind: str = "llava-llama"
    images: str = "both"
    masses: tuple[str, str] = ("exact", "exact")
    checkpointing: bool = False
    apply: str = "before"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def plan(self) -> PruningPlan:
        return a_plan(head_mass=self.masses[0], cut_mass=self.masses[1])

    def model(self) -> Any:
        """Without the plan."""
        return self.frozen(build(KINDS[self.kind]))

    def frozen(self, model: Any) -> Any:
        """With the tower frozen, as LLaVA trains; where one process sees no image the projector,
        too: torch waits for gradients that are not there, pruned or not."""
        names = ["vision_tower"] + ["projector"] * (self.images == "first only")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not any(part in name for part in names))
        return model

    def batch(self, rank: int) -> Batch:
        return make(KINDS[self.kind], BATCHES[self.images][rank], pads=None, seed=rank)


def layers_of(model: Any) -> nn.ModuleList:
    return model.model.language_model.layers


@contextmanager
def patched() -> Iterator[None]:
    """yopo.patch within the block, also where its import has just brought it."""
    from yopo import patch

    patch.enable()
    try:
        yield
    finally:
        patch.undo()


def answers(model: Any, batch: Batch) -> Tensor:
    """Logits at the tokens, twice: without a cache and with one."""
    given = batch.inputs(getattr(model, "module", model))
    with torch.no_grad():
        outs = [model(**given, use_cache=cached).logits for cached in (False, True)]
    return torch.stack([out[batch.mask.bool()] for out in outs]).float()


def loss_of(model: Any, batch: Batch, cached: bool) -> Tensor:
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    given = batch.inputs(getattr(model, "module", model))
    return model(**given, labels=labels, use_cache=cached).loss


@dataclass
class Outcome:
    """answers: before and after the step; loss: of the step; weights: after it, whole, by name."""

    answers: tuple[Tensor, Tensor]
    loss: float
    weights: dict[str, Tensor]


def alone(setting: Setting) -> list[Outcome]:
    """What each process should find, in one process with a whole model."""
    model = yopo.apply(setting.model(), setting.plan)
    batches = [setting.batch(rank) for rank in range(COUNT)]
    before = [answers(model, batch) for batch in batches]
    model.train()
    losses = [loss_of(model, batch, False) for batch in batches]
    torch.stack(losses).mean().backward()
    torch.optim.SGD(model.parameters(), lr=RATE).step()
    model.eval()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = [answers(model, batch) for batch in batches]
    return [
        Outcome((b, a), loss.item(), weights)
        for b, a, loss in zip(before, after, losses, strict=True)
    ]


def stepped(
    setting: Setting, rank: int, put_in_parts: Callable[[Any], Any], whole: Callable[[Any], Any]
) -> Outcome:
    """The same by a model that `put_in_parts` made of a whole one; `whole` has its weights."""
    model = setting.model()
    if setting.apply == "before":
        yopo.apply(model, setting.plan)
    parts = put_in_parts(model)
    if setting.apply == "after":
        yopo.apply(parts, setting.plan)
    if setting.checkpointing:
        model.gradient_checkpointing_enable()
    batch = setting.batch(rank)
    before = answers(parts, batch)
    parts.train()
    loss = loss_of(parts, batch, setting.checkpointing)
    loss.backward()
    torch.optim.SGD(parts.parameters(), lr=RATE).step()
    parts.eval()
    return Outcome((before, answers(parts, batch)), loss.item(), whole(parts))


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
        chosen = [layer.get_submodule(part) for layer in layers_of(model) for part in parts]
        stack = model.model.language_model
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
    batch, dense = setting.batch(rank), answers(model, setting.batch(rank))
    if setting.apply == "before":
        yopo.apply(model, setting.plan)
    for layer in layers_of(model):
        fully_shard(layer)
    if setting.apply == "after":
        yopo.apply(model, setting.plan)
    pruned = answers(model, batch)
    assert not torch.equal(pruned, dense)
    try:
        yopo.remove(model)
    except ValueError as error:
        assert torch.equal(answers(model, batch), pruned), "a refused remove changed the model"
        return str(error)
    assert torch.equal(answers(model, batch), dense)
    return ""


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
    for layer in layers_of(model):
        parallelize_module(layer, init_device_mesh("cpu", (COUNT,)), styles)
    if setting.apply == "after":
        yopo.apply(model, setting.plan)
    try:
        answers(model, setting.batch(0))  # each sees all rows
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

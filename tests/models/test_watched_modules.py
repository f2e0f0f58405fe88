"""The pruned pass calls the model's own modules: what is hooked, wrapped, replaced, adapted or
compiled there goes on working, or is refused by name."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import types
import warnings
from typing import Any

import pytest
import torch
from layouts import SHAPE, Case, a_plan, build, make_case
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)

import yopo
from yopo.plan.pruning_plan import PruningPlan

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@pytest.fixture
def case() -> Case:
    rows = [[("text", 2), ("image", 3, 3, False), ("text", 3)], [("text", 4)]]
    return make_case(rows, SHAPE.heads * 8)


def rows_of(case: Case) -> int:
    return int(case.valid.sum())


def logits(model: Any, case: Case) -> torch.Tensor:
    with torch.no_grad():
        return model(**case.kwargs(), use_cache=False).logits


def part(model: Any, name: str, layer: int = 1) -> nn.Module:
    module = model.model.layers[layer]
    if name in ("self_attn", "mlp"):
        return module.get_submodule(name)
    if name in PROJECTIONS:
        return module.get_submodule(("mlp." if name[0] in "gud" else "self_attn.") + name)
    return module


@pytest.mark.parametrize("plan", [a_plan(), a_plan("drop", "drop")])
@pytest.mark.parametrize("name", ["layer", "self_attn", "mlp", *PROJECTIONS])
def test_forward_hooks_see_every_row_and_what_they_change_counts(
    name: str, plan: PruningPlan, case: Case
) -> None:
    model = build(SHAPE, plan)
    before, seen = logits(model, case), []

    def hook(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        first = out[0] if isinstance(out, tuple) else out
        seen.append(first.shape[0])
        return (first + 1, *out[1:]) if isinstance(out, tuple) else first + 1

    handle = part(model, name, 0).register_forward_hook(hook, with_kwargs=True)
    changed = logits(model, case)
    handle.remove()
    assert not torch.equal(changed, before), "what the hook returned is not used"
    # The last column's pad is a row, too: next-token logits are read off it.
    assert seen == [rows_of(case) + int((~case.valid[:, -1]).sum())]
    assert torch.equal(logits(model, case), before)


@pytest.mark.parametrize("name", ["layer", "self_attn", "mlp", *PROJECTIONS])
def test_pre_hooks_run_with_the_rows(name: str, case: Case) -> None:
    model, seen = build(SHAPE, a_plan()), []

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[0])

    part(model, name, 0).register_forward_pre_hook(hook, with_kwargs=True)
    before = logits(build(SHAPE, a_plan()), case)
    assert (logits(model, case) - before).abs().max() < 1e-5
    assert len(seen) == 1 and seen[0] >= rows_of(case)


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_backward_hooks_see_the_gradient_of_every_row(kind: str, case: Case) -> None:
    model, seen = build(SHAPE, a_plan()).train(), {}
    names = ("layer", "self_attn", "mlp", *PROJECTIONS)
    for name in names:
        getattr(part(model, name, 0), f"register_full_backward_{kind}")(
            lambda module, *gradients, name=name: seen.update({name: gradients[-1][0].shape[0]})
        )
    model(**case.kwargs(), use_cache=False).logits.sum().backward()
    assert seen == dict.fromkeys(names, seen["layer"]) and seen["layer"] >= rows_of(case)


def test_a_hook_of_all_modules_is_seen_by_the_projections(case: Case) -> None:
    model, seen = build(SHAPE, a_plan()), set()
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.add(module)
    )
    try:
        logits(model, case)
    finally:
        handle.remove()
    assert {part(model, name, 0) for name in PROJECTIONS} <= seen


def test_parametrized_projections_count(case: Case) -> None:
    class Half(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight / 2

    model, same = build(SHAPE, a_plan()), build(SHAPE, a_plan())
    for name in PROJECTIONS:
        nn.utils.parametrize.register_parametrization(part(model, name), "weight", Half())
        part(same, name).weight.data /= 2
    assert (logits(model, case) - logits(same, case)).abs().max() < 1e-5


@pytest.mark.parametrize("before", [False, True])
def test_wrapped_layers_are_checkpointed_and_right(before: bool, case: Case) -> None:
    plain, model = build(SHAPE, a_plan()).train(), build(SHAPE, None).train()
    count = []

    def is_layer(module: nn.Module) -> bool:
        return "DecoderLayer" in type(module).__name__

    if not before:
        yopo.apply(model, a_plan())
    apply_activation_checkpointing(model, check_fn=is_layer)
    if before:
        yopo.apply(model, a_plan())
    model.model.layers[0].register_forward_hook(lambda *_: count.append(1))
    gradients = []
    for one in (plain, model):
        one(**case.kwargs()).logits.square().mean().backward()  # with a cache, as by default
        gradients.append([p.grad for p in one.parameters() if p.grad is not None])
    assert count == [1]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


def test_a_forward_put_on_a_layer_s_part_before_the_plan_is_refused() -> None:
    for name in ("layer", "self_attn", "mlp"):
        model = build(SHAPE, None)
        module = part(model, name)
        module.forward = types.MethodType(lambda self, *a, **k: None, module)
        with pytest.raises(ValueError, match="replaced on the instance"):
            yopo.apply(model, a_plan())
        assert yopo.plan_of(model) is None, "a refused plan must leave the model as it was"
        assert type(model.model.layers[0]) is type(build(SHAPE, None).model.layers[0])


def test_a_forward_put_on_a_part_later_is_called_or_refused(case: Case) -> None:
    model, calls = build(SHAPE, a_plan()), []
    before = logits(model, case)
    for name in ("layer", "self_attn", "mlp"):
        module = part(model, name, 0)
        own = module.forward
        module.forward = lambda *a, own=own, name=name, **k: (calls.append(name), own(*a, **k))[1]
    assert torch.equal(logits(model, case), before) and calls == ["layer", "self_attn", "mlp"]
    part(model, "mlp", 0).forward = lambda x: x
    with pytest.raises(ValueError, match="Take \\*\\*kwargs and hand them on"):
        logits(model, case)


def test_accelerate_s_preloading_brings_a_layer_s_weights(case: Case) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = build(SHAPE, a_plan())
    expected = logits(model, case)
    accelerate.disk_offload(
        model,
        tempfile.mkdtemp(),
        execution_device="cpu",
        preload_module_classes=["LlamaDecoderLayer"],
    )
    assert torch.equal(logits(model, case), expected)


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
def test_copies_and_pickles_of_a_pruned_model_are_pruned_alike(way: str, case: Case) -> None:
    model = yopo.apply(build(SHAPE, None), a_plan())
    if way == "pickle":
        made = pickle.loads(pickle.dumps(model))
    elif way == "deepcopy":
        made = copy.deepcopy(model)
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        made = torch.load(file, weights_only=False)
    assert yopo.plan_of(made) == a_plan() and torch.equal(logits(made, case), logits(model, case))
    yopo.remove(made)
    assert type(made) is type(build(SHAPE, None)) and yopo.plan_of(model) == a_plan()


def test_a_pruned_model_inside_another_module_is_copied_with_it(case: Case) -> None:
    around = nn.Sequential(nn.Linear(2, 2), yopo.apply(build(SHAPE, None), a_plan()))
    expected, made = logits(around[1], case), copy.deepcopy(around)
    yopo.remove(around[1])
    assert yopo.plan_of(made) == a_plan() and torch.equal(logits(made[1], case), expected)


def test_replicas_of_data_parallel_are_pruned(case: Case) -> None:
    """As it makes one for each device: its weights are attributes, and no parameters."""
    model = yopo.apply(build(SHAPE, None), a_plan())
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            setattr(replica, name, replicas[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.detach().clone())
    assert (logits(replicas[model], case) - logits(model, case)).abs().max() < 1e-5
    assert torch.equal(logits(nn.DataParallel(model), case), logits(model, case))


def test_an_attention_function_of_somebody_s_own_is_said_not_to_be_called(
    monkeypatch: pytest.MonkeyPatch, case: Case
) -> None:
    utils = pytest.importorskip("transformers.modeling_utils")
    if not hasattr(utils, "ALL_ATTENTION_FUNCTIONS"):
        pytest.skip("each kind of attention is a class before transformers 4.48")
    sdpa = utils.ALL_ATTENTION_FUNCTIONS["sdpa"]

    def mine(*args: Any, **kwargs: Any) -> Any:
        return sdpa(*args, **kwargs)

    model = build(SHAPE, a_plan())
    logits(model, case)  # nothing to say
    monkeypatch.setitem(utils.ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", mine)
    model.config._attn_implementation = model.model.config._attn_implementation = "mine"
    with pytest.warns(UserWarning, match="does not call the attention function .*mine"):
        logits(model, case)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits(model, case)  # said once


def test_a_compiled_layer_gives_what_it_gives(case: Case) -> None:
    model = build(SHAPE, a_plan())
    expected = logits(model, case)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    assert (logits(model, case) - expected).abs().max() < 1e-5


def test_layers_taken_out_after_the_plan_are_counted() -> None:
    model = build(SHAPE, a_plan())
    model.model.layers = model.model.layers[:2]
    with pytest.raises(ValueError, match="for 3 layers, but the model has 2"):
        logits(model, make_case([[("text", 2), ("image", 2, 2, False), ("text", 1)]], 32))

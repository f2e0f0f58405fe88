"""Training through the pruned pass: loss and gradients are the oracle's, whatever the layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from layouts import VOCAB, Case, Shape, build, make_case, random_sinks
from oracle import oracle_forward, oracle_loss
from torch import Tensor, nn

from yopo import apply
from yopo.engine import text_attention
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import DynamicCache

SHAPE = Shape(attention_bias=True)
MASS = [("exact", "exact"), ("exact", "drop"), ("drop", "exact"), ("drop", "drop")]
ROWS = [
    [("text", 2), ("image", 3, 2, True), ("text", 3)],
    [("image", 2, 2, False), ("text", 4), ("image", 1, 3, False)],
    [("text", 6)],
]


def a_plan(head_mass: str = "exact", cut_mass: str = "exact", **changes: Any) -> PruningPlan:
    values = dict(window=3, layer_cut=2, ffn_ratio=2, head_mass=head_mass, cut_mass=cut_mass)
    return PruningPlan(
        torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 0, 1]]), **(values | changes)
    )


def a_case() -> tuple[Case, Tensor]:
    case = make_case(ROWS, SHAPE.heads * 8, pads=[(1, 0), (0, 1), (1, 1)])
    labels = torch.randint(VOCAB, case.shape, generator=torch.Generator().manual_seed(5))
    first = case.valid & ~F.pad(case.valid, (1, -1))  # padding predicts these
    return case, labels.masked_fill(case.visual | ~case.valid | first, -100)


def oracle_gradients(
    model: Any, plan: PruningPlan, case: Case, labels: Tensor
) -> dict[str, Tensor]:
    model.zero_grad()
    out = oracle_forward(
        model, plan, case.inputs_embeds, case.layout, case.attention_mask, case.position_ids
    )
    loss = oracle_loss(out.logits, labels)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach()} | found


def engine_gradients(model: Any, case: Case, labels: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss = model(**case.kwargs(), labels=labels).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach()} | found


def near(ours: dict[str, Tensor], truth: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    for name in truth.keys() | ours.keys():
        a, b = ours.get(name), truth.get(name)
        a = torch.zeros_like(b) if a is None else a  # unused and zero gradient are one
        b = torch.zeros_like(a) if b is None else b
        assert torch.isfinite(a).all(), name
        worst = (a.double() - b.double()).abs().max().item()
        assert worst <= tolerance, f"{name} differs by {worst:.3g}"


@pytest.mark.parametrize("keep_visual_queries", [False, True])
@pytest.mark.parametrize("masses", MASS, ids="/".join)
def test_gradients_are_the_oracles(masses: tuple[str, str], keep_visual_queries: bool) -> None:
    plan = a_plan(*masses, prune_visual_queries=not keep_visual_queries)
    case, labels = a_case()
    case.inputs_embeds.requires_grad_()
    model = build(SHAPE, plan).train()
    truth = oracle_gradients(model, plan, case, labels)
    truth["embeds"], case.inputs_embeds.grad = case.inputs_embeds.grad, None
    ours = engine_gradients(model, case, labels)
    ours["embeds"] = case.inputs_embeds.grad
    near(ours, truth)


@pytest.mark.parametrize("mass", ["sink", "window_causal", "no window", "none kept"])
def test_gradients_of_other_plans(mass: str) -> None:
    plan = {
        "sink": a_plan("sink", "sink", sinks=random_sinks(SHAPE, 3, True)),
        "window_causal": a_plan(window_causal=True),
        "no window": a_plan(window=None),
        "none kept": PruningPlan(torch.zeros(3, 4), window=5, head_mass="drop"),
    }[mass]
    case, labels = a_case()
    model = build(SHAPE, plan).train()
    near(engine_gradients(model, case, labels), oracle_gradients(model, plan, case, labels))


@pytest.mark.parametrize("masses", [*MASS, ("sink", "sink")], ids="/".join)
def test_gradients_of_long_texts(masses: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_attention, "LONG", 1)
    sinks = random_sinks(SHAPE, 3, True) if "sink" in masses else None
    plan = a_plan(*masses, sinks=sinks)
    case = make_case(ROWS, SHAPE.heads * 8)
    labels = torch.randint(VOCAB, case.shape, generator=torch.Generator().manual_seed(5))
    labels = labels.masked_fill(case.visual | ~case.valid, -100)
    model = build(SHAPE, plan).train()
    near(engine_gradients(model, case, labels), oracle_gradients(model, plan, case, labels))


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("masses", [MASS[0], MASS[3]], ids="/".join)
def test_gradient_checkpointing(masses: tuple[str, str], reentrant: bool | None) -> None:
    plan = a_plan(*masses)
    case, labels = a_case()
    case.inputs_embeds.requires_grad_()  # reentrant checkpoints need an input that wants gradients
    model = build(SHAPE, plan).train()
    plain = engine_gradients(model, case, labels)
    chosen = {} if reentrant is None else {"use_reentrant": reentrant}
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=chosen or None)
    near(engine_gradients(model, case, labels), plain, 1e-6)


def test_gradient_checkpointing_computes_layers_twice() -> None:
    """It must really checkpoint: the layers' projections run again in the backward pass."""
    case, labels = a_case()
    case.inputs_embeds.requires_grad_()
    model = build(SHAPE, a_plan()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ran: list[int] = []
    model.model.layers[1].post_attention_layernorm.register_forward_hook(lambda *_: ran.append(1))
    loss = model(**case.kwargs(), labels=labels).loss
    forward = len(ran)
    loss.backward()
    assert forward > 0 and len(ran) == 2 * forward


@pytest.mark.parametrize("masses", [MASS[0], MASS[3]], ids="/".join)
def test_three_steps_of_sgd(masses: tuple[str, str]) -> None:
    """Weights change between passes: nothing kept from an earlier one may be used."""
    plan = a_plan(*masses)
    case, labels = a_case()
    ours, theirs = build(SHAPE, plan), build(SHAPE, plan)
    with torch.no_grad():
        ours(**case.kwargs())  # may pack weights
    for _ in range(3):
        for model in (ours, theirs):
            model.train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            if model is ours:
                loss = model(**case.kwargs(), labels=labels).loss
            else:
                out = oracle_forward(
                    model, plan, case.inputs_embeds, case.layout, case.attention_mask
                )
                loss = oracle_loss(out.logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in pairs) < 1e-4
    ours.eval()
    with torch.no_grad():  # the packed copy of before the training is stale
        out = ours(**case.kwargs()).logits
        truth = oracle_forward(theirs, plan, case.inputs_embeds, case.layout, case.attention_mask)
    assert (out - truth.logits)[case.valid].abs().max() < 1e-3


@pytest.mark.parametrize(
    "change",
    ["in place", "data", "data in place", "merged", "load_state_dict", "new parameter", "dtype"],
)
@torch.no_grad()
def test_weights_changed_after_the_first_image(change: str) -> None:
    plan = a_plan()
    case, _ = a_case()
    model = build(SHAPE, plan)
    model(**case.kwargs())
    name = "model.layers.0.self_attn.q_proj.weight"
    linear = model.model.layers[0].self_attn.q_proj
    if change == "in place":
        linear.weight.mul_(0.5)
    elif change == "data":
        linear.weight.data = linear.weight.data * 0.5
    elif change == "data in place":  # as optimizers of old do: no version counter moves
        linear.weight.data.mul_(0.5)
    elif change == "merged":  # as PEFT merges an adapter
        linear.weight.data += 0.3 * torch.ones_like(linear.weight)
    elif change == "load_state_dict":
        model.load_state_dict({name: linear.weight * 0.5}, strict=False)
    elif change == "new parameter":
        linear.weight = nn.Parameter(linear.weight * 0.5)
    else:
        model.to(torch.float64)
        case.inputs_embeds = case.inputs_embeds.double()
    out = model(**case.kwargs()).logits
    truth = oracle_forward(model, plan, case.inputs_embeds, case.layout, case.attention_mask)
    assert (out - truth.logits)[case.valid].abs().max() < 1e-4


def test_training_after_inference_mode() -> None:
    """What inference_mode (LLaVA's generate runs there) leaves must not reach autograd."""
    plan = a_plan()
    case, labels = a_case()
    model = build(SHAPE, plan)
    with torch.inference_mode():
        model(**case.kwargs())
    model.train()
    near(engine_gradients(model, case, labels), oracle_gradients(model, plan, case, labels))


def test_a_model_built_in_inference_mode() -> None:
    plan = a_plan()
    case, _ = a_case()
    with torch.inference_mode():
        model = build(SHAPE, plan)
        for _ in range(2):
            out = model(**case.kwargs()).logits
        truth = oracle_forward(model, plan, case.inputs_embeds, case.layout, case.attention_mask)
        assert (out - truth.logits)[case.valid].abs().max() < 1e-4


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("masses", [MASS[0], MASS[3]], ids="/".join)
def test_autocast(masses: tuple[str, str], adapted: bool) -> None:
    """Mixed precision, as the Trainer's bf16: near the oracle, and finite gradients."""
    plan = a_plan(*masses)
    case, labels = a_case()
    model = build(SHAPE, plan).train()
    truth = oracle_forward(model, plan, case.inputs_embeds, case.layout, case.attention_mask)
    if adapted:
        replace_linears(model, Adapted)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(**case.kwargs(), labels=labels, use_cache=True)
        step = model(
            inputs_embeds=case.inputs_embeds[:, :1],
            attention_mask=F.pad(case.attention_mask, (0, 1), value=1),
            past_key_values=out.past_key_values,
        )
    assert step.logits.isfinite().all()
    out.loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads and all(grad.isfinite().all() for grad in grads)
    if not adapted:
        assert (out.logits - truth.logits)[case.valid].abs().mean() < 0.1


class Quantised(nn.Module):
    """Like an 8-bit layer: its weight is no matrix that could be sliced."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter(
            (linear.weight / self.scale).round().to(torch.int8).flatten(), False
        )
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(self.out_features, self.in_features) * self.scale
        return F.linear(x, weight.to(x.dtype), self.bias)

    def dense(self) -> Tensor:
        return self.weight.view(self.out_features, self.in_features) * self.scale


class QuantisedLinear(nn.Linear):
    """bitsandbytes' layers are subclasses of nn.Linear."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None)
        self.inner = Quantised(linear)
        self.weight = nn.Parameter(self.inner.weight, False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)

    def dense(self) -> Tensor:
        return self.inner.dense()


class Adapted(nn.Module):
    """Like PEFT's LoRA: `.weight` is the base's, which lacks the adapter."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.base_layer = linear
        generator = torch.Generator().manual_seed(9)
        self.down = nn.Parameter(torch.randn(2, linear.in_features, generator=generator) * 0.1)
        self.up = nn.Parameter(torch.randn(linear.out_features, 2, generator=generator) * 0.5)

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + x @ self.down.T @ self.up.T

    def dense(self) -> Tensor:
        return self.base_layer.weight + self.up @ self.down


def replace_linears(model: Any, cls: type) -> dict[str, Tensor]:
    """Puts `cls` around every projection of the layers; returns the weights that it amounts to."""
    dense = {}
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and ".layers." in name:
            parent, _, child = name.rpartition(".")
            wrapped = cls(module)
            setattr(model.get_submodule(parent), child, wrapped)
            dense[f"{name}.weight"] = wrapped.dense().detach()
    return dense


@pytest.mark.parametrize("masses", MASS, ids="/".join)
@pytest.mark.parametrize("cls", [Quantised, QuantisedLinear, Adapted])
@torch.no_grad()
def test_projections_that_are_no_plain_linear(cls: type, masses: tuple[str, str]) -> None:
    plan = a_plan(*masses)
    case, _ = a_case()
    model, equivalent = build(SHAPE, plan), build(SHAPE)
    equivalent.load_state_dict(replace_linears(model, cls), strict=False)
    truth = oracle_forward(equivalent, plan, case.inputs_embeds, case.layout, case.attention_mask)
    out = model(**case.kwargs(), use_cache=True)
    assert (out.logits - truth.logits)[case.valid].abs().max() < 1e-4


def test_gradients_reach_adapters() -> None:
    plan = a_plan("drop", "drop")
    case, labels = a_case()
    model, equivalent = build(SHAPE, plan).train(), build(SHAPE, plan).train()
    equivalent.load_state_dict(replace_linears(model, Adapted), strict=False)
    truth = oracle_gradients(equivalent, plan, case, labels)
    ours = engine_gradients(model, case, labels)
    for name in ("q_proj", "v_proj", "o_proj"):
        prefix = f"model.layers.0.self_attn.{name}"
        adapter = model.get_submodule(prefix)
        expected = truth[f"{prefix}.weight"]
        near({"down": ours[f"{prefix}.down"]}, {"down": adapter.up.T @ expected})
        near({"up": ours[f"{prefix}.up"]}, {"up": expected @ adapter.down.T})
    expected = truth["model.layers.2.mlp.gate_proj.weight"]
    adapter = model.get_submodule("model.layers.2.mlp.gate_proj")
    near({"up": ours["model.layers.2.mlp.gate_proj.up"]}, {"up": expected @ adapter.down.T})


@torch.no_grad()
def test_hooks_on_a_projection_run() -> None:
    """A plain nn.Linear with a forward hook gives what the hook makes of it."""
    plan = a_plan()
    case, _ = a_case()
    model = build(SHAPE, plan)
    plain = model(**case.kwargs()).logits
    handle = model.model.layers[0].mlp.down_proj.register_forward_hook(lambda m, i, out: out * 2)
    doubled = model(**case.kwargs()).logits
    handle.remove()
    twice = build(SHAPE, plan)
    twice.model.layers[0].mlp.down_proj.weight.mul_(2)
    truth = oracle_forward(twice, plan, case.inputs_embeds, case.layout, case.attention_mask)
    assert (doubled - truth.logits)[case.valid].abs().max() < 1e-4
    assert torch.equal(model(**case.kwargs()).logits, plain)


def test_a_plan_applied_in_inference_mode_still_trains() -> None:
    case, labels = a_case()
    model = build(SHAPE, None).train()
    with torch.inference_mode():
        apply(model, a_plan())
    assert engine_gradients(model, case, labels)["loss"].isfinite()


def test_a_cache_and_gradient_checkpointing_are_refused() -> None:
    case, labels = a_case()
    model = build(SHAPE, a_plan()).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(**case.kwargs(), labels=labels, past_key_values=DynamicCache())

"""fuse and unfuse: the same answers by weights that lie side by side, the model's own parameters as
they were, and live weights wherever somebody looks at, moves or replaces one."""

from __future__ import annotations

import copy
import io
import pickle
import tempfile
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import SHAPE, Case, a_plan, build, cases, make_case, plans, shapes
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

import yopo
from yopo.models import layers as pruned_layers

ROWS = [[("text", 2), ("image", 3, 3, False), ("text", 3)], [("text", 4)]]
pytestmark = pytest.mark.skipif(not hasattr(F, "rms_norm"), reason="torch has no rms_norm")


@pytest.fixture
def case() -> Case:
    return make_case(ROWS, SHAPE.heads * 8)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers ran by fused weights."""
    count, run_fused = [0], pruned_layers.run_fused

    def counted(*args: Any) -> Tensor:
        count[0] += 1
        return run_fused(*args)

    monkeypatch.setattr(pruned_layers, "run_fused", counted)
    return count


def fused_model(**plan: Any) -> Any:
    return yopo.fuse(build(SHAPE, a_plan(**plan)))


@torch.no_grad()
def logits(model: Any, case: Case) -> Tensor:
    return model(**case.kwargs(), use_cache=False).logits


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(before) and all(torch.equal(now[n], before[n]) for n in before)


@settings(deadline=None, max_examples=30)
@given(st.data())
@torch.no_grad()
def test_fused_is_live_on_random_layouts_in_prefill_and_decode(data: Any) -> None:
    shape = data.draw(shapes())
    plan = data.draw(plans(shape))
    case = data.draw(cases(shape.heads * 8))
    model = build(shape, plan)
    token = torch.zeros(case.shape[0], 1, dtype=torch.long)
    mask = torch.cat([case.valid, torch.ones(case.shape[0], 1, dtype=torch.bool)], 1).long()

    def answers() -> list[Tensor]:
        first = model(**case.kwargs(), use_cache=True)
        past = first.past_key_values
        more = model(input_ids=token, attention_mask=mask, past_key_values=past)
        return [first.logits[case.valid], more.logits]

    live = answers()
    for ours, expected in zip(yopo.fuse(model) and answers(), live, strict=True):
        assert (ours - expected).abs().max() <= 2e-5 * (1 + expected.abs().max())


@pytest.mark.parametrize("mass", ["exact", "drop"])
def test_all_layers_run_fused_and_the_weights_keep_names_order_and_bits(
    mass: str, case: Case, ran: list[int]
) -> None:
    model = build(SHAPE, a_plan(mass, mass))
    live, before, kept = logits(model, case), bits(model), list(model.parameters())
    assert yopo.fuse(model) is model
    assert torch.allclose(logits(model, case), live, atol=1e-5)
    assert ran == [len(model.model.layers)]
    assert same_bits(model, before)
    assert all(a is b for a, b in zip(model.parameters(), kept, strict=True))
    yopo.unfuse(model)
    assert same_bits(model, before) and torch.equal(logits(model, case), live)
    assert ran == [len(model.model.layers)]


def test_no_weight_is_held_twice_while_fused() -> None:
    model = fused_model()
    attn = model.model.layers[0].self_attn
    whole = model.model.layers[0]._yopo_laid.weights[0].qkv.weight
    assert attn.q_proj.weight.data_ptr() == whole.data_ptr()
    assert attn.k_proj.weight.data_ptr() == whole[attn.q_proj.weight.shape[0] :].data_ptr()
    yopo.unfuse(model)
    assert attn.q_proj.weight.data_ptr() != whole.data_ptr()


def test_without_an_image_stock_runs_with_the_same_bits() -> None:
    tokens = torch.arange(1, 15).view(2, 7)
    with torch.no_grad():
        assert torch.equal(fused_model()(tokens).logits, build(SHAPE)(tokens).logits)


def test_remove_gives_every_weight_memory_of_its_own_and_the_same_bits() -> None:
    model = build(SHAPE)
    before = bits(model)
    yopo.remove(yopo.fuse(yopo.apply(model, a_plan())))
    assert same_bits(model, before)
    assert not any("_yopo_laid" in vars(layer) for layer in model.model.layers)


def test_saved_while_fused_and_loaded_again(case: Case, tmp_path: Path) -> None:
    model = fused_model()
    before, expected = bits(model), logits(model, case)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert {n for n in before if "_proj" in n} <= set(file.keys())
    import yopo.patch

    with yopo.patch.patched():
        again = type(build(SHAPE)).from_pretrained(tmp_path)
    assert same_bits(again, before)
    assert torch.allclose(logits(again, case), expected, atol=1e-5)
    torch.save(model.state_dict(), buffer := io.BytesIO())
    assert len(buffer.getvalue()) < 1.5 * sum(p.numel() * 4 for p in model.parameters()) + 2e5


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict({n: 2 * v for n, v in m.state_dict().items()}),
        lambda m: m.model.layers[1].self_attn.k_proj.weight.data.mul_(2),
        lambda m: setattr(
            m.model.layers[1].self_attn.k_proj.weight,
            "data",
            2 * m.model.layers[1].self_attn.k_proj.weight.data,
        ),
        lambda m: setattr(
            m.model.layers[1].mlp.up_proj,
            "weight",
            nn.Parameter(2 * m.model.layers[1].mlp.up_proj.weight.data),
        ),
        lambda m: m.model.layers[1].mlp.add_module("up_proj", nn.Linear(32, 24, bias=False)),
        lambda m: m.model.layers[0].input_layernorm.weight.data.mul_(2),
        lambda m: m.double().float(),
        lambda m: setattr(m.model.layers[0].input_layernorm, "variance_epsilon", 0.5),
        lambda m: m.model.layers[0].self_attn.o_proj.weight.data.zero_(),
        lambda m: setattr(m.model.layers[0].self_attn.q_proj, "bias", nn.Parameter(torch.ones(32))),
        lambda m: setattr(m.model.layers[0].mlp.down_proj, "bias", nn.Parameter(torch.ones(32))),
        lambda m: setattr(
            m.model.layers[0].self_attn.q_proj.weight,
            "data",
            m.model.layers[0].self_attn.q_proj.weight.data.t(),
        ),
    ],
)
def test_whatever_is_done_to_a_weight_counts(change: Callable[[Any], Any], case: Case) -> None:
    model = fused_model()
    logits(model, case)
    torch.manual_seed(0)
    change(model)
    fused = logits(model, case)
    expected = logits(yopo.unfuse(model), case)
    assert torch.allclose(fused, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["q_proj", "o_proj", "up_proj", "down_proj", "self_attn", "mlp"])
def test_a_hook_put_on_a_fused_model_is_called(name: str, case: Case, ran: list[int]) -> None:
    model = fused_model()
    module = next(m for n, m in model.model.layers[1].named_modules() if n.endswith(name))
    seen: list[Any] = []
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match=f"{name} is watched"):
        logits(model, case)
    assert seen and ran == [len(model.model.layers) - 1]
    handle.remove()
    logits(model, case)
    assert ran == [2 * len(model.model.layers) - 1]


def test_a_hook_on_a_layer_is_called_and_the_layer_stays_fused(case: Case, ran: list[int]) -> None:
    model = fused_model()
    expected, seen = logits(model, case), []
    model.model.layers[0].register_forward_hook(lambda _, args, out: seen.append(args[0].shape))
    assert torch.equal(logits(model, case), expected)
    assert seen == [(int(case.valid.sum()) + 1, SHAPE.heads * 8)]  # and a pad in the last column
    assert ran == [2 * len(model.model.layers)]


def test_with_gradients_weights_are_read_live(case: Case, ran: list[int]) -> None:
    model, live = fused_model(), build(SHAPE, a_plan())
    for each in (model, live):
        each(**case.kwargs(), use_cache=False).logits.sum().backward()
    assert ran == [0]
    for ours, expected in zip(model.parameters(), live.parameters(), strict=True):
        assert (ours.grad is None) == (expected.grad is None)
        assert ours.grad is None or torch.equal(ours.grad, expected.grad)


@pytest.fixture
def peft() -> Any:
    pytest.importorskip("torch.distributed.tensor", reason="peft needs it, and does not import it")
    return pytest.importorskip("peft")


def test_an_adapter_put_on_a_fused_model_counts(case: Case, peft: Any) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = []
    for model in (fused_model(), build(SHAPE, a_plan())):
        torch.manual_seed(3)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted.append(logits(peft.get_peft_model(model, config).eval(), case))
    assert torch.allclose(*adapted, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.train(), "training mode"),
        (lambda m: yopo.remove(m), "no plan"),
        (lambda m: m.model.layers[2].mlp.up_proj.register_forward_hook(print), "layer 2.*watched"),
        (lambda m: m.model.layers[1].self_attn.q_proj.to(torch.float64), "several kinds"),
        (
            lambda m: setattr(
                m.model.layers[2].mlp.up_proj, "weight", m.model.layers[1].mlp.up_proj.weight
            ),
            "in common",
        ),
        (lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.Softmax(-1)), "activation"),
    ],
)
def test_what_cannot_be_fused_is_refused_by_name_and_nothing_is_changed(
    change: Callable[[Any], Any], words: str
) -> None:
    model = build(SHAPE, a_plan())
    change(model)
    before = {name: value.data_ptr() for name, value in model.named_parameters()}
    with pytest.raises(ValueError, match=words):
        yopo.fuse(model)
    assert {name: value.data_ptr() for name, value in model.named_parameters()} == before
    assert not model.model.__dict__.get("yopo_fused")


def test_a_model_with_an_adapter_is_refused(peft: Any) -> None:
    model = build(SHAPE, a_plan())
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"]))
    with pytest.raises(ValueError, match=r"layer 0.*v_proj is a Linear.*adapter"):
        yopo.fuse(model)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["deepcopy", "pickle"],
)
def test_a_copy_has_weights_of_its_own(copied: Callable[[Any], Any], case: Case) -> None:
    model = fused_model()
    expected = logits(model, case)
    twin = copied(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.allclose(logits(twin, case), expected, atol=1e-5)


def test_what_was_moved_is_not_held_where_it_was() -> None:
    model = fused_model()
    whole = weakref.ref(model.model.layers[0]._yopo_laid.weights[0].qkv.weight)
    model.double()
    assert whole() is None


def test_unfuse_in_inference_mode_leaves_weights_that_can_be_trained(case: Case) -> None:
    model = fused_model()
    with torch.inference_mode():
        yopo.unfuse(model)
    assert not any(parameter.is_inference() for parameter in model.parameters())
    model(**case.kwargs(), use_cache=False).logits.sum().backward()


def test_unfuse_parts_weights_that_are_watched_too() -> None:
    model = fused_model()
    attn = model.model.layers[0].self_attn
    attn.q_proj.register_forward_hook(lambda *_: None)
    yopo.unfuse(model)
    end = attn.q_proj.weight.data_ptr() + 4 * attn.q_proj.weight.numel()
    assert attn.k_proj.weight.data_ptr() != end


def test_a_linear_whose_forward_somebody_replaced_is_called(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, seen = nn.Linear.forward, []

    def counted(self: nn.Linear, x: Tensor) -> Tensor:
        seen.append(1)
        return forward(self, x)

    monkeypatch.setattr(nn.Linear, "forward", counted)
    model = build(SHAPE, a_plan())
    with pytest.raises(ValueError, match="the forward of Linear is"):
        yopo.fuse(model)
    model.model.yopo_fused = True
    with pytest.warns(UserWarning, match="the forward of Linear is"):
        logits(model, case)
    assert len(seen) > 3


def test_under_vmap_weights_are_read_live(case: Case) -> None:
    model = fused_model()
    named = {n: torch.stack([p, 2 * p]) for n, p in model.named_parameters() if "q_proj" in n}

    def run(values: dict[str, Tensor]) -> Tensor:
        given = {**case.kwargs(), "use_cache": False}
        return torch.func.functional_call(model, values, (), given).logits

    with torch.no_grad():
        both = torch.func.vmap(run)(named)
        assert torch.allclose(both[0], logits(yopo.unfuse(model), case), atol=1e-5)


def test_an_argument_fuse_of_somebody_s_own_class_stays_theirs(tmp_path: Path) -> None:
    import yopo.patch

    cls = type(build(SHAPE))

    class Own(cls):
        def __init__(self, config: Any, fuse: bool = True) -> None:
            super().__init__(config)
            self.fuse = fuse

    build(SHAPE).save_pretrained(tmp_path)
    with yopo.patch.patched():
        assert Own.from_pretrained(tmp_path, fuse=False).fuse is False


def test_weights_that_are_slices_of_somebody_s_tensor_stay_there(case: Case) -> None:
    """As ZeRO's flat buffers: the optimiser updates those."""
    model = build(SHAPE, a_plan())
    flat = torch.cat([p.data.flatten() for p in model.model.layers[0].parameters()])
    at = 0
    for parameter in model.model.layers[0].parameters():
        parameter.data = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    model.model.yopo_fused = True
    with pytest.warns(UserWarning, match="slices of somebody's"):
        logits(model, case)
    flat.zero_()
    assert not model.model.layers[0].self_attn.q_proj.weight.any()


@pytest.mark.parametrize(
    ("environment", "argument", "fuses"),
    [(None, None, True), ("0", None, False), (None, False, False), ("0", True, True)],
)
def test_a_model_loaded_with_a_plan_goes_fused_unless_told_otherwise(
    environment: str | None,
    argument: bool | None,
    fuses: bool,
    case: Case,
    ran: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import yopo.patch

    if environment is not None:
        monkeypatch.setenv("YOPO_FUSE", environment)
    given = {} if argument is None else {"fuse": argument}
    with tempfile.TemporaryDirectory() as folder, yopo.patch.patched():
        build(SHAPE, a_plan()).save_pretrained(folder)
        model = type(build(SHAPE)).from_pretrained(folder, **given)
        logits(model, case)
        assert ran == [len(model.model.layers) if fuses else 0]


def test_to_fuse_a_model_without_a_plan_as_it_is_loaded_is_refused(tmp_path: Path) -> None:
    import yopo.patch

    build(SHAPE).save_pretrained(tmp_path)
    cls = type(build(SHAPE))
    with yopo.patch.patched():
        with pytest.raises(ValueError, match="no plan"):
            cls.from_pretrained(tmp_path, fuse=True)
        cls.from_pretrained(tmp_path, fuse=False)

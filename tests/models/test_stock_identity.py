"""No plan, or no image: to the bit what stock computes. apply and remove leave no trace."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from layouts import VOCAB, Shape, build, make_case, random_sinks
from oracle import oracle_forward
from torch import Tensor

from yopo import apply, plan_of, remove
from yopo.modeling_llama_prune import LlamaForCausalLM
from yopo.models.told import call
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import CACHE_FIELD

SHAPE = Shape(attention_bias=True)
IDS = torch.randint(1, VOCAB, (2, 9), generator=torch.Generator().manual_seed(3))
MASK = torch.ones_like(IDS)
MASK[0, :3] = 0


def a_plan(**changes: Any) -> PruningPlan:
    values = dict(window=3, layer_cut=2, ffn_ratio=2) | changes
    return PruningPlan(torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]), **values)


def an_image(model: Any) -> dict[str, Tensor]:
    case = make_case([[("text", 2), ("image", 2, 2, False), ("text", 3)]], 32)
    return model(**case.kwargs()).logits


def cached(past: Any) -> list[Tensor]:
    """Keys and values of a cache of whatever version, layer by layer."""
    if isinstance(past, tuple):
        pairs = past
    elif hasattr(past, "layers"):
        pairs = [(layer.keys, layer.values) for layer in past.layers]
    else:
        pairs = zip(past.key_cache, past.value_cache, strict=True)
    return [tensor for pair in pairs for tensor in pair]


def same(ours: Any, stock: Any) -> None:
    assert torch.equal(ours.logits, stock.logits)
    assert (ours.loss is None) == (stock.loss is None)
    if stock.loss is not None:
        assert torch.equal(ours.loss, stock.loss)
    assert (ours.hidden_states is None) == (stock.hidden_states is None)
    for a, b in zip(ours.hidden_states or (), stock.hidden_states or (), strict=True):
        assert torch.equal(a, b)
    assert type(ours.past_key_values) is type(stock.past_key_values)
    if stock.past_key_values is not None:
        pairs = zip(cached(ours.past_key_values), cached(stock.past_key_values), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def stock() -> Any:
    return build(SHAPE, cls=transformers.LlamaForCausalLM)


@pytest.mark.parametrize("plan", [None, a_plan(), a_plan(head_mass="drop", cut_mass="drop")])
@torch.no_grad()
def test_forward(stock: Any, plan: PruningPlan | None) -> None:
    ours = build(SHAPE, plan)
    embeds = stock.model.embed_tokens(IDS)
    labels = IDS.masked_fill(MASK == 0, -100)
    for arguments in (
        dict(input_ids=IDS),
        dict(input_ids=IDS, attention_mask=MASK, labels=labels),
        dict(input_ids=IDS, attention_mask=MASK, output_hidden_states=True, use_cache=True),
        dict(input_ids=IDS, use_cache=False),
        dict(inputs_embeds=embeds, attention_mask=MASK, labels=labels),
    ):
        same(ours(**arguments), stock(**arguments))
        with call():  # it is known that there is no image
            same(ours(**arguments), stock(**arguments))
        if plan is not None:
            nothing = torch.zeros(IDS.shape, dtype=torch.bool)
            same(ours(**arguments, visual_mask=nothing), stock(**arguments))
    plain = ours(input_ids=IDS, return_dict=False), stock(input_ids=IDS, return_dict=False)
    assert torch.equal(plain[0][0], plain[1][0])


@pytest.mark.parametrize("plan", [None, a_plan()])
@pytest.mark.parametrize(
    "how",
    [
        dict(do_sample=False),
        dict(do_sample=False, num_beams=3),
        dict(do_sample=True, top_k=0),
        dict(do_sample=True, num_return_sequences=2),
        dict(do_sample=False, use_cache=False),
    ],
    ids=str,
)
def test_generate(stock: Any, plan: PruningPlan | None, how: dict[str, Any]) -> None:
    ours = build(SHAPE, plan)
    told = [{}] if plan is None else [{}, {"visual_mask": torch.zeros(IDS.shape, dtype=torch.bool)}]
    for extra in told:
        answers = []
        for model, more in ((ours, extra), (stock, {})):
            torch.manual_seed(0)
            answers.append(
                model.generate(IDS, attention_mask=MASK, max_new_tokens=6, **how, **more)
            )
        assert torch.equal(*answers)


@pytest.mark.parametrize("plan", [None, a_plan()])
def test_gradients(plan: PruningPlan | None) -> None:
    grads = []
    for cls in (None, transformers.LlamaForCausalLM):
        model = build(SHAPE, plan if cls is None else None, cls).train()
        model(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])


@pytest.mark.parametrize("plan", [None, a_plan()])
def test_seeded_construction(plan: PruningPlan | None) -> None:
    states, after = [], []
    for cls in (LlamaForCausalLM, transformers.LlamaForCausalLM):
        config = SHAPE.config()
        if plan is not None and cls is LlamaForCausalLM:
            plan.save_to(config)
        torch.manual_seed(11)
        states.append(cls(config).state_dict())
        after.append(torch.rand(3))
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert torch.equal(*after)


@torch.no_grad()
def test_the_model_s_own_token_embeddings_are_text(stock: Any) -> None:
    ours = build(SHAPE, a_plan())
    embeds = ours.model.embed_tokens(IDS)
    same(ours(inputs_embeds=embeds), stock(inputs_embeds=embeds))


@pytest.mark.parametrize("n", [579, 600, 650])
@torch.no_grad()
def test_long_text_is_text(stock: Any, n: int) -> None:
    """Longer than sprompt_len + 576, where the released code sees an image or crashes."""
    config = SHAPE.config()
    config.sprompt_len, config.max_position_embeddings = 3, 1024
    a_plan().save_to(config)
    ours = LlamaForCausalLM(config).eval()
    ours.load_state_dict(stock.state_dict())
    ids = torch.randint(1, VOCAB, (1, n), generator=torch.Generator().manual_seed(n))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(ours(input_ids=ids), stock(input_ids=ids))
        with call():
            embeds = stock.model.embed_tokens(ids)
            same(ours(inputs_embeds=embeds), stock(inputs_embeds=embeds))
        part = getattr(ours(input_ids=ids[:, :-2], use_cache=True), CACHE_FIELD)
        stocks = getattr(stock(input_ids=ids[:, :-2], use_cache=True), CACHE_FIELD)
        step = ids[:, -2:]
        same(ours(step, **{CACHE_FIELD: part}), stock(step, **{CACHE_FIELD: stocks}))


@torch.no_grad()
def test_text_after_an_image_is_stock_again(stock: Any) -> None:
    ours = build(SHAPE, a_plan())
    an_image(ours)
    same(ours(input_ids=IDS, attention_mask=MASK), stock(input_ids=IDS, attention_mask=MASK))


@torch.no_grad()
def test_apply_and_remove_leave_no_trace(stock: Any) -> None:
    model = build(SHAPE, cls=transformers.LlamaForCausalLM)
    before = (type(model), type(model.model), copy.deepcopy(model.config.to_dict()))
    attributes = sorted(vars(model)), sorted(vars(model.model))
    weights = {name: value.data_ptr() for name, value in model.state_dict().items()}
    plan = a_plan()
    assert plan_of(model) is None
    assert apply(model, plan) is model
    pruned = an_image(model)
    assert torch.equal(pruned, an_image(build(SHAPE, plan)))
    assert plan_of(model) == plan
    assert isinstance(model, transformers.LlamaForCausalLM)
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == weights
    assert apply(model, plan) is model and torch.equal(an_image(model), pruned)  # idempotent
    other = a_plan(window=None, head_mass="drop")
    apply(model, other)  # another plan takes the first one's place
    assert plan_of(model) == other and torch.equal(an_image(model), an_image(build(SHAPE, other)))
    assert remove(model) is model
    assert (type(model), type(model.model), model.config.to_dict()) == before
    assert (sorted(vars(model)), sorted(vars(model.model))) == attributes
    assert {name: value.data_ptr() for name, value in model.state_dict().items()} == weights
    assert remove(model) is model and plan_of(model) is None  # idempotent
    same(model(input_ids=IDS, attention_mask=MASK), stock(input_ids=IDS, attention_mask=MASK))


def test_apply_refuses_a_plan_of_another_shape() -> None:
    model = build(SHAPE, cls=transformers.LlamaForCausalLM)
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match="head_keep"):
        apply(model, PruningPlan(torch.ones(3, 5)))
    assert type(model) is transformers.LlamaForCausalLM and model.config.to_dict() == before


@pytest.mark.parametrize("route", ["config", "apply"])
@torch.no_grad()
def test_saved_and_loaded(tmp_path: Path, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("YOPO_FUSE", "0")  # fused, if the patch is in, it agrees to rounding
    plan = a_plan(cut_mass="sink", sinks=random_sinks(SHAPE, 0, with_b=True))
    if route == "config":
        model = build(SHAPE, plan)
    else:
        model = apply(build(SHAPE, cls=transformers.LlamaForCausalLM), plan)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert plan_of(loaded) == plan
    assert torch.equal(an_image(loaded), an_image(model))
    stock_again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(stock_again(IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize("masses", ["exact", "drop"])
@pytest.mark.parametrize("dispatch", ["device_map", "cpu_offload", "disk_offload", "sequential"])
@torch.no_grad()
def test_device_maps(tmp_path: Path, dispatch: str, masses: str) -> None:
    """Weights that accelerate's hooks bring and take away again."""
    accelerate = pytest.importorskip("accelerate")
    plan = a_plan(head_mass=masses, cut_mass=masses)
    model = build(SHAPE, plan)
    case = make_case([[("text", 2), ("image", 2, 2, False), ("text", 3)], [("text", 4)]], 32)
    truth = oracle_forward(model, plan, case.inputs_embeds, case.layout, case.attention_mask).logits
    if dispatch == "device_map":
        model.save_pretrained(tmp_path)
        model = LlamaForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).eval()
    elif dispatch == "cpu_offload":
        accelerate.cpu_offload(model, execution_device="cpu")
    elif dispatch == "disk_offload":
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu")
    else:  # whole layers on disk, the rest resident
        places = {f"model.layers.{i}": "disk" if i == 1 else "cpu" for i in range(SHAPE.layers)}
        places |= {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        places |= {"model.rotary_emb": "cpu"} if hasattr(model.model, "rotary_emb") else {}
        accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=str(tmp_path))
    for _ in range(2):  # the second time from whatever the first one kept
        out = model(**case.kwargs(), use_cache=True)
        assert (out.logits.double() - truth)[case.valid].abs().max() < 1e-4

"""A pruned pass computes by itself what the model's functions compute. Whoever replaces one of
these, before the plan, after it, or after the first image, gets right numbers or an error."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layouts import SHAPE, a_plan, build, make_case
from transformers import modeling_utils
from transformers.models.llama import modeling_llama

import yopo
from yopo.models import probe
from yopo.models.functions import Functions

CASE = make_case([[("text", 2), ("image", 2, 2, False), ("text", 2)]], 32)
REGISTRY = getattr(modeling_utils, "ALL_ATTENTION_FUNCTIONS", None)
registered = pytest.mark.skipif(REGISTRY is None, reason="no registry before transformers 4.48")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**CASE.kwargs(), use_cache=False).logits


def turned_back(real: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **named: Any) -> Any:
        return real(q, k, cos, -sin, *args, **named)

    return apply_rotary_pos_emb


def halved(real: Callable[..., Any]) -> Callable[..., Any]:
    def rotate_half(x: torch.Tensor) -> torch.Tensor:
        return real(x) / 2

    return rotate_half


def reversed_heads(real: Callable[..., Any]) -> Callable[..., Any]:
    def repeat_kv(x: torch.Tensor, n: int) -> torch.Tensor:
        return real(x, n).flip(1)

    return repeat_kv


def soft_capped(real: Callable[..., Any]) -> Callable[..., Any]:
    """Attention with scores capped at 1; of the same form as transformers' eager one."""

    def attention(module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any, **_: Any) -> Any:
        groups = module.num_key_value_groups
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.tanh(q @ k.transpose(2, 3) * scaling)
        unseen = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(unseen, -torch.inf).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous(), weights

    return attention


REPLACED = {
    "apply_rotary_pos_emb": turned_back,
    "rotate_half": halved,
    "repeat_kv": reversed_heads,
    "eager_attention_forward": soft_capped,
}


@pytest.fixture(params=["before the plan", "after the plan", "after an image"])
def moment(request: pytest.FixtureRequest) -> str:
    return request.param


def refused_after(change: Callable[[], Any], moment: str, implementation: str = "eager") -> None:
    """What `change` makes other is refused from then on, whenever it happens."""
    yopo.apply(build(SHAPE, None), a_plan())  # a verdict is there from another model
    model = build(SHAPE, None)
    if REGISTRY is not None:
        model.config._attn_implementation = implementation
        model.model.config._attn_implementation = implementation
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if moment != "before the plan":
            yopo.apply(model, a_plan())
        if moment == "after an image":
            logits(model)
        change()
        with pytest.raises(TypeError, match="does not compute what the layers of LlamaModel do"):
            if moment == "before the plan":
                yopo.apply(model, a_plan())
            logits(model)


@pytest.mark.parametrize("name", REPLACED)
def test_a_function_of_other_arithmetic_is_refused(
    name: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(modeling_llama, name, None)
    if real is None:
        pytest.skip("no such function before transformers 4.48")
    patched = REPLACED[name](real)
    refused_after(lambda: monkeypatch.setattr(modeling_llama, name, patched), moment)


@registered
@pytest.mark.parametrize("local", [True, False])
@pytest.mark.parametrize("name", ["sdpa", "mine", "flash_attention_2"])
def test_registered_attention_of_other_arithmetic_is_refused(
    name: str, local: bool, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where = ("_local_mapping", "_global_mapping")[not local]
    mapping = getattr(REGISTRY, where, REGISTRY)
    if name == "flash_attention_2" and moment != "before the plan":
        pytest.skip("no flash attention here, but what is put in its place")
    if name == "mine":
        monkeypatch.setitem(mapping, name, REGISTRY["sdpa"])
    change = lambda: monkeypatch.setitem(mapping, name, soft_capped(REGISTRY["sdpa"]))  # noqa: E731
    if name == "flash_attention_2":
        monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    refused_after(change, moment, name)


@pytest.mark.parametrize("part", ["DecoderLayer", "Attention", "MLP", "Model"])
def test_a_forward_patched_on_its_class_is_asked_again(
    part: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(SHAPE, None)
    layer = model.model.layers[0]
    live = {"DecoderLayer": layer, "Attention": layer.self_attn, "MLP": layer.mlp}
    cls = type(live.get(part, model.model))
    cls = next(base for base in cls.__mro__ if base.__module__.startswith("transformers."))
    real = cls.forward

    def forward(self: Any, *args: Any, **named: Any) -> Any:
        out = real(self, *args, **named)
        if part == "Model":
            out[0].mul_(2)
            return out
        return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out

    refused_after(lambda: monkeypatch.setattr(cls, "forward", forward), moment)


def test_a_function_of_the_same_arithmetic_is_right_and_named_where_it_does_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = yopo.apply(build(SHAPE, None), a_plan())
    expected = logits(model)
    real = modeling_llama.rotate_half
    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: real(x))
    assert torch.equal(logits(model), expected)


def test_nothing_is_probed_again_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = yopo.apply(build(SHAPE, None), a_plan())
    functions = model.model._yopo_known
    logits(model)
    assert model.model._yopo_known is functions and not functions.changed(model.model)
    monkeypatch.setattr(probe, "_verdict", lambda *_: pytest.fail("a verdict is known"))
    yopo.apply(model, a_plan("drop", "drop"))  # the plan before is in the config now
    yopo.apply(build(SHAPE, None), a_plan())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_probed_by_itself(copied: Callable[[Any], Any]) -> None:
    model = yopo.apply(build(SHAPE, None), a_plan())
    other = copied(model)
    assert other.model._yopo_known is None and torch.equal(logits(other), logits(model))
    assert isinstance(other.model._yopo_known, Functions)

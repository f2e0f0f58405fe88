"""A cache of a fixed length: the tokens of one that grows, in memory that does not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from family_checks import a_plan as a_family_plan
from family_photos import one_photo
from layouts import MASS, SHAPE, Case, a_plan, build, left_padded, make_case
from random_families import HERE, KINDS
from random_families import build as build_family
from tiny_processors import VOCAB
from torch import Tensor
from transformers import DynamicCache, cache_utils

import yopo
from yopo.engine.visual_cache import VisualCache
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import CACHE_FIELD, has_rms_norm

pytestmark = pytest.mark.skipif(
    not hasattr(cache_utils, "StaticCache"), reason="this transformers has no StaticCache"
)
ROWS = [[("text", 2), ("image", 3, 3, False), ("text", 3)]]
TEXT = [[("text", 4)]]


def static(model: Any, length: int, batch: int = 1) -> Any:
    """An empty StaticCache, which older versions want to know more for."""
    if hasattr(cache_utils, "StaticLayer"):
        return cache_utils.StaticCache(config=model.config, max_cache_len=length)
    given = dict(max_cache_len=length, device="cpu", dtype=torch.float32)
    return cache_utils.StaticCache(model.config, batch, **given)


def ordinary(steps: int = 7) -> tuple[Case, dict[str, Any]]:
    case = make_case(ROWS, SHAPE.heads * 8)
    return case, asked(case, steps)


def asked(case: Case, steps: int = 7) -> dict[str, Any]:
    kwargs = {**case.kwargs(), "max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    del kwargs["position_ids"]
    return kwargs


def buffers(cache: VisualCache) -> list[Tensor]:
    stores = (store for pair in cache.stores for store in pair)
    return [buffer for store in stores for buffer in store._buffers or ()]


def places(cache: VisualCache) -> list[tuple[int, int]]:
    return [(buffer.data_ptr(), buffer.shape[3]) for buffer in buffers(cache)]


@torch.no_grad()
def decoded(model: Any, case: Case, past: Any, steps: int = 6) -> tuple[list[Tensor], Any]:
    """Logits of the prompt and of steps after it, and where the buffers were after each."""
    out = model(**case.kwargs(), past_key_values=past, use_cache=True)
    logits, where = [out.logits], [places(past)]
    for number in range(steps):
        token = torch.full((case.shape[0], 1), number % 20 + 1)
        out = model(input_ids=token, past_key_values=past, use_cache=True)
        logits.append(out.logits)
        where.append(places(past))
    return logits, where


@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}])
@pytest.mark.parametrize("masses", MASS, ids="/".join)
def test_generate_gives_the_tokens_of_a_cache_that_grows(
    masses: tuple[str, str], how: dict[str, int]
) -> None:
    """Twice each: the second finds what the first left on the model."""
    for case in (make_case(ROWS * 2, SHAPE.heads * 8), left_padded()):
        model = build(SHAPE, a_plan(*masses))
        expected = model.generate(**asked(case), **how)
        for _ in range(2):
            found = model.generate(**asked(case), **how, cache_implementation="static")
            assert torch.equal(found, expected)


def test_sampled_sequences_are_those_of_a_cache_that_grows() -> None:
    _, kwargs = ordinary()
    kwargs |= {"do_sample": True, "num_return_sequences": 3, "use_cache": True}
    model, made = build(SHAPE, a_plan()), []
    for implementation in (None, "static"):
        torch.manual_seed(0)
        made.append(model.generate(**kwargs, cache_implementation=implementation))
    assert torch.equal(*made)


@pytest.mark.parametrize("way", ["live", "fused"])
@pytest.mark.parametrize("masses", MASS, ids="/".join)
def test_no_buffer_grows_or_moves_and_none_is_longer_than_asked_for(
    masses: tuple[str, str], way: str
) -> None:
    case, _ = ordinary()
    model = build(SHAPE, a_plan(*masses))
    if way == "fused":
        if not has_rms_norm():
            pytest.skip("fused weights need torch 2.4")
        yopo.fuse(model)
    n, steps = case.shape[1], 70  # more than a growing cache has to spare
    expected, _ = decoded(build(SHAPE, a_plan(*masses)), case, DynamicCache(), steps)
    past = static(model, n + steps)
    found, where = decoded(model, case, past, steps)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
    assert where[0] and all(each == where[0] for each in where)
    assert max(slots for _, slots in where[0]) <= n + steps
    assert isinstance(past, VisualCache) and past.get_max_length() == n + steps


def test_generate_takes_an_empty_static_cache_fills_it_and_goes_on_after_a_reset() -> None:
    case, kwargs = ordinary()
    model = build(SHAPE, a_plan())
    expected = model.generate(**kwargs)
    past = static(model, case.shape[1] + 10)
    assert torch.equal(model.generate(**kwargs, **{CACHE_FIELD: past}), expected)
    assert past.get_seq_length() >= case.shape[1] + 6
    if not hasattr(cache_utils, "StaticLayer"):
        with pytest.raises(ValueError, match="take a new one"):
            past.reset()
        return
    past.reset()
    assert type(past) is cache_utils.StaticCache and past.get_seq_length() == 0
    assert torch.equal(model.generate(**kwargs, **{CACHE_FIELD: past}), expected)
    past.reset()
    words = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        ours, stock = (
            m(input_ids=words, past_key_values=c, use_cache=True).logits
            for m, c in ((model, past), (build(SHAPE, None), static(model, case.shape[1] + 10)))
        )
    assert torch.equal(ours, stock) and type(past) is cache_utils.StaticCache


def test_text_alone_is_stocks_to_the_bit() -> None:
    words = torch.randint(1, 31, (2, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(words)
    mask[1, :2] = 0
    how = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, cache_implementation="static")
    how |= dict(return_dict_in_generate=True, output_scores=True, attention_mask=mask)
    ours, stock = (build(SHAPE, p).generate(words, **how) for p in (a_plan(), None))
    assert torch.equal(ours.sequences, stock.sequences)
    assert all(map(torch.equal, ours.scores, stock.scores))


def test_an_image_after_text_that_stock_put_into_a_static_cache() -> None:
    case, plan = make_case(ROWS, SHAPE.heads * 8), a_plan()
    words = torch.tensor([[3, 4, 5, 6]])
    found = []
    for kind in ("dynamic", "static"):
        model = build(SHAPE, plan)
        past = DynamicCache() if kind == "dynamic" else static(model, 40)
        with torch.no_grad():
            model(input_ids=words, past_key_values=past, use_cache=True)
            given = {k: v for k, v in case.kwargs().items() if k in ("inputs_embeds",)}
            given |= {"visual_mask": case.visual, "visual_grids": case.grids}
            out = model(**given, past_key_values=past, use_cache=True)
            more = model(input_ids=words, past_key_values=past, use_cache=True)
        found.append((out.logits, more.logits))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-5)
    assert past.get_max_length() == 40 and past.length == 4 + case.shape[1] + 4


def test_more_than_it_holds_is_refused_before_anything_is_written() -> None:
    case, _ = ordinary()
    model, n = build(SHAPE, a_plan()), case.shape[1]
    with torch.no_grad():
        short = static(model, n - 1)
        with pytest.raises(ValueError, match=f"holds {n - 1}"):
            model(**case.kwargs(), past_key_values=short, use_cache=True)
        assert type(short) is cache_utils.StaticCache
        past = static(model, n + 1)
        model(**case.kwargs(), past_key_values=past, use_cache=True)
        token = {"input_ids": torch.tensor([[1]]), "past_key_values": past, "use_cache": True}
        model(**token)
        with pytest.raises(ValueError, match="max_cache_len"):
            model(**token)
        past.crop(-1)
        assert model(**token).logits.isfinite().all()
        assert past.length == n + 1


def test_a_copy_of_a_static_cache_goes_its_own_way() -> None:
    case, _ = ordinary()
    model = build(SHAPE, a_plan())
    past = static(model, case.shape[1] + 3)
    with torch.no_grad():
        model(**case.kwargs(), past_key_values=past, use_cache=True)
        twin = copy.deepcopy(past)
        a, b = (
            model(input_ids=torch.tensor([[1, 2]]), past_key_values=cache, use_cache=True).logits
            for cache in (past, twin)
        )
    assert torch.equal(a, b) and twin.limit == past.limit
    assert not {where for where, _ in places(past)} & {where for where, _ in places(twin)}


def test_graphs_go_on_from_a_static_cache() -> None:
    if not has_rms_norm():
        pytest.skip("fused weights need torch 2.4")
    case, kwargs = ordinary()
    plain, model = (build(SHAPE, a_plan("drop", "drop")) for _ in range(2))
    expected = plain.generate(**kwargs)
    yopo.graphed(model)
    assert torch.equal(model.generate(**kwargs, cache_implementation="static"), expected)
    past = static(model, case.shape[1])
    with torch.no_grad():
        model(**case.kwargs(), past_key_values=past, use_cache=True)
        with pytest.raises(ValueError, match="max_cache_len"):
            model(input_ids=torch.tensor([[1]]), past_key_values=past, use_cache=True)


def test_what_a_pruned_pass_cannot_fill_is_refused_by_name() -> None:
    """Caches that this machine cannot make by themselves: one offloads, one is of another class."""
    case, _ = ordinary()
    model = build(SHAPE, a_plan())
    offloading = static(model, 40)
    offloading.offloading = True

    class SlidingWindowCache(cache_utils.StaticCache):
        pass

    class QuantizedCache(DynamicCache):
        pass

    other = static(model, 40)
    other.__class__ = SlidingWindowCache
    for cache, name in (
        (offloading, "an offloading StaticCache"),
        (other, "a SlidingWindowCache"),
        (QuantizedCache(), "a QuantizedCache"),
    ):
        with pytest.raises(ValueError, match=f"{name}.*generate: leave out cache_implementation"):
            model(**case.kwargs(), past_key_values=cache, use_cache=True)


@pytest.mark.parametrize("name", ["dynamic", "dynamic_full", "sliding_window", "hybrid"])
@pytest.mark.filterwarnings("ignore")
def test_other_names_of_caches_work_or_are_stocks_to_refuse(name: str) -> None:
    _, kwargs = ordinary()
    words = torch.tensor([[3, 4]])
    text = dict(max_new_tokens=2, do_sample=False, pad_token_id=0, cache_implementation=name)
    try:
        build(SHAPE, None).generate(words, **text)
    except Exception as error:
        pytest.skip(f"stock's own: {error}")
    model = build(SHAPE, a_plan())
    assert torch.equal(
        model.generate(**kwargs, cache_implementation=name), model.generate(**kwargs)
    )


def test_a_mask_that_is_no_tensor_is_refused_by_name() -> None:
    case, _ = ordinary()

    class BlockMask:
        pass

    for mask in (BlockMask(), {"full_attention": BlockMask()}):
        with pytest.raises(ValueError, match="is a BlockMask.*attn_implementation='sdpa'"):
            build(SHAPE, a_plan())(**(case.kwargs() | {"attention_mask": mask}))


@pytest.mark.parametrize("side", ["columns", "future"])
def test_a_wide_mask_that_is_not_causal_is_refused(side: str) -> None:
    case, _ = ordinary()
    n = case.shape[1]
    sees = torch.ones(n, n + 5, dtype=torch.bool).tril()[None, None]
    model = build(SHAPE, PruningPlan(a_plan().head_keep, window=None, window_causal=False))
    with torch.no_grad():
        plain = model(**case.kwargs()).logits
        assert torch.equal(model(**(case.kwargs() | {"attention_mask": sees})).logits, plain)
        if side == "future":
            sees[0, 0, 2, n + 1] = True
        else:
            sees[0, 0, 5, 2] = False
        with pytest.raises(ValueError, match="is not the causal mask"):
            model(**(case.kwargs() | {"attention_mask": sees}))


@pytest.mark.parametrize("name", ["llama", *HERE])
def test_what_generate_compiles_by_itself_leaves_pruned_steps_out(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With text alone they are stock's, compiled; with an image after that, called."""
    config = getattr(transformers, "CompileConfig", None)
    if config is None:
        pytest.skip("this transformers compiles nothing by itself")
    calls: list[int] = []

    def compiled(function: Any, **_: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch, "compile", compiled)
    if name == "llama":
        model, shown = build(SHAPE, a_plan()), ordinary()[1]
    else:
        kind = KINDS[name]
        model = yopo.apply(build_family(kind, VOCAB), a_family_plan())
        shown = {**one_photo(kind), "do_sample": False, "max_new_tokens": 7}
    how = dict(cache_implementation="static", compile_config=config())
    how["compile_config"]._compile_all_devices = True
    text = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    model.generate(torch.tensor([[3, 4, 5]]), **text, **how)
    assert len(calls) == 4
    expected = model.generate(**shown)
    assert torch.equal(model.generate(**shown, **how), expected) and len(calls) == 4

"""Models with a plan under torch.compile: what they give is what they give without it, in few
graphs, and no break of a graph in the layers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from family_checks import a_plan as a_family_plan
from family_checks import mixed
from layouts import VOCAB, Case, Shape, build, left_padded, make_case, random_sinks
from random_families import HERE, KINDS, make
from random_families import build as build_family
from torch import Tensor
from torch._dynamo.utils import counters
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import yopo
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import CACHE_FIELD, DynamicCache, has_families, has_rms_norm, tells_tracing

SHAPE = Shape(layers=3, kv_heads=4)
ROW = [("text", 3), ("image", 3, 3, False), ("text", 5)]
IDS = torch.tensor([[7, 3, 9, 4, 11]])
# Before 4.38 rotary angles are looked up by numbers in tensors, which breaks a graph, stock's too.
NO_BREAK = "position_ids" in inspect.signature(LlamaRotaryEmbedding.forward).parameters
pytestmark = pytest.mark.skipif(not tells_tracing(), reason="torch does not say that it traces")


@pytest.fixture(autouse=True)
def _anew() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def ragged(mass: str = "drop", **changes: Any) -> PruningPlan:
    """In each layer other heads, and another number of them; a cut, an FFN slice."""
    keep = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 1, 1]])
    sinks = random_sinks(SHAPE, 0, True) if mass == "sink" else None
    values = dict(window=3, layer_cut=2, ffn_ratio=2, head_mass=mass, cut_mass=mass, sinks=sinks)
    return PruningPlan(keep, **(values | changes))


def model_of(mass: str = "drop", fused: bool = True) -> Any:
    model = build(SHAPE, ragged(mass))
    return yopo.fuse(model) if fused and has_rms_norm() else model


def a_case(rows: Any = ROW) -> Case:
    return make_case([rows], SHAPE.heads * 8)


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def breaks() -> int:
    return sum(counters["graph_break"].values()) if NO_BREAK else 0


def steps(model: Any, answer: Any, count: int) -> Iterator[Any]:
    for step in range(count):
        cache = {CACHE_FIELD: answer[CACHE_FIELD]}
        answer = model(input_ids=torch.tensor([[3 + step % 20]]), use_cache=True, **cache)
        yield answer


@torch.no_grad()
def chat(model: Any, case: Case, count: int = 3) -> list[Tensor]:
    """Logits of a prompt, and of steps after it."""
    first = model(**case.kwargs(), use_cache=True)
    return [first.logits, *(answer.logits for answer in steps(model, first, count))]


def same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * (1 + b.abs().max())


def test_prompts_of_three_lengths_and_steps_are_three_graphs_without_a_break() -> None:
    model = model_of()
    cases = [a_case([*ROW, ("text", more)]) for more in (1, 4, 9)]
    expected = [chat(model, case) for case in cases]
    compiled = torch.compile(model, backend="eager")
    for case, of_case in zip(cases, expected, strict=True):
        same(chat(compiled, case), of_case)
    assert breaks() == 0
    assert not NO_BREAK or graphs() == 3  # a prompt, one of any length, a step


@pytest.mark.parametrize(("mass", "fused"), [("sink", True), ("exact", True), ("exact", False)])
def test_masses_by_fused_and_live_weights_as_one_graph(mass: str, fused: bool) -> None:
    model, case = model_of(mass, fused), a_case()
    expected = chat(model, case)
    same(chat(torch.compile(model, backend="aot_eager", fullgraph=NO_BREAK), case), expected)
    assert not NO_BREAK or graphs() == 2


def test_steps_while_the_buffers_grow_are_no_further_graphs() -> None:
    model, case = model_of(), a_case()
    expected = chat(model, case, 90)
    same(chat(torch.compile(model, backend="eager"), case, 90), expected)
    assert not NO_BREAK or graphs() == 2


def test_a_prompt_filled_in_inference_mode_is_gone_on_from_outside() -> None:
    model, case = model_of(), a_case()

    def run(run: Any) -> Tensor:
        with torch.inference_mode():
            first = run(**case.kwargs(), use_cache=True)
        with torch.no_grad():
            *_, last = steps(run, first, 2)
        return last.logits

    expected = run(model)
    same([run(torch.compile(model, backend="eager"))], [expected])


def test_rows_with_padding() -> None:
    model, case = build(SHAPE, ragged("sink")), left_padded()
    expected = chat(model, case, 0)[0][case.valid]
    same([chat(torch.compile(model, backend="eager"), case, 0)[0][case.valid]], [expected])


def test_a_second_prompt_with_an_image_after_text_and_steps() -> None:
    model, case = model_of(), a_case()

    def run(run: Any) -> list[Tensor]:
        with torch.no_grad():
            answers = [run(IDS, use_cache=True)]
            given = {**case.kwargs(), "attention_mask": None}
            for _ in range(2):
                cache = {CACHE_FIELD: answers[-1][CACHE_FIELD]}
                answers.append(run(**given, use_cache=True, **cache))
                answers += steps(run, answers[-1], 2)
        return [answer.logits for answer in answers]

    expected = run(model)
    same(run(torch.compile(model, backend="eager")), expected)
    assert breaks() == 0


@pytest.mark.parametrize("how", ["compile()", "forward"])
def test_generate(how: str) -> None:
    model, case = model_of(), a_case()
    ids = torch.randint(3, VOCAB, case.shape, generator=torch.Generator().manual_seed(0))
    given = dict(visual_mask=case.visual, max_new_tokens=6, do_sample=False, num_beams=2)
    expected = model.generate(ids, **given)
    if how == "forward":
        model.forward = torch.compile(model.forward, backend="eager")
    else:
        model.compile(backend="eager")
    assert torch.equal(model.generate(ids, **given), expected)
    assert breaks() == 0 < graphs()


def test_text_alone_is_stock_s() -> None:
    def run(run: Any) -> list[Tensor]:
        with torch.no_grad():
            first = run(IDS, use_cache=True)
            return [first.logits, *(answer.logits for answer in steps(run, first, 2))]

    found = run(torch.compile(model_of(), backend="eager"))
    ours = graphs(), breaks()
    _dense = build(SHAPE, None)
    torch._dynamo.reset()
    counters.clear()
    expected = run(torch.compile(_dense, backend="eager"))
    assert all(map(torch.equal, found, expected))
    assert ours == (graphs(), breaks())


def test_a_plan_taken_off_and_another_put_on() -> None:
    model, case = model_of(fused=False), a_case()
    compiled = torch.compile(model, backend="eager")
    chat(compiled, case)
    yopo.remove(model)
    with torch.no_grad():
        same([compiled(IDS).logits], [build(SHAPE, None)(IDS).logits])
    yopo.apply(model, ragged("exact"))
    same(chat(compiled, case), chat(build(SHAPE, ragged("exact")), case))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(checkpointing: bool) -> None:
    model, case = model_of("sink", fused=False).train(), a_case()
    if checkpointing:
        model.gradient_checkpointing_enable()
    labels = torch.randint(3, VOCAB, case.shape, generator=torch.Generator().manual_seed(0))

    def run(run: Any) -> list[Tensor]:
        model.zero_grad()
        loss = run(**case.kwargs(), labels=labels).loss
        loss.backward()
        weights = [weight for weight in model.parameters() if weight.grad is not None]
        return [loss.detach(), *(weight.grad.clone() for weight in weights)]

    expected = run(model)
    same(run(torch.compile(model, backend="aot_eager")), expected)


def test_what_is_not_traced_is_computed_as_ever() -> None:
    model, case = model_of(), a_case()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        expected = model(**case.kwargs(), output_hidden_states=True)
        found = compiled(**case.kwargs(), output_hidden_states=True)
        same([*found.hidden_states], [*expected.hidden_states])
        as_tuple = compiled(**case.kwargs(), return_dict=False)
        same([as_tuple[0]], [expected.logits])
    if has_rms_norm():
        yopo.graphed(model)
        same(chat(compiled, case), chat(model_of(), case))


def test_a_hook_on_a_layer_runs() -> None:
    model, case, seen = model_of(), a_case(), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: seen.append(1))
    expected = chat(model, case, 0)
    same(chat(torch.compile(model, backend="eager"), case, 0), expected)
    assert len(seen) == 2 * SHAPE.layers


def test_embeddings_of_which_nothing_is_known_are_refused_as_ever() -> None:
    compiled = torch.compile(model_of(), backend="eager")
    with pytest.raises(ValueError, match="nothing is known of these inputs_embeds"):
        compiled(inputs_embeds=torch.rand(1, 17, SHAPE.heads * 8) + 9)  # no other test has these


def decoder_alone(model: Any) -> Any:
    model.model.compile(backend="eager")
    return model


def a_function_around(model: Any) -> Any:
    return torch.compile(lambda **given: model(**given), backend="eager")


@pytest.mark.parametrize("compiled", [decoder_alone, a_function_around])
def test_a_part_of_the_model_or_more_than_it(compiled: Callable[[Any], Any]) -> None:
    model, case = model_of(), a_case()
    expected = chat(model, case)
    same(chat(compiled(model), case), expected)
    assert breaks() <= 2  # one where the pass is made ready, for a prompt and for a step


def test_layers_compiled_one_by_one_have_no_break() -> None:
    model, case = model_of(fused=False), a_case()
    expected = chat(model, case)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    same(chat(model, case), expected)
    assert breaks() == 0 < graphs()


@pytest.mark.skipif(not has_families(), reason="transformers has no families")
def test_llava_has_no_more_breaks_than_stock() -> None:
    kind = KINDS["llava-llama"]
    model = build_family(kind)
    inputs = make(kind, [[("text", 3), ("image", 0), ("text", 4)]]).inputs(model)
    with torch.no_grad():
        torch.compile(model, backend="eager")(**inputs)
        stock = graphs(), breaks()
        torch._dynamo.reset()
        counters.clear()
        model = yopo.apply(build_family(kind), a_family_plan())
        expected = chat_with(model, inputs)
        found = chat_with(torch.compile(model, backend="eager"), inputs, 0)
        assert (graphs(), breaks()) <= stock
    same(found, expected[:1])


@pytest.mark.parametrize(
    "name", sorted({"llava_next-llama", "internvl-phi3", "qwen2_vl"} & {*HERE})
)
def test_other_families(name: str) -> None:
    kind = KINDS[name]
    model = yopo.apply(build_family(kind), a_family_plan())
    inputs = make(kind, [mixed(kind)[0]]).inputs(model)
    with torch.no_grad():
        expected = chat_with(model, inputs)
        same(chat_with(torch.compile(model, backend="eager"), inputs), expected)


def chat_with(model: Any, inputs: dict[str, Any], count: int = 2) -> list[Tensor]:
    first = model(**inputs, use_cache=True)
    return [first.logits, *(answer.logits for answer in steps(model, first, count))]


@torch.no_grad()
def test_a_pass_that_failed_before_its_decoder_is_nobody_s_next_one() -> None:
    """With the same cache, uncompiled, of a prompt of the same size and another image."""
    model = build(SHAPE, ragged())
    ids = torch.arange(1, 13)[None]
    masks = [torch.zeros(1, 12, dtype=torch.bool) for _ in range(2)]
    masks[0][:, 2:6] = masks[1][:, 6:10] = True
    cache, wrong = DynamicCache(), ids.clone()
    wrong[0, 3] = 10**6
    with pytest.raises((IndexError, RuntimeError)):
        torch.compile(model, backend="eager")(
            input_ids=wrong, visual_mask=masks[0], **{CACHE_FIELD: cache}
        )
    assert getattr(cache, "ready", None) is None
    with pytest.raises(ValueError, match="half filled"):
        model(input_ids=ids, visual_mask=masks[1], **{CACHE_FIELD: cache})


@pytest.mark.skipif(
    not hasattr(torch, "export") or not NO_BREAK, reason="not exported by older versions"
)
@torch.no_grad()
def test_text_alone_is_exported_as_stock_s() -> None:
    model, ids = build(SHAPE, ragged()), torch.tensor([[1, 2, 3, 4]])
    expected = build(SHAPE)(input_ids=ids, use_cache=False).logits
    given = {"input_ids": ids, "use_cache": False}
    program = torch.export.export(model, (), given, strict=False)
    assert torch.equal(program.module()(**given).logits, expected)

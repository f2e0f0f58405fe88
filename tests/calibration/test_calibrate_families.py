"""Calibrating transformers' own families, and the command on checkpoints of them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_photos import described, one_photo
from random_families import HERE, KINDS, Kind, build, stack_of
from tiny_processors import VOCAB, photos, processor

import yopo
from yopo.calibration import neurons
from yopo.calibration.collect import collect
from yopo.calibration.divergence import divergence, references
from yopo.calibration.head_rule import visual_ratio
from yopo.checkpoint import neuron_order
from yopo.commands.command_line import main
from yopo.errors import BadInput
from yopo.plan.pruning_plan import PruningPlan
from yopo.prompts.transformers_prompts import TransformersPrompter
from yopo.versions import attention_is_switchable

pytestmark = pytest.mark.parametrize("kind", [pytest.param(KINDS[n], id=n) for n in HERE])


def probabilities(model: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    """Stock's eager attention maps, (heads, n, n) of each layer."""
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    with torch.no_grad():
        out = model(**given, output_attentions=True, use_cache=False)
    return [layer[0] for layer in out.attentions]


@pytest.mark.skipif(not attention_is_switchable(), reason="attention is chosen by class here")
def test_ratios_are_those_of_stock_s_attention_maps(kind: Kind) -> None:
    given = one_photo(kind)
    found = collect(build(kind, VOCAB), [given])
    visual = described(kind, given).layout.visual[0]
    expected = visual_ratio(probabilities(build(kind, VOCAB), given), visual)
    torch.testing.assert_close(found.ratios[0], expected, rtol=1e-4, atol=1e-5)
    assert found.visual_tokens.tolist() == [int(visual.sum())]
    assert torch.isfinite(found.influence).all()


def test_answers_diverge_from_stock_s_under_a_plan_and_not_without(kind: Kind) -> None:
    model, given = build(kind, VOCAB), one_photo(kind)
    known = references(model, [given], answer_tokens=4)
    n = given["input_ids"].shape[1]
    made = build(kind, VOCAB).generate(**given, max_new_tokens=4, do_sample=False)
    assert torch.equal(known[0].answer, made[:, n:])
    with torch.no_grad():
        stock = build(kind, VOCAB)(**known[0].inputs).logits[0, -4:].log_softmax(-1)
    torch.testing.assert_close(known[0].log_probabilities, stock, rtol=1e-4, atol=1e-4)
    plan = yopo.calibrate(model, [given], layer_cut=1, mass="drop").plan
    assert divergence(model, plan, known).kl > 1e-4
    dense = PruningPlan.dense(stack_of(model).config)
    assert divergence(model, dense, known).kl < 1e-6 and yopo.plan_of(model) is None


def test_the_command_makes_a_checkpoint_of_the_family(
    kind: Kind, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, made = tmp_path / "dense", processor(kind)
    build(kind, VOCAB).save_pretrained(folder)
    if find_spec("torchvision") is None:  # without it AutoProcessor makes none that knows videos
        monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", lambda path: made)
    else:
        made.save_pretrained(folder)
    lines = []
    for i, photo in enumerate(photos() * 2):
        photo.save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "question": f"What is {i}?", "answer": "no"}))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    words = ["calibrate", str(folder), "--data", str(tmp_path / "data.jsonl"), "--device", "cpu"]
    words += ["--out", str(tmp_path / "pruned"), "--mass", "drop"]
    assert main(words) == 0, capsys.readouterr().err
    assert "4 questions, 0 passed over" in capsys.readouterr().out
    from yopo import patch

    patch.enable()
    try:
        model = type(build(kind, VOCAB)).from_pretrained(tmp_path / "pruned")
    finally:
        patch.undo()
    plan = yopo.plan_of(model)
    order = neuron_order.load_order(tmp_path / "pruned" / neuron_order.FILE)
    assert plan is not None and plan.ffn_order == neuron_order.checksum(order)
    neurons.undo(yopo.remove(model), order)
    given, dense = one_photo(kind), build(kind, VOCAB)
    with torch.no_grad():
        pairs = [one(**given).logits for one in (model, dense)]
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-4)


def test_weights_that_are_cut_off_are_refused_in_one_line(kind: Kind, tmp_path: Path) -> None:
    build(kind, VOCAB).save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(BadInput, match="cannot load"):
        TransformersPrompter(str(tmp_path), "cpu")

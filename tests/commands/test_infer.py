"""`python -m yopo infer`: it answers from LLaVA's checkpoints and from transformers' own, and what
cannot be used is said in one line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import random_llava
import transformers
from conversions import convert, tensors
from layouts import needs_float16
from processes import run
from safetensors.torch import save_file

from yopo.commands.command_line import main
from yopo.commands.input_checks import check_model
from yopo.versions import has_families

needs_llava = pytest.mark.skipif(find_spec("llava") is None, reason="llava-torch is not installed")
needs_families = pytest.mark.skipif(not has_families(), reason="no families in this transformers")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    random_llava.picture(1).save(folder / "picture.png")
    return random_llava.make(folder, random_llava.a_plan())


def copied(source: Path, folder: Path) -> Path:
    """A copy of the checkpoint to damage."""
    target = folder / source.name
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_config(folder: Path) -> None:
    file = folder / "config.json"
    file.write_text(file.read_text()[:40])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:30])


def missing_shard(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))


def cut_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off")


def no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.model").unlink()


def no_tower(folder: Path) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "mm_vision_tower": "no/such/tower"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, "has no config.json"),
        (cut_config, "config.json is not JSON"),
        (no_weights, "has no weights"),
        (cut_weights, "model.safetensors is cut off"),
        (cut_header, "model.safetensors is cut off"),
        (missing_shard, "has no model-00002-of-00002.safetensors, which its index names"),
        (cut_pickle, "pytorch_model.bin is cut off"),
        (no_tokenizer, "neither tokenizer.model nor tokenizer.json"),
        (no_tower, "the vision tower 'no/such/tower'"),
    ],
)
def test_damaged_checkpoint(
    good: Path, tmp_path: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(good, tmp_path)
    damage(folder)
    image = str(good.parent / "picture.png")
    refused(["--model-path", str(folder), "--image-file", image], message, capsys)


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit 2, and the last line says why; before it stands no more than what loading says."""
    capsys.readouterr()
    assert main(["infer", *arguments]) == 2
    got = capsys.readouterr()
    assert "ASSISTANT" not in got.out
    *before, last = got.err.splitlines()
    assert last.startswith("yopo: error: ") and message in last
    assert not [line for line in before if line.startswith(("yopo", "Traceback"))]


def test_missing_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = random_llava.make(tmp_path).rename(tmp_path / "model-v1")
    for path in (tmp_path / "no-llava", "./no/llava", "no-llava", tmp_path.name):
        refused(["--model-path", str(path)], "there is no folder", capsys)
    refused(["--model-path", str(other)], "'llava' in their name", capsys)


def test_bad_image(good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = (good.parent / "picture.png").read_bytes()
    for name, content in {"text.png": b"no image", "cut.png": whole[:200], "no.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        image = str(tmp_path / name)
        refused(["--model-path", str(good), "--image-file", image], "is not an image", capsys)
    refused(
        ["--model-path", str(good), "--image-file", str(tmp_path / "none.png")],
        "there is no file",
        capsys,
    )


def test_a_hub_id_goes_on_to_from_pretrained() -> None:
    check_model("zwt123home123/llava-1.5-13b-prune-zp25", "--model-path")


@needs_float16
@pytest.mark.llava
@needs_llava
def test_infer(good: Path) -> None:
    image = str(good.parent / "picture.png")
    common = ["-m", "yopo", "infer", "--model-path", str(good), "--image-file", image]
    asked = [*common, "--question", "how many?", "--device", "cpu", "--max-new-tokens", "4"]
    done = run(*asked)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    told = next(i for i, line in enumerate(lines) if line.startswith("plan: Visual tokens see"))
    question = next(i for i, line in enumerate(lines) if line == "USER: how many?")
    assert told < question and lines[question + 1].startswith("ASSISTANT: ")
    assert lines[-1].startswith("prefill: ") and "(16 visual, " in lines[-1]

    dropped = run(*asked, "--mass", "drop/exact")
    assert "Mass on visual keys: drop in pruned heads, exact from layer" in dropped.stdout
    wrong = run(*asked, "--mass", "half")
    assert wrong.returncode == 2 and "'half'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@needs_float16
@pytest.mark.llava
@needs_llava
def test_infer_without_a_plan_and_with_a_corrupt_one(tmp_path: Path) -> None:
    folder = random_llava.make(tmp_path)
    image = tmp_path / "picture.png"
    random_llava.picture(1).save(image)
    asked = ["-m", "yopo", "infer", "--model-path", str(folder), "--image-file", str(image)]
    done = run(*asked, "--device", "cpu", "--max-new-tokens", "3")
    assert done.returncode == 0, done.stderr
    assert "plan: none in this checkpoint" in done.stdout
    assert "(16 visual, " in done.stdout.splitlines()[-1]

    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "yopo": {"format": 1}}))
    corrupt = run(*asked, "--device", "cpu")
    assert corrupt.returncode == 2
    assert "block of the config is corrupt" in corrupt.stderr.splitlines()[-1]
    assert "Traceback" not in corrupt.stderr


# ------------------------------------------------------------------------- transformers' own models


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned LLaVA in transformers' own form, and picture.png beside it."""
    if not has_families():
        pytest.skip("no families in this transformers")
    folder = tmp_path_factory.mktemp("own")
    random_llava.picture(1).save(folder / "picture.png")
    # Not padded: older versions of transformers have no processor that pads.
    source = random_llava.make(folder, random_llava.a_plan(), image_aspect_ratio="square")
    made = convert(source, folder / "new")
    weights = tensors(made)
    for file in made.glob("*.safetensors*"):
        file.unlink()
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made


def without_plan(source: Path, folder: Path) -> Path:
    target = copied(source, folder)
    change_config(target, yopo=None)
    return target


def change_config(folder: Path, **changes: Any) -> None:
    """Of config.json; None: the key goes."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def change_text(folder: Path, **changes: Any) -> None:
    """Of the language model's config."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change_config(folder, text_config={**text, **changes}, yopo=None)


def ask(folder: Path, image: Path, *more: str) -> list[str]:
    words = ["--model-path", str(folder), "--image-file", str(image), "--device", "cpu"]
    return [*words, "--question", "how many?", "--max-new-tokens", "4", *more]


def answered(folder: Path, image: Path, capsys: pytest.CaptureFixture[str], *more: str) -> Any:
    """The four lines that it prints."""
    capsys.readouterr()
    assert main(["infer", *ask(folder, image, *more)]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_family_answers_with_the_lines_that_llava_has(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from yopo.prompts import load
    from yopo.prompts.questions import Question

    image = own.parent / "picture.png"
    plan, question, answer, prefill = answered(own, image, capsys)
    assert plan == f"plan: {random_llava.a_plan().summary()}"
    assert question == "USER: how many?"
    prompter = load(own, "cpu")
    asked = Question(image, "how many?", None)
    assert answer == f"ASSISTANT: {prompter.answer(asked, 4)}"
    tokens = prompter(asked)["input_ids"].shape[1]
    assert prefill.startswith(f"prefill: {tokens} tokens (16 visual, {tokens - 16} text) in ")
    assert "3 further tokens in" in prefill


def test_the_masses_asked_for_are_those_that_run(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import yopo

    ran: list[Any] = []
    real = transformers.GenerationMixin.generate
    monkeypatch.setattr(
        transformers.GenerationMixin,
        "generate",
        lambda self, *a, **k: ran.append(yopo.plan_of(self)) or real(self, *a, **k),
    )
    plan, *_ = answered(own, own.parent / "picture.png", capsys, "--mass", "drop/exact")
    assert "Mass on visual keys: drop in pruned heads, exact from layer" in plan
    assert [(p.head_mass, p.cut_mass) for p in ran] == [("drop", "exact")]


def test_without_a_plan_nothing_is_pruned_and_masses_are_refused(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense, image = without_plan(own, tmp_path), own.parent / "picture.png"
    plan, *_, prefill = answered(dense, image, capsys)
    assert plan == "plan: none in this checkpoint: nothing is pruned."
    assert "(16 visual, " in prefill
    refused(ask(dense, image, "--mass", "drop"), "there is no plan in this checkpoint", capsys)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mass", "half"], "--mass is 'half'; allowed"),
        (["--mass", ""], "--mass is ''; allowed"),
        (["--mass", "sink"], "has no sinks; fit them: python -m yopo sinks CHECKPOINT --data FILE"),
        (["--max-new-tokens", "0"], "--max-new-tokens is 0"),
    ],
)
def test_bad_options_are_one_line(
    own: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(ask(own, own.parent / "picture.png", *words), message, capsys)


def no_processor(folder: Path) -> None:
    for file in folder.glob("*processor*"):
        file.unlink()


def no_processor_nor_tokenizer(folder: Path) -> None:
    no_processor(folder)
    for file in folder.glob("*token*"):
        file.unlink()


def no_template(folder: Path) -> None:
    for file in folder.glob("chat_template*"):
        file.unlink()
    file = folder / "tokenizer_config.json"
    fields = json.loads(file.read_text())
    del fields["chat_template"]
    file.write_text(json.dumps(fields))


def broken_template(folder: Path, template: str = "{% if %}") -> None:
    no_template(folder)
    (folder / "chat_template.jinja").write_text(template)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template}))


def template_of_text(folder: Path) -> None:
    """One that takes a message for a string, as those of language models do."""
    broken_template(folder, "{% for m in messages %}{{ 'USER: ' + m['content'] }}{% endfor %}")


def text_alone(folder: Path) -> None:
    """A language model in the place of the one with a tower."""
    config = json.loads((folder / "config.json").read_text())
    text = transformers.LlamaConfig(**config["text_config"])
    for file in folder.glob("*.safetensors"):
        file.unlink()
    transformers.LlamaForCausalLM(text).save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_config, "has no config.json"),
        (cut_config, "config.json is not JSON"),
        (no_weights, "has no weights"),
        (cut_weights, "model.safetensors is cut off"),
        (missing_shard, "has no model-00002-of-00002.safetensors, which its index names"),
        (no_processor, "preprocessor_config.json"),
        (no_processor_nor_tokenizer, "cannot load"),
        (no_template, "has no chat template"),
        (broken_template, "takes no question about an image: Expected an expression"),
        (template_of_text, "takes no question about an image: can only concatenate"),
        (text_alone, "is a llama, which takes no images"),
        (lambda folder: change_config(folder, model_type="no-such"), "no-such"),
        (lambda folder: change_config(folder, yopo={"format": 1}), "block of the config is corr"),
        (
            lambda folder: change_text(folder, intermediate_size=25),
            "(of shape (24, 32), not (25, 32))",
        ),
        (lambda folder: change_text(folder, num_hidden_layers=4), "layers.3"),
    ],
)
def test_a_damaged_checkpoint_of_a_family_is_one_line(
    own: Path, tmp_path: Path, damage: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(own, tmp_path)
    damage(folder)
    refused(ask(folder, own.parent / "picture.png"), message, capsys)

"""`python -m yopo convert`: original LLaVA-1.5 → transformers' LlavaForConditionalGeneration, and
what holds for every format: nothing half-written, resumable, one shard in memory, checksums."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import random_internvl
import random_llava
import torch
import transformers
from packaging.version import Version
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from yopo.checkpoint import neuron_order, shards
from yopo.commands.command_line import main
from yopo.convert import weight_stream as convert_stream
from yopo.errors import BadInput
from yopo.models.attach import ffn_order_of
from yopo.plan.pruning_plan import PruningPlan

if Version(transformers.__version__) < Version("4.45"):
    pytest.skip("converted checkpoints are for transformers 4.45 on", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples/tiny_llava/checkpoints"
IMAGES = sorted((ROOT / "examples/tiny_llava/images").glob("*.png"))
QUESTIONS = (
    "what color is the shape?",
    "what shape is in the image?",
    "is there a red shape in the image?",
)
needs_llava = pytest.mark.skipif(find_spec("llava") is None, reason="llava-torch is not installed")
needs_padding = pytest.mark.skipif(
    not hasattr(transformers, "LlavaImageProcessor"), reason="this version pads no images"
)


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded checkpoints name their vision tower relative to it."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def convert(source: Path, target: Path, *options: str) -> Path:
    assert main(["convert", str(source), str(target), *options]) == 0
    return target


def loaded(folder: Path) -> Any:
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    assert not info["mismatched_keys"]
    return model.float().eval()


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def sums(folder: Path) -> dict[str, str]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("dense") / "new"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return convert(TINY / "tiny-llava-v1-dense", target)


# ---------------------------------------------------------- the embedded model, in both its forms


@contextmanager
def yopo_patched() -> Iterator[None]:
    """Not at import: other tests' transformers must stay stock."""
    from yopo.patch import patched, undo

    undo()  # importing it enables
    with patched():
        yield


def original(kind: str) -> tuple[Any, Any, Any]:
    """Tokenizer, model in float32 and image processor, by the LLaVA package under yopo.patch."""
    with yopo_patched():
        from llava.model.builder import load_pretrained_model

        name = f"tiny-llava-v1-{kind}"
        tokenizer, model, processor, _ = load_pretrained_model(
            str(TINY / name), None, name, device="cpu"
        )
    model = random_llava.in_float32(model)
    model.get_vision_tower().float()
    return tokenizer, model.eval(), processor


def llavas_prompt(question: str, image: bool = True) -> str:
    from llava.conversation import conv_templates

    conversation = conv_templates["v1"].copy()
    conversation.append_message(conversation.roles[0], ("<image>\n" if image else "") + question)
    conversation.append_message(conversation.roles[1], None)
    return conversation.get_prompt()


def ask(question: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]


def same_ids(new: Tensor, llava: Tensor, image_id: int) -> None:
    """LLaVA has one -200 where the new form has as many <image> as there are visual tokens."""
    rest = new[new != image_id]
    assert rest.tolist() == llava[llava != -200].tolist()
    first = int((new == image_id).nonzero()[0])
    assert first == int((llava == -200).nonzero()[0])


@torch.no_grad()
def agree(model: Any, folder: Path, form: tuple[Any, Any, Any]) -> set[str]:
    """Checks that `model`, converted to `folder`, computes what LLaVA's `form` of it does: pixels,
    ids, logits and answers on the four pictures. Returns the answers."""
    from llava.mm_utils import process_images, tokenizer_image_token
    from PIL import Image

    tokenizer, old, image_processor = form
    processor = transformers.AutoProcessor.from_pretrained(folder)
    answers = set()
    for file in IMAGES:
        picture = Image.open(file).convert("RGB")
        pixels = process_images([picture], image_processor, old.config)
        for question in QUESTIONS:
            text = processor.apply_chat_template(ask(question), add_generation_prompt=True)
            assert text == llavas_prompt(question)
            inputs = processor(images=picture, text=text, return_tensors="pt")
            torch.testing.assert_close(inputs["pixel_values"], pixels, atol=1e-6, rtol=0)
            ids = tokenizer_image_token(text, tokenizer, return_tensors="pt")[None]
            same_ids(inputs["input_ids"][0], ids[0], model.config.image_token_index)
            got = model(**inputs).logits[0]
            expected = old(ids, images=pixels).logits[0]
            assert got.shape[0] == expected.shape[0]
            torch.testing.assert_close(got[:, :640], expected, atol=1e-4, rtol=1e-4)
            greedy = dict(max_new_tokens=8, do_sample=False)
            new = model.generate(**inputs, **greedy)[0, inputs["input_ids"].shape[1] :]
            wanted = old.generate(ids, images=pixels, **greedy)[0]
            wanted = wanted[wanted != tokenizer.bos_token_id] if len(wanted) != len(new) else wanted
            assert new.tolist() == wanted.tolist()
            answers.add(processor.decode(new, skip_special_tokens=True).strip())
    return answers


@pytest.mark.llava
@needs_llava
@needs_padding
def test_the_dense_model_answers_the_same_in_both_forms(dense: Path) -> None:
    answers = agree(loaded(dense), dense, original("dense"))
    assert {"red", "yes", "no"} & answers and len(answers) >= 4


@pytest.mark.llava
@needs_llava
@needs_padding
def test_the_pruned_model_answers_the_same_in_both_forms(tmp_path: Path) -> None:
    from yopo import plan_of

    folder = convert(TINY / "tiny-llava-v1-pruned", tmp_path / "new")
    form = original("pruned")
    with yopo_patched():
        model = loaded(folder)
    assert plan_of(model) == plan_of(form[1]) is not None
    answers = agree(model, folder, form)
    assert {"red", "yes", "no"} & answers and len(answers) >= 4


@pytest.mark.llava
@needs_llava
@needs_padding
def test_pictures_that_are_not_square_are_padded_as_llava_pads_them(dense: Path) -> None:
    _, old, image_processor = original("dense")
    from llava.mm_utils import process_images

    processor = transformers.AutoProcessor.from_pretrained(dense)
    for width, height in ((120, 50), (51, 130), (96, 97)):
        picture = random_llava.picture(width, width, height)
        expected = process_images([picture], image_processor, old.config)
        got = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@pytest.mark.llava
@needs_llava
def test_prompts_are_tokenized_as_llava_does(dense: Path) -> None:
    """Several images, several turns, images in the middle, text alone."""
    llava_tokenizer, _, _ = original("dense")
    from llava.mm_utils import tokenizer_image_token

    new = transformers.AutoTokenizer.from_pretrained(dense)
    image = new.convert_tokens_to_ids("<image>")
    first = llavas_prompt("what color is the shape?")
    for text in (
        first,
        first + " red</s>USER: what shape is in the image? ASSISTANT:",
        llavas_prompt("hello", image=False),
        "USER: <image>\n<image>\nis there a red shape? ASSISTANT:",
        "<image>\nwhat",
        "USER: what is <image>",
    ):
        got = [-200 if i == image else i for i in new.encode(text)]
        assert got == tokenizer_image_token(text, llava_tokenizer), text


def test_a_space_after_an_image_is_kept_as_llava_kept_it(dense: Path) -> None:
    """As on transformers 4, by which LLaVA was trained; on 5 its own tokenizer drops it."""
    from sentencepiece import SentencePieceProcessor

    source = str(TINY / "tiny-llava-v1-dense/tokenizer.model")
    pieces = SentencePieceProcessor(model_file=source)
    new = transformers.AutoTokenizer.from_pretrained(dense)
    image = new.convert_tokens_to_ids("<image>")
    expected = [1, *pieces.encode("USER: what is "), image, *pieces.encode(" this? ASSISTANT:")]
    assert new.encode("USER: what is <image> this? ASSISTANT:") == expected


def test_the_chat_template_takes_turns_and_plain_strings(dense: Path) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *ask("what?"),
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
        {"role": "user", "content": "sure?"},
    ]
    expected = "Be brief. USER: <image>\nwhat? ASSISTANT: red</s>USER: sure? ASSISTANT:"
    holders = [transformers.AutoTokenizer]
    if hasattr(transformers, "LlavaImageProcessor"):
        holders.append(transformers.AutoProcessor)
    for holder in holders:
        text = holder.from_pretrained(dense).apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        assert text == expected


def test_added_rows_are_never_chosen(dense: Path) -> None:
    """The rows beyond the old vocabulary are the mean of the others, in both matrices."""
    model = loaded(dense)
    for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
        assert matrix.shape[0] == 704
        mean = matrix[:640].mean(0, keepdim=True)
        torch.testing.assert_close(matrix[640:], mean.expand(64, -1), atol=1e-3, rtol=1e-3)
    assert model.config.image_token_index == 640


@needs_padding
def test_the_auto_classes_and_the_pipeline_take_the_folder_as_it_is(dense: Path) -> None:
    """Through the Auto classes, batched, with the padding side that generation needs."""
    from PIL import Image

    processor = transformers.AutoProcessor.from_pretrained(dense)
    model = transformers.AutoModelForImageTextToText.from_pretrained(dense).float()
    assert type(model) is transformers.LlavaForConditionalGeneration
    pictures = [Image.open(file).convert("RGB") for file in IMAGES[:2]]
    texts = [
        processor.apply_chat_template(ask(question), add_generation_prompt=True)
        for question in QUESTIONS[:2]
    ]
    batch = processor(images=pictures, text=texts, padding=True, return_tensors="pt")
    out = model.generate(**batch, max_new_tokens=6, do_sample=False)
    got = processor.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    for i in range(2):
        one = processor(images=pictures[i], text=texts[i], return_tensors="pt")
        single = model.generate(**one, max_new_tokens=6, do_sample=False)
        answer = processor.decode(single[0, one["input_ids"].shape[1] :], skip_special_tokens=True)
        assert got[i].strip() == answer.strip() != ""

    pipeline = transformers.pipeline("image-text-to-text", model=model, processor=processor)
    content = [{"type": "image", "image": pictures[0]}, {"type": "text", "text": QUESTIONS[0]}]
    asked = [{"role": "user", "content": content}]
    [said] = pipeline(text=asked, max_new_tokens=6, return_full_text=False)
    assert said["generated_text"].strip() == got[0].strip()


# --------------------------------------------------------------------------------------- the plan


def test_a_yopo_block_is_kept(tmp_path: Path) -> None:
    source = TINY / "tiny-llava-v1-pruned"
    folder = convert(source, tmp_path / "new")
    before = PruningPlan.from_config(json.loads((source / "config.json").read_text()))
    content = json.loads((folder / "config.json").read_text())
    assert PruningPlan.from_config(content) == before
    config = transformers.AutoConfig.from_pretrained(folder)
    assert PruningPlan.from_config(config) == before


def test_released_fields_become_a_block_with_the_mask_in_it(tmp_path: Path) -> None:
    released = {
        "attncut_w": 5, "layercut_num": 2, "headcut_num": 1, "mlpcut_ratio": 2, "sprompt_len": 35
    }  # fmt: skip
    source = random_llava.make(tmp_path, **released)
    from yopo.plan import head_mask

    keep = random_llava.a_plan().head_keep
    head_mask.save(source / "headmask_tiny_1.npy", keep)
    folder = convert(source, tmp_path / "new")
    plan = PruningPlan.from_config(json.loads((folder / "config.json").read_text()))
    assert plan == PruningPlan(keep, window=5, layer_cut=2, ffn_ratio=2)
    assert (plan.head_mass, plan.cut_mass) == ("exact", "exact")


def test_the_environment_does_not_get_into_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("YOPO_MASS", "drop")
    refused(TINY / "tiny-llava-v1-pruned", tmp_path / "new", "YOPO_MASS is set", capsys)


# --------------------------------------------------------------------- weights from file to file


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return random_llava.make(tmp_path)


def resharded(source: Path, count: int, kind: str) -> Path:
    weights = load_file(source / "model.safetensors")
    random_internvl.save(source, weights, count, kind)
    return source


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("count", [1, 3])
def test_all_kinds_of_shards_give_the_same_tensors(
    tmp_path: Path, source: Path, kind: str, count: int
) -> None:
    expected = tensors(convert(source, tmp_path / "expected"))
    got = tensors(convert(resharded(source, count, kind), tmp_path / "got"))
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    loaded(tmp_path / "got")


def test_bin_files_of_before_torch_1_6_are_read(tmp_path: Path, source: Path) -> None:
    expected = tensors(convert(source, tmp_path / "expected"))
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    got = tensors(convert(source, tmp_path / "got"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_tensors_keep_their_dtype_and_bits(tmp_path: Path, source: Path) -> None:
    weights = load_file(source / "model.safetensors")
    weights = {name: value.bfloat16() for name, value in weights.items()}
    random_internvl.save(source, weights, 2, "safetensors")
    new = tensors(convert(source, tmp_path / "new"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(new[f"language_model.{name}"], weights[name])
    assert new[f"language_model.{name}"].dtype == torch.bfloat16


def test_the_report_tells_the_checksum_of_every_file_and_tensor(
    tmp_path: Path, source: Path
) -> None:
    folder = convert(resharded(source, 2, "bin"), tmp_path / "new", "--shard-gb", "0.00001")
    report = json.loads((folder / "conversion.json").read_text())
    files = sums(folder)
    del files["conversion.json"]
    assert {name: entry["sha256"] for name, entry in report["files"].items()} == files
    assert len(report["sources"]) == 3  # two of the language model, one of the vision tower
    for file, entry in report["sources"].items():
        assert hashlib.sha256(Path(file).read_bytes()).hexdigest() == entry["sha256"]
        assert Path(file).stat().st_size == entry["bytes"]
    new = tensors(folder)
    assert report["tensors"].keys() == new.keys()
    for name, entry in report["tensors"].items():
        assert entry["shape"] == list(new[name].shape)
        assert entry["sha256"] == hashlib.sha256(new[name].numpy().tobytes()).hexdigest()
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in new.values())
    for name, file in index["weight_map"].items():
        with safe_open(folder / file, framework="pt") as shard:
            assert name in shard.keys()  # noqa: SIM118
    loaded(folder)


def test_no_more_than_one_shard_is_held(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One source file open at a time, and never more tensors made than fit the size asked for."""
    limit, open_now, most_open, most_bytes = 20_000, [], 0, 0

    class Watched(shards.Shard):
        def __enter__(self) -> Any:
            nonlocal most_open
            if self.file.parent != partial:
                open_now.append(self)
            most_open = max(most_open, len(open_now))
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            if self in open_now:
                open_now.remove(self)
            super().__exit__(*error)

    def watched_save(made: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        nonlocal most_bytes
        if len(made) > 1:
            most_bytes = max(most_bytes, sum(value.nbytes for value in made.values()))
        save_file(made, *args, **kwargs)

    partial = tmp_path / "new.partial"
    monkeypatch.setattr(convert_stream, "Shard", Watched)
    monkeypatch.setattr(convert_stream, "save_file", watched_save)
    convert(resharded(source, 4, "bin"), tmp_path / "new", "--shard-gb", str(limit / 1e9))
    assert most_open == 1
    assert 0 < most_bytes <= limit
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 5


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    resharded(source, 3, "bin")
    options = ("--shard-gb", "0.00002")
    whole = sums(convert(source, tmp_path / "whole", *options))
    calls = 0

    def failing(made: dict[str, Tensor], file: Path, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            file.write_bytes(b"half a file")
            raise Stop
        save_file(made, file, **kwargs)

    target, partial = tmp_path / "new", tmp_path / "new.partial"
    with monkeypatch.context() as patch:
        patch.setattr(convert_stream, "save_file", failing)
        with pytest.raises(Stop):
            main(["convert", str(source), str(target), *options])
    assert not target.exists() and partial.is_dir()

    written: list[str] = []

    def counting(made: dict[str, Tensor], file: Path, **kwargs: Any) -> None:
        written.append(file.name)
        save_file(made, file, **kwargs)

    monkeypatch.setattr(convert_stream, "save_file", counting)
    assert sums(convert(source, target, *options)) == whole
    assert not partial.exists()
    assert len(written) == len(list(target.glob("*.safetensors"))) - after


def test_stopped_by_ctrl_c_it_says_how_to_go_on(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    whole = sums(convert(source, tmp_path / "whole"))
    places = ("yopo.convert.tokenizer_files.write", "yopo.convert.conversion.stream")
    for place in (*places, "pathlib.Path.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(place, stop)
            assert main(["convert", str(source), str(tmp_path / "new")]) == 130
        assert "goes on from" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert sums(convert(source, tmp_path / "new")) == whole


def test_a_target_that_cannot_be_written_is_one_line(source: Path, capsys: Any) -> None:
    assert main(["convert", str(source), "/proc/nowhere/new"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("yopo: error: /proc/nowhere")


@pytest.mark.parametrize("planned", [True, False])
def test_the_order_of_ffn_neurons_is_kept(tmp_path: Path, source: Path, planned: bool) -> None:
    """A calibrated checkpoint stays one whose neurons can be put back (neurons.undo)."""
    config = json.loads((source / "config.json").read_text())
    layers, size = config["num_hidden_layers"], config["intermediate_size"]
    order = torch.stack([torch.arange(size).flip(0)] * layers)
    neuron_order.save_order(source / neuron_order.FILE, order)
    if planned:
        keep = torch.ones(layers, config["num_attention_heads"])
        PruningPlan(keep, ffn_ratio=2, ffn_order=neuron_order.checksum(order)).save_to(config)
    else:
        config["yopo_ffn_order"] = neuron_order.checksum(order)
    (source / "config.json").write_text(json.dumps(config))
    made = convert(source, tmp_path / "new")
    assert torch.equal(neuron_order.load_order(made / neuron_order.FILE), order)
    assert ffn_order_of(loaded(made)) == neuron_order.checksum(order)


def test_a_damaged_finished_shard_is_made_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--shard-gb", "0.00002")
    whole = sums(convert(source, tmp_path / "whole", *options))

    def failing(folder: Path, **_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(
            "yopo.convert.tokenizer_files.write", lambda *_: (_ for _ in ()).throw(Stop())
        )
        with pytest.raises(Stop):
            main(["convert", str(source), str(tmp_path / "new"), *options])
    shard = next((tmp_path / "new.partial").glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert sums(convert(source, tmp_path / "new", *options)) == whole


def test_leftovers_of_another_conversion_are_not_mixed_in(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    target = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(
            "yopo.convert.tokenizer_files.write", lambda *_: (_ for _ in ()).throw(Stop())
        )
        with pytest.raises(Stop):
            main(["convert", str(source), str(target)])
    resharded(source, 2, "bin")
    assert main(["convert", str(source), str(target)]) == 2
    assert "unfinished conversion of something else" in capsys.readouterr().err
    assert not target.exists()


# -------------------------------------------------------------------------------------- bad input


def refused(source: Path | str, target: Path, message: str, capsys: Any, *options: str) -> None:
    """Exit 2, one line with `message`, and nothing written."""
    assert main(["convert", str(source), str(target), *options]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error, error
    assert not target.exists() and not target.with_name(f"{target.name}.partial").exists()


def test_a_target_that_is_there_is_left_alone(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    assert main(["convert", str(source), str(target)]) == 2
    assert "DST is there already" in capsys.readouterr().err
    assert [path.name for path in target.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize("size", ["0", "-1", "nan", "inf"])
def test_shards_of_no_size_are_refused(
    tmp_path: Path, source: Path, size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refused(source, tmp_path / "new", "--shard-gb is", capsys, "--shard-gb", size)


def test_missing_surplus_and_misshapen_tensors_are_named(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = load_file(source / "model.safetensors")
    lost = "model.layers.1.self_attn.k_proj.weight"
    for changed, message in (
        (
            {n: w for n, w in weights.items() if n != lost},
            "1 missing, by the names of the new model: language_model.layers.1",
        ),
        (
            {**weights, "model.layers.3.mlp.up_proj.weight": torch.ones(2, 2)},
            "too many: model.layers.3",
        ),
        ({**weights, "adapter.weight": torch.ones(2, 2)}, "too many: adapter.weight"),
        ({**weights, lost: torch.ones(2, 2)}, f"{lost} in"),
        ({**weights, "lm_head.weight": torch.ones(5, 32)}, "lm_head.weight in"),
    ):
        save_file(changed, source / "model.safetensors")
        refused(source, tmp_path / "new", message, capsys)


def test_tensors_that_the_vision_tower_lacks_are_named(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "clip" / "model.safetensors"
    weights = load_file(file)
    lost = next(name for name in weights if "layers.1.mlp.fc1.weight" in name)
    save_file({n: w for n, w in weights.items() if n != lost}, file)
    refused(source, tmp_path / "new", "vision_tower.encoder.layers.1.mlp.fc1.weight", capsys)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["LlavaMptForCausalLM"]}, "LlavaMptForCausalLM"),
        ({"architectures": ["MobileVLM"]}, "InternVL2 as its makers write it"),
        ({"architectures": None, "model_type": "bert"}, "(bert)"),
        ({"text_config": {}}, "in transformers' own format already"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "LLaVA-NeXT"),
        ({"image_aspect_ratio": "anyres"}, "LLaVA-NeXT"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised by bitsandbytes"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by gptq"),
        ({"attncut_w": 5}, "some released pruning fields"),
        ({"yopo": {"format": 1}}, "block of the config is corrupt"),
        ({"mm_vision_tower": "no/such/tower"}, "mm_vision_tower"),
        ({"hidden_size": "many"}, "transformers cannot make a model of"),
        ({"num_attention_heads": 0}, "transformers cannot make a model of"),
    ],
)
def test_what_cannot_be_converted_is_said(
    tmp_path: Path, source: Path, change: dict[str, Any], message: str, capsys: Any
) -> None:
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    refused(source, tmp_path / "new", message, capsys)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.0.mlp.up_proj.SCB", torch.ones(4)),
        ("model.layers.0.mlp.up_proj.qweight", torch.ones(4, dtype=torch.int32)),
        ("model.layers.0.mlp.up_proj.weight", torch.ones(4, dtype=torch.uint8)),
    ],
)
def test_quantised_weights_are_named(
    tmp_path: Path, source: Path, name: str, value: Tensor, capsys: Any
) -> None:
    weights = {**load_file(source / "model.safetensors"), name: value}
    save_file(weights, source / "model.safetensors")
    refused(
        source, tmp_path / "new", f"quantised, which cannot be converted: it holds {name}", capsys
    )


def test_a_pickle_that_would_run_code_is_not_read(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "model.safetensors").unlink()
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (ran,))

    torch.save({"model.norm.weight": Evil()}, source / "pytorch_model.bin")
    refused(source, tmp_path / "new", "holds more than tensors", capsys)
    assert not ran.exists()


def test_damaged_files_are_named(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, config = source / "model.safetensors", source / "config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[:-10])
    refused(source, tmp_path / "new", "model.safetensors is cut off", capsys)
    weights.unlink()
    refused(source, tmp_path / "new", "has no weights", capsys)
    (source / "pytorch_model.bin").write_bytes(b"PK\x03\x04 cut off")
    refused(source, tmp_path / "new", "pytorch_model.bin is cut off", capsys)
    (source / "pytorch_model.bin").unlink()
    weights.write_bytes(whole)
    config.write_text(text[:50])
    refused(source, tmp_path / "new", "config.json is not JSON", capsys)
    config.write_text(text)
    (source / "tokenizer.model").unlink()
    refused(source, tmp_path / "new", "has no tokenizer", capsys)
    refused(tmp_path / "none", tmp_path / "new", "there is no folder", capsys)
    refused("nobody/nothing-of-that-name", tmp_path / "new", "there is no folder", capsys)


def test_a_vision_tower_that_is_no_clip_is_refused(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "siglip"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    refused(source, tmp_path / "new", "is a siglip", capsys, "--vision-tower", str(other))


def test_a_vision_tower_elsewhere_can_be_given(tmp_path: Path, source: Path) -> None:
    (tmp_path / "clip").rename(tmp_path / "moved")
    folder = convert(source, tmp_path / "new", "--vision-tower", str(tmp_path / "moved"))
    loaded(folder)


def test_a_tower_trained_along_comes_from_the_checkpoint(tmp_path: Path, source: Path) -> None:
    """unfreeze_mm_vision_tower: LLaVA lets the checkpoint's weights overwrite the named tower's."""
    tower = load_file(tmp_path / "clip" / "model.safetensors")
    own = {f"model.vision_tower.vision_tower.{n}": w + 1 for n, w in tower.items()}
    weights = load_file(source / "model.safetensors")
    save_file({**weights, **own}, source / "model.safetensors")
    frozen = tensors(convert(source, tmp_path / "frozen"))
    file = source / "config.json"
    content = {**json.loads(file.read_text()), "unfreeze_mm_vision_tower": True}
    file.write_text(json.dumps(content))
    trained = tensors(convert(source, tmp_path / "trained"))
    for name, value in tower.items():
        assert torch.equal(frozen[f"vision_tower.{name}"], value)
        assert torch.equal(trained[f"vision_tower.{name}"], value + 1)


def test_an_index_that_points_elsewhere_is_refused(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../model.safetensors", "/etc/passwd", 3):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(BadInput, match="no file beside it"):
            shards.weight_files(tmp_path)


def test_a_conversion_stopped_at_its_checksums_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "new.partial"
    convert_stream._resume(partial, "a job")
    (partial / "config.json").write_text("{}")

    def stop(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(convert_stream, "_checksum", stop)
        convert_stream.finish(partial, tmp_path / "new", {})
    assert convert_stream._resume(partial, "a job")["job"] == "a job"
    convert_stream.finish(partial, tmp_path / "new", {})
    assert (tmp_path / "new").is_dir() and not partial.exists()

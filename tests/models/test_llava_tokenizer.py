"""AutoTokenizer gives original-format LLaVA checkpoints LLaVA's ids on every version; nothing else
goes another way than without the patch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import AutoTokenizer

from yopo import versions as _compat
from yopo.models import llava_tokenizer

DENSE = Path(__file__).resolve().parents[2] / "examples/tiny_llava/checkpoints/tiny-llava-v1-dense"
STOCK = vars(AutoTokenizer)["from_pretrained"]  # at collection: nothing may be patched by then
TEXTS = ["A chat USER: <x>\nwhat? ASSISTANT:", " what?", "\nwhat</s>A", "", "é  x"]
SLOW_OR_NOT = pytest.mark.parametrize("kwargs", [{"use_fast": False}, {}], ids=["slow", "default"])
needed = pytest.mark.skipif(
    not _compat.auto_tokenizer_ignores_class(), reason="AutoTokenizer heeds tokenizer_class"
)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a checkpoint's config and tokenizer files, with changes to either's JSON."""

    def make(tokenizer: dict[str, Any] | None = None, **config: Any) -> Path:
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        path.mkdir()
        for name in ("special_tokens_map.json", "tokenizer.model"):
            shutil.copy(DENSE / name, path)
        for name, changes in (("config.json", config), ("tokenizer_config.json", tokenizer or {})):
            content = json.loads((DENSE / name).read_text()) | changes
            content = {key: value for key, value in content.items() if value is not ...}
            (path / name).write_text(json.dumps(content))
        return path

    return make


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    llava_tokenizer.uninstall()
    assert vars(AutoTokenizer)["from_pretrained"] is STOCK


@pytest.fixture
def went_to_stock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., bool]:
    """Whether a call, installed, reaches the original with all its arguments as they were."""
    answer, calls = object(), []

    def original(cls: type, *args: Any, **kwargs: Any) -> object:
        calls.append((cls, args, kwargs))
        return answer

    def ask(path: Any, *args: Any, **kwargs: Any) -> bool:
        with monkeypatch.context() as context:
            context.setattr(AutoTokenizer, "from_pretrained", classmethod(original))
            llava_tokenizer.install()
            result = AutoTokenizer.from_pretrained(path, *args, **kwargs)
            llava_tokenizer.uninstall()
        if result is answer:
            assert calls.pop() == (AutoTokenizer, (path, *args), kwargs)
        assert not calls
        return result is answer

    return ask


def ids(path: Path, **kwargs: Any) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(path, **kwargs)
    return [tokenizer(text).input_ids for text in TEXTS]


@SLOW_OR_NOT
@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast"])
def test_ids_do_not_depend_on_the_model_type(
    folder: Callable[..., Path], kwargs: dict[str, Any], named: str
) -> None:
    tokenizer = {"tokenizer_class": named}
    expected = ids(folder(tokenizer), **kwargs)  # "llava_llama", unknown to transformers
    llava_tokenizer.install()
    llava_tokenizer.install()
    path = folder(tokenizer, model_type="llava")
    assert ids(path, **kwargs) == expected
    assert ids(str(path), **kwargs) == expected
    assert ids(path, trust_remote_code=True, revision="main", **kwargs) == expected
    assert ids(folder(tokenizer), **kwargs) == expected


def test_ids_of_a_prompt(folder: Callable[..., Path]) -> None:
    llava_tokenizer.install()
    tokenizer = AutoTokenizer.from_pretrained(folder(model_type="llava"), use_fast=False)
    assert tokenizer(TEXTS[0]).input_ids[:2] == [1, 270]  # transformers 4.36.2


def test_class_named_in_the_config_only(folder: Callable[..., Path]) -> None:
    expected = ids(folder())
    llava_tokenizer.install()
    path = folder({"tokenizer_class": ...}, model_type="llava", tokenizer_class="LlamaTokenizer")
    assert ids(path) == expected


def test_tokenizer_arguments_are_passed_on(folder: Callable[..., Path]) -> None:
    llava_tokenizer.install()
    wanted = dict(model_max_length=77, padding_side="left", use_fast=False)  # as LLaVA's training
    tokenizer = AutoTokenizer.from_pretrained(
        pretrained_model_name_or_path=folder(model_type="llava"), **wanted
    )
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (77, "left")


@needed
@SLOW_OR_NOT
def test_transformers_still_needs_it(folder: Callable[..., Path], kwargs: dict[str, Any]) -> None:
    """Red: transformers has mended it; then give _compat.auto_tokenizer_ignores_class an end."""
    assert ids(folder(model_type="llava"), **kwargs) != ids(folder(), **kwargs)


@needed
def test_only_original_llava_goes_another_way(
    folder: Callable[..., Path], went_to_stock: Callable[..., bool], tmp_path: Path
) -> None:
    ours = folder(model_type="llava")
    assert not went_to_stock(ours, use_fast=False)
    native = ["LlavaForConditionalGeneration"]
    assert went_to_stock(folder(model_type="llava", architectures=native), use_fast=False)
    assert went_to_stock(folder(model_type="llava", architectures=...))
    assert went_to_stock(folder(model_type="llava", architectures=None))
    assert went_to_stock(folder(), use_fast=False)  # llava_llama: right without us
    assert went_to_stock(folder(model_type="llama", architectures=["LlamaForCausalLM"]))
    assert went_to_stock(folder({"tokenizer_class": "GPT2Tokenizer"}, model_type="llava"))
    assert went_to_stock(folder({"tokenizer_class": ...}, model_type="llava"))
    assert went_to_stock(folder({"auto_map": {"AutoTokenizer": ["a.B", None]}}, model_type="llava"))
    assert went_to_stock(tmp_path / "nothing-here", use_fast=False)
    for other in ({"tokenizer_type": "llama"}, {"gguf_file": "x"}, {"backend": "sentencepiece"}):
        assert went_to_stock(ours, **other)
    (ours / "tokenizer.model").unlink()
    assert went_to_stock(ours, use_fast=False)


@needed
def test_a_config_that_is_passed_decides(
    folder: Callable[..., Path], went_to_stock: Callable[..., bool]
) -> None:
    original = ["LlavaLlamaForCausalLM"]
    llava = transformers.LlavaConfig(architectures=original)
    assert went_to_stock(folder(model_type="llava"), config=transformers.LlamaConfig())
    assert not went_to_stock(folder(), config=llava)


def test_patch_installs_and_undo_restores_the_object() -> None:
    import yopo.patch

    try:
        for _ in range(2):
            yopo.patch.enable()
            changed = vars(AutoTokenizer)["from_pretrained"] is not STOCK
            assert changed == _compat.auto_tokenizer_ignores_class()
            yopo.patch.undo()
            assert vars(AutoTokenizer)["from_pretrained"] is STOCK
    finally:
        yopo.patch.undo()

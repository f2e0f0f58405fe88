"""Tokenizers and what else a converted checkpoint needs around its weights: tokenizer.json and the
JSON files beside it, written in a form that every transformers from 4.45 on reads.

What the tokens of a format mean, and its prompts, are in from_llava.py and from_internvl.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers

from yopo.checkpoint.shards import read_json
from yopo.errors import BadInput
from yopo.files import write_json


def load(folder: Path, names: tuple[str, ...]) -> Tokenizer:
    """The tokenizer in `folder`, by the first class of `names` that transformers has. No code from
    the folder is run, whatever its tokenizer_config.json asks for.

    Raises BadInput: no tokenizer, one that cannot be read, or one that gives a token of
    added_tokens.json or tokenizer_config.json another id than these do.
    """
    files = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((folder / file).is_file() for file in files):
        raise BadInput(f"{folder} has no tokenizer ({', '.join(files)})")
    cls = next(getattr(transformers, name) for name in names if hasattr(transformers, name))
    try:
        tokenizer: Tokenizer = cls.from_pretrained(folder, legacy=False).backend_tokenizer
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise BadInput(f"the tokenizer in {folder} cannot be read: {error}") from error
    for token, index in sorted(_added(folder).items(), key=lambda pair: pair[1]):
        if tokenizer.token_to_id(token) is None:
            tokenizer.add_special_tokens([token])
        if tokenizer.token_to_id(token) != index:
            raise BadInput(
                f"the tokenizer in {folder} gives {token!r} the id {tokenizer.token_to_id(token)}, "
                f"but its added tokens say {index}"
            )
    return tokenizer


def as_sentencepiece(tokenizer: Tokenizer, prefix: bool) -> None:
    """Sets how spaces are treated: each one is a ▁, and with `prefix` the text begins with one.

    Transformers' versions differ in this for the same tokenizer.model.
    """
    scheme = "first" if prefix else "never"
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    steps += [decoders.Strip(content=" ", left=1)] if prefix else []
    tokenizer.decoder = decoders.Sequence(steps)


def write(
    folder: Path, tokenizer: Tokenizer, source: Path, template: str, extra: dict[str, Any]
) -> None:
    """tokenizer.json, tokenizer_config.json and the chat template, in the three places where
    versions of transformers look for it. `extra` are further fields of tokenizer_config.json."""
    given = read_json(source / "tokenizer_config.json") if _has_config(source) else {}
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": given.get("model_max_length", 2048),
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # 4.x's default has a third
        "chat_template": template,
        **special_tokens(source),
        **extra,
    }
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", fields)
    write_json(folder / "chat_template.json", {"chat_template": template})
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def special_tokens(source: Path) -> dict[str, str]:
    """bos_token, eos_token, unk_token and pad_token of the checkpoint `source`; where it has no
    padding token, the one for unknown text or the end serves."""
    given: dict[str, Any] = {}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (source / file).is_file():
            content = read_json(source / file)
            given |= {key: value for key, value in content.items() if value is not None}
    found = {}
    for kind in ("bos_token", "eos_token", "unk_token", "pad_token"):
        token = given.get(kind)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            found[kind] = token
    if "pad_token" not in found:
        spare = found.get("unk_token") or found.get("eos_token")
        found |= {"pad_token": spare} if spare else {}
    return found


def _has_config(source: Path) -> bool:
    return (source / "tokenizer_config.json").is_file()


def _added(folder: Path) -> dict[str, int]:
    """Token → id, as far as the files beside the tokenizer tell."""
    added: dict[str, int] = {}
    if (folder / "added_tokens.json").is_file():
        added |= read_json(folder / "added_tokens.json")
    if _has_config(folder):
        decoder = read_json(folder / "tokenizer_config.json").get("added_tokens_decoder") or {}
        added |= {token["content"]: int(index) for index, token in decoder.items()}
    return added

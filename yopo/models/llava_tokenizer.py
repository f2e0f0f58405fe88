"""Keeps AutoTokenizer from changing LLaVA's prompts on transformers 5: `install`, `uninstall`.
Touches original-format LLaVA checkpoints only; patch.py calls it. No prompt is built here.

Published LLaVA-1.5 checkpoints say "model_type": "llava", a name that transformers has since given
to its own LLaVA. From 5 on AutoTokenizer goes by that name, passes over the LlamaTokenizer that the
checkpoint asks for and converts tokenizer.model without the leading space: other ids, no error.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

import transformers
from transformers.utils import cached_file

from yopo import versions as _compat

_NAME = "from_pretrained"
_HUB = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)
_AUTO_ONLY = ("code_revision", "config", "trust_remote_code", "use_fast")  # choose a class, no more
_OTHER_WAYS = ("backend", "gguf_file", "mistral_format", "tokenizer_type")  # asked for: not ours

_stock: list[classmethod] = []  # what uninstall() puts back, and ours; empty: not installed


def install() -> None:
    """Wraps AutoTokenizer.from_pretrained, on versions that need it; twice is once."""
    if _stock or not _compat.auto_tokenizer_ignores_class():
        return
    stock: classmethod = vars(transformers.AutoTokenizer)[_NAME]

    @wraps(stock.__func__)
    def from_pretrained(
        cls: type, pretrained_model_name_or_path: Any, *inputs: Any, **kwargs: Any
    ) -> Any:
        path = pretrained_model_name_or_path
        if not _stock or not _asks_for_llama(path, kwargs):
            return stock.__get__(None, cls)(path, *inputs, **kwargs)
        passed = {key: value for key, value in kwargs.items() if key not in _AUTO_ONLY}
        return transformers.LlamaTokenizer.from_pretrained(path, *inputs, **passed)

    ours = classmethod(from_pretrained)
    _stock[:] = stock, ours
    setattr(transformers.AutoTokenizer, _NAME, ours)


def uninstall() -> None:
    """Puts the very object back that install() found; does nothing when not installed. A wrapper
    that somebody put around ours since stays theirs, and does nothing of ours."""
    if not _stock:
        return
    stock, ours = _stock
    if vars(transformers.AutoTokenizer)[_NAME] is ours:
        setattr(transformers.AutoTokenizer, _NAME, stock)
    _stock.clear()


def _asks_for_llama(path: Any, kwargs: dict[str, Any]) -> bool:
    """Whether this is an original-format LLaVA checkpoint whose tokenizer is named as Llama's and
    comes as tokenizer.model; a tokenizer.json holds everything, whichever class reads it."""
    # Here, as patch.py imports this file before it has looked at the version.
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if any(kwargs.get(key) is not None for key in _OTHER_WAYS):
        return False
    hub = {key: kwargs[key] for key in _HUB if key in kwargs}
    try:
        given = kwargs.get("config")  # where there is one, AutoTokenizer leaves the file unread
        if given is not None:
            config = given.to_dict()
        else:
            config, _ = transformers.PretrainedConfig.get_config_dict(path, **hub)
        if config.get("model_type") != "llava":
            return False
        if "LlavaLlamaForCausalLM" not in (config.get("architectures") or ()):
            return False  # transformers' own LLaVA
        tokenizer = get_tokenizer_config(path, **hub)
        name = tokenizer.get("tokenizer_class") or config.get("tokenizer_class")
        if name not in ("LlamaTokenizer", "LlamaTokenizerFast") or "auto_map" in tokenizer:
            return False
        return cached_file(path, "tokenizer.model", **hub) is not None
    except (OSError, ValueError):  # AutoTokenizer has its own words for what is missing
        return False

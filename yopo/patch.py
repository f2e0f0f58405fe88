"""Swaps yopo's Llama classes into the installed transformers, and out again: `enable`, `undo`,
`patched`. Importing this module enables. It holds no model code and no mathematics.

The Auto classes look names up in `transformers.models.llama` each time they are used, so they
follow without being touched; only AutoTokenizer is, on transformers 5, see llava_tokenizer.py.
Models of families/ are pruned as they are built, in `post_init`: none of their modules need be
imported here, and it does not matter where else their classes are held.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

from transformers import PreTrainedModel

from yopo import versions as _compat
from yopo.models import llava_tokenizer
from yopo.models import original_llava as llava

_HOME = "transformers.models.llama"
_NAMES = ("LlamaModel", "LlamaForCausalLM")

_stock: dict[str, type] = {}  # what undo() puts back; empty: not enabled
_stock_post_init = PreTrainedModel.post_init


@functools.wraps(_stock_post_init)
def _post_init(self: Any) -> None:
    from yopo.models.attach import prune_loaded  # not at the top: the version check comes first

    _stock_post_init(self)
    prune_loaded(self)


def enable() -> None:
    """Puts yopo's LlamaModel and LlamaForCausalLM where transformers keeps its own, and has models
    of families/ pruned that are built from a config with a plan.

    Does nothing when that is so already. LLaVA classes built on them are instrumented as they
    come into being; see llava.py.

    Raises ImportError: an unsupported transformers, or LLaVA was imported before the first enable.
    """
    if _stock:
        return
    _compat.require_transformers()
    # After the version check: this module cannot even be imported on a foreign transformers.
    ours = import_module(".modeling_llama_prune", __package__)
    stock = {name: getattr(import_module(f"{_HOME}.modeling_llama"), name) for name in _NAMES}
    _refuse_early_llava(stock["LlamaForCausalLM"], ours.LlamaForCausalLM)
    _stock.update(stock)
    for module in _holders():
        for name in _NAMES:
            setattr(module, name, getattr(ours, name))
    if llava.instrument not in ours.SUBCLASS_HOOKS:  # stays after undo(), see there
        ours.SUBCLASS_HOOKS.append(llava.instrument)
    llava_tokenizer.install()
    PreTrainedModel.post_init = _post_init


def undo() -> None:
    """Leaves transformers as it was before enable(); does nothing when not enabled.

    Models and LLaVA classes made meanwhile stay what they are: a model that was loaded with a plan
    goes on by it, and so must go on learning where its visual tokens are.
    """
    if not _stock:
        return
    for module in _holders():
        for name, stock in _stock.items():
            setattr(module, name, stock)
    llava_tokenizer.uninstall()
    PreTrainedModel.post_init = _stock_post_init
    _stock.clear()


@contextmanager
def patched() -> Iterator[None]:
    """Enabled within the block; afterwards enabled or not as it was before."""
    was_enabled = bool(_stock)
    enable()
    try:
        yield
    finally:
        if not was_enabled:
            undo()


def _holders() -> list[ModuleType]:
    modules = [import_module(f"{_HOME}.modeling_llama"), import_module(_HOME)]
    return modules + _compat.modules_named("transformers")


def _descendants(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _descendants(child)


def _refuse_early_llava(stock: type, ours: type) -> None:
    """Raises ImportError where a LLaVA class was already built on transformers' own class."""
    for cls in _descendants(stock):
        if issubclass(cls, ours) or not llava.is_llava(cls):
            continue
        module = sys.modules.get(cls.__module__)
        if getattr(module, cls.__name__, None) is cls:  # else: built and dropped, or not to be had
            raise ImportError(
                f"{cls.__module__} was imported before yopo.patch, so its {cls.__name__} is built "
                "on transformers' own LlamaForCausalLM and would never be pruned. Put `import "
                "yopo.patch` above the first import of llava, or run the program unchanged with "
                "`python -m yopo run -m MODULE …`, or call yopo.apply(model, plan) on a model "
                "that is loaded already (that needs no patch)."
            )


enable()

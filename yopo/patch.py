"""Prunes models as they are built from a config with a plan: `enable`, `undo`, `patched`. Importing
this module enables."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from yopo import versions
from yopo.models.attach import prune_loaded

_stock_post_init = PreTrainedModel.post_init


@functools.wraps(_stock_post_init)
def _post_init(self: Any) -> None:
    _stock_post_init(self)
    prune_loaded(self)


def enable() -> None:
    versions.require_transformers()
    PreTrainedModel.post_init = _post_init


def undo() -> None:
    PreTrainedModel.post_init = _stock_post_init


@contextmanager
def patched() -> Iterator[None]:
    was = PreTrainedModel.post_init is _post_init
    enable()
    try:
        yield
    finally:
        if not was:
            undo()


enable()

"""Has models pruned as they are built or loaded, by the plan in their config: `enable`, `undo`,
`patched`. Importing this module enables. It holds no model code and no mathematics.

No name in transformers is replaced but AutoTokenizer's loader on 5.x, see llava_tokenizer.py: each
model is asked in `post_init`, and once more at the end of `from_pretrained`, for those that do not
come by it. `from_pretrained(…, fuse=False)`, or YOPO_FUSE=0, keeps the weights of a model with a
plan live (fusing.py); YOPO_PLAN puts a plan on whatever is loaded (asked_plan.py). So it does not
matter whether LLaVA, or what else derives from transformers' classes, was imported before or after,
and a model without a plan stays what it is. How plans go with adapters, once peft is imported, is
in peft_adapters.py, with saved configs in saved_sinks.py.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from yopo.models import llava_tokenizer
from yopo.versions import require_transformers

_NAMES = ("post_init", "from_pretrained")

_stock: dict[str, Any] = {}  # what undo() puts back; empty: not enabled
_ours: dict[str, Any] = {}  # and in whose place


def enable() -> None:
    """Has every model pruned from now on that is built from a config with a plan. Does nothing when
    that is so already.

    Raises ImportError for a transformers that yopo cannot work with.
    """
    if _stock:
        return
    require_transformers()
    # After the version check: these cannot even be imported on a foreign transformers.
    from yopo.models.asked_plan import put_on
    from yopo.models.attach import apply
    from yopo.models.building import fuse_loaded, prune_loaded
    from yopo.models.peft_adapters import accompany_adapters
    from yopo.models.saved_sinks import accompany_configs
    from yopo.plan.sinks import looked_for

    stock = {name: vars(PreTrainedModel)[name] for name in _NAMES}

    @functools.wraps(stock["post_init"])
    def post_init(self: Any) -> None:
        stock["post_init"](self)
        if _stock:
            prune_loaded(self)

    @functools.wraps(stock["from_pretrained"].__func__)
    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        theirs = "fuse" in inspect.signature(cls.__init__).parameters
        fuse = kwargs.pop("fuse", None) if _stock and not theirs else None
        with looked_for(kwargs):
            loaded = stock["from_pretrained"].__get__(None, cls)(*args, **kwargs)
            if _stock:
                model = loaded[0] if isinstance(loaded, tuple) else loaded
                prune_loaded(model)
                put_on(model)
                fuse_loaded(model, fuse)
        return loaded

    _stock.update(stock)
    _ours.update(post_init=post_init, from_pretrained=classmethod(from_pretrained))
    for name, method in _ours.items():
        setattr(PreTrainedModel, name, method)
    llava_tokenizer.install()
    accompany_adapters(apply)
    accompany_configs()


def undo() -> None:
    """Leaves transformers as it was before enable(); does nothing when not enabled. A method that
    somebody else has wrapped since stays theirs, and does nothing of ours.

    Models made meanwhile stay what they are: one that was loaded with a plan goes on by it. LLaVA's
    classes keep their wrapped methods (original_llava.py), and peft's (peft_adapters.py): these
    hand everything through for models without a plan.
    """
    if not _stock:
        return
    # Not at the top: where enable() could not work it cannot be imported.
    from yopo.models.peft_adapters import leave_transformers
    from yopo.models.saved_sinks import leave_configs

    leave_transformers()
    leave_configs()
    for name in _NAMES:
        if vars(PreTrainedModel)[name] is _ours[name]:
            setattr(PreTrainedModel, name, _stock[name])
    llava_tokenizer.uninstall()
    _stock.clear()
    _ours.clear()


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


enable()

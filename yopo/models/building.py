"""What becomes of a model that is being built or loaded from a config with a plan: it is pruned, or
refused by name. Plans for models in hand are attach.py's; who calls this, and when, is patch.py's.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from yopo.models import families
from yopo.models.attach import apply
from yopo.models.decoder import PrunedDecoder
from yopo.models.exchange import derive, put
from yopo.models.fused_weights import lay_all, shares_weights
from yopo.models.fusing import fuse
from yopo.models.layers import exchange_new
from yopo.models.original_llava import instrument
from yopo.models.parts import Parts, part_of, refuse_foreign
from yopo.models.peft_adapters import accompany_adapters
from yopo.plan.pruning_plan import RELEASED_FIELDS, PruningPlan
from yopo.versions import has_rms_norm


def prune_loaded(model: Any) -> None:
    """Prunes a model whose config has a plan: a decoder by itself, or a known model around one.
    Touches no other model. What is pruned by that plan already stays as it is.

    Raises TypeError, which names the class, for a model with a plan that yopo cannot prune, unless
    it is a part of one with the same plan, which will be asked in its turn.
    """
    plan = PruningPlan.from_config(model.config)
    try:
        instrument(type(model))
    except TypeError:
        if plan is not None:
            raise
    if plan is None:
        return
    if isinstance(model, LlamaForCausalLM) or families.name_of(model) is not None:
        parts = Parts.of(model)
        classes = parts.pruned_classes()
    elif families.is_decoder(model):
        parts = Parts(model, model, model)
        classes = (derive(PrunedDecoder, type(model)),)
    elif _is_part_of_a_planned_one(model):
        return
    else:
        raise _unknown(model)
    refuse_foreign(parts)
    accompany_adapters(apply)
    for module, cls in zip(parts.modules, classes, strict=False):
        put(module, cls)
    part, decoder = part_of(parts), parts.decoder
    if decoder.yopo_plan != plan or decoder.yopo_part != part:
        decoder.yopo_part = part
        decoder.set_plan(plan)
    else:
        exchange_new(decoder.layers)


def fuse_loaded(model: Any, wanted: bool | None) -> None:
    """Has a model that was loaded with a plan go by fused weights. They are laid together now, or,
    where the model may still be moved to a GPU, at its first pass there. wanted: None: where it
    can, unless YOPO_FUSE is 0; True: or else as `fuse` raises.

    Raises ValueError for True where the model has no plan."""
    if wanted:
        fuse(model)
    if wanted is not None or os.environ.get("YOPO_FUSE", "1") == "0" or not has_rms_norm():
        return
    for module in model.modules():
        if not isinstance(module, PrunedDecoder) or module.yopo_plan is None:
            continue
        if not shares_weights(module):
            module.yopo_fused = True
            # At a later pass another thread might be reading the memory that is given up.
            device = next(module.parameters()).device
            if device.type != "cpu" or not torch.cuda.is_available():
                lay_all(module)


def _is_part_of_a_planned_one(model: Any) -> bool:
    """Whether the constructor of another model, which has a plan too, is building this one."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount:
            around = frame.f_locals.get(code.co_varnames[0])
            config = getattr(around, "config", None)
            if isinstance(around, PreTrainedModel) and around is not model and config is not None:
                return config is model.config or PruningPlan.from_config(config) is not None
        frame = frame.f_back
    return False


def _unknown(model: Any) -> TypeError:
    name = type(model).__name__
    fields = [field for field in ("yopo", *RELEASED_FIELDS) if hasattr(model.config, field)]
    return TypeError(
        f"the config of this {name} has a plan ({', '.join(fields) or 'in its text_config'}), but "
        f"yopo cannot prune a {name}; it knows {', '.join(families.KNOWN)}. Use one of these, or "
        "take the plan out of the config for a dense model. How to add a family: "
        "docs/adding-a-family.md"
    )

"""Which models of transformers' own yopo prunes, and where in them the parts are. No mathematics,
no layouts; a family's own file is imported when a model of it turns up, never before.

One file a family, here and not as modeling_<family>_prune.py: the text stack of all of them is
modeling_llama_prune.py's, and what is left of a family is where its images are. How to add one:
docs/adding-a-family.md.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

from yopo.versions import require_families

# The modules of transformers whose …ForConditionalGeneration and …Model are known → the file here.
MODULES = {
    "llava": "llava",
    "llava_next": "llava_next",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_vl",
    "internvl": "internvl",
}
KNOWN = (
    "LlamaForCausalLM (and the original LLaVA's models built on it)",
    "LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration",
    "Qwen2VLForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration",
    "InternVLForConditionalGeneration",
)
# Decoder stacks whose layers are what engine.py computes: pre-norm, rotary, gated FFN.
TEXT_STACKS = (
    "LlamaModel",
    "MistralModel",
    "Qwen2Model",
    "Phi3Model",
    "Qwen2VLModel",  # up to 4.51 the name of the text stack alone
    "Qwen2VLTextModel",
    "Qwen2_5_VLModel",
    "Qwen2_5_VLTextModel",
)
_TOWERS = ("vision_tower", "visual")


def name_of(model: Any) -> str | None:
    """The family of a model, an …ForConditionalGeneration or the …Model inside it; None if it has
    none. Imports nothing."""
    for cls in type(model).__mro__:
        package, _, name = cls.__module__.rpartition(".modeling_")
        if package == f"transformers.models.{name}" and name in MODULES:
            return name if composite_of(model) is not None else None  # else a tower, a text stack
    return None


def family_of(model: Any) -> type:
    """The class of families/ that goes with a model that has a name_of().

    Raises ImportError on a transformers older than the families are supported on.
    """
    require_families(type(model).__name__)
    return import_module(f".{MODULES[name_of(model)]}", __name__).Family


def composite_of(model: nn.Module) -> nn.Module | None:
    """The module whose forward puts image features between token embeddings: the one that holds the
    vision tower (up to 4.51 the …ForConditionalGeneration, then the …Model in it)."""
    for module in (model, getattr(model, "model", None)):
        if isinstance(module, nn.Module) and any(name in module._modules for name in _TOWERS):
            return module
    return None


def text_stack_of(composite: nn.Module) -> nn.Module:
    """The decoder stack inside a composite.

    Raises TypeError, naming it, for one that the engine does not compute.
    """
    children = composite._modules
    found = children["language_model"] if "language_model" in children else children["model"]
    stack = found._modules.get("model", found)  # up to 4.51 a causal LM is around it
    names = {cls.__name__ for cls in type(stack).__mro__}
    if not names.intersection(TEXT_STACKS):
        raise TypeError(
            f"the text model of this {type(composite).__name__} is a {type(stack).__name__}; yopo "
            f"computes {', '.join(TEXT_STACKS)}: see docs/adding-a-family.md"
        )
    return stack


def is_decoder(model: Any) -> bool:
    """Whether a model is a decoder of TEXT_STACKS by itself."""
    names = {cls.__name__ for cls in type(model).__mro__}
    return bool(names.intersection(TEXT_STACKS)) and isinstance(
        model._modules.get("layers"), nn.ModuleList
    )


def unknown(model: Any) -> TypeError:
    return TypeError(
        f"yopo cannot prune a {type(model).__name__}; it knows {', '.join(KNOWN)}. How to add a "
        "family: docs/adding-a-family.md"
    )

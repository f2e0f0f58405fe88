"""What of a model a plan concerns: its outermost transformers model, its decoder, and the module
that tells the decoder where the visual tokens are. Finds and checks; changes nothing."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from yopo.engine.model_part import WHOLE, ModelPart
from yopo.models import families
from yopo.models.causal_lm import PrunedCausalLM
from yopo.models.decoder import PrunedDecoder
from yopo.models.exchange import derive
from yopo.models.generating import Generating
from yopo.models.layers import layer_in
from yopo.plan.config_fields import head_sizes
from yopo.plan.pruning_plan import PruningPlan


@dataclass(frozen=True)
class Parts:
    """outer: the outermost transformers model, whose config holds the plan. decoder: the module
    with `layers`. teller: the module that tells it where the visual tokens are."""

    outer: Any
    decoder: Any
    teller: Any

    @property
    def modules(self) -> tuple[Any, ...]:
        """Those that get a class of ours."""
        if self.outer is self.teller or not hasattr(self.outer, "generate"):
            return self.decoder, self.teller
        return self.decoder, self.teller, self.outer

    @classmethod
    def of(cls, model: Any) -> Parts:
        """Raises TypeError if the model is of no family that yopo knows."""
        modules = model.modules() if isinstance(model, nn.Module) else ()
        # The outermost one: a Llama inside another family's model is that family's.
        outer = next((module for module in modules if isinstance(module, PreTrainedModel)), model)
        if isinstance(outer, LlamaForCausalLM):
            return cls(outer, outer.model, outer)
        if families.name_of(outer) is None:
            raise families.unknown(outer)
        composite = families.composite_of(outer)
        return cls(outer, families.text_stack_of(composite), composite)

    def pruned_classes(self) -> tuple[type, ...]:
        """The classes that `modules` get."""
        llama = isinstance(self.teller, LlamaForCausalLM)
        telling = PrunedCausalLM if llama else families.family_of(self.teller)
        mixins = (PrunedDecoder, telling, Generating)
        pairs = zip(mixins, self.modules, strict=False)
        return tuple(derive(mixin, type(module)) for mixin, module in pairs)


def plan_of(model: nn.Module) -> PruningPlan | None:
    """The plan that `model` runs under, or None."""
    for module in model.modules():
        if isinstance(module, PrunedDecoder):
            return module.yopo_plan
    return None


def part_of(parts: Parts) -> ModelPart:
    """What of every layer this process computes, where transformers shares them (`tp_plan`).

    Raises TypeError for heads that cannot be shared equally."""
    outer = parts.outer
    mesh, count = getattr(outer, "_device_mesh", None), _processes(outer).get("tp", 0)
    if count < 2 or mesh is None:
        return WHOLE
    names = mesh.mesh_dim_names
    heads, kv_heads, _ = head_sizes(parts.decoder.config)
    if heads % count or kv_heads % count:
        raise TypeError(
            f"{heads} heads and {kv_heads} key/value heads cannot be shared equally by the {count} "
            "processes of tensor parallelism (tp_plan): take as many as divide both"
        )
    return ModelPart(mesh.get_local_rank("tp" if names else None), count)


def _processes(outer: Any) -> dict[str, int]:
    """Over how many transformers splits the model, by the short name of the way."""
    mesh = getattr(outer, "_device_mesh", None)
    sizes = {"tp": getattr(outer, "tp_size", 0) or 0}
    if mesh is not None:
        names = mesh.mesh_dim_names or ("tp",)  # up to 4.57 there may be one without a name
        sizes |= dict(zip(names, mesh.shape, strict=False))
    return sizes


def _split_otherwise(outer: Any) -> str | None:
    """By what transformers has each process compute a part that a pass does not know; None: by
    nothing."""
    words = {"pp": "pipeline parallelism", "ep": "expert parallelism"}
    sizes = _processes(outer)
    return next((words[name] for name in words if sizes.get(name, 0) > 1), None)


def refuse_foreign(parts: Parts) -> None:
    """Raises TypeError where the layers lack what the engine calls or are in parts on several
    processes, ImportError where the unpruned calls would need a flash-attn that is not there."""
    outer, decoder = parts.outer, parts.decoder
    if split := _split_otherwise(outer):
        raise TypeError(
            f"this {type(outer).__name__} is split over processes by {split} (DistributedConfig), "
            "each of which has some layers or parts of them only: a pruned pass does not know "
            "which. Load it whole, by tensor parallelism (tp_plan='auto'), or with its weights "
            "sharded by FSDP"
        )
    layer = layer_in(decoder.layers[0])
    wanted = {
        "self_attn": ({"q_proj", "k_proj", "v_proj", "o_proj"}, {"qkv_proj", "o_proj"}),
        "mlp": ({"gate_proj", "up_proj", "down_proj"}, {"gate_up_proj", "down_proj"}),
    }
    quantised = getattr(getattr(outer, "config", None), "quantization_config", None)
    why = f" (quantised: {quantised})" if quantised is not None else ""
    for name, choices in wanted.items():
        module = getattr(layer, name)
        inside = [set(one._modules) for one in module.modules()]  # peft keeps whole parts in copies
        has = next((has for has in inside if any(choice <= has for choice in choices)), None)
        if has is None:
            raise TypeError(
                f"the layers of this {type(decoder).__name__} have as {name} a "
                f"{type(module).__name__} without {' or '.join(map(str, map(sorted, choices)))}"
                f"{why}: fused or replaced layers cannot be pruned; load it without"
            )
        if extra := sorted(has & {"q_norm", "k_norm"}):
            raise TypeError(
                f"the {type(module).__name__} of this {type(decoder).__name__} has {extra}: norms "
                "of queries and keys are not computed by a pruned pass"
            )
    chosen = getattr(decoder.config, "_attn_implementation", None)
    if chosen == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise ImportError(
            "the model asks for attn_implementation='flash_attention_2', but flash-attn is not "
            "installed: load it with attn_implementation='sdpa' (a pruned pass uses SDPA anyway)"
        )

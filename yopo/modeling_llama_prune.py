"""LlamaModel and LlamaForCausalLM that skip what a plan prunes: subclasses of the installed ones.

Only what differs from stock: without a plan, or with one and no image, stock's own forward runs.
Knows nothing of LLaVA, files or patching; the mathematics is in engine.py and attention.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama import modeling_llama as stock

from yopo.engine import forward as engine
from yopo.engine.layout import CALL, Grid, during, told
from yopo.engine.visual_cache import VisualCache, refuse_foreign
from yopo.models.arguments import (
    may_show_image,
    other_shape,
    past_length,
    positions,
    refuse_long_for_window,
    refuse_outputs_and_packing,
    refuse_split_image,
    resolve_layout,
    valid_tokens,
    warn_of_foreign_embeddings,
)
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import exchange_class, rope

# The released classes: patch.py puts ours in their place in the module.
StockLlamaModel, StockLlamaForCausalLM = stock.LlamaModel, stock.LlamaForCausalLM

SUBCLASS_HOOKS: list[Callable[[type], None]] = []  # told of each class derived from ours


class PrunedModelMixin:
    """A decoder stack whose forward follows `yopo_plan`, put before the stock class."""

    yopo_plan: PruningPlan | None = None
    yopo_ffn_order: str | None = None  # which the FFN neurons are in, as the plan names it
    _yopo_stack: engine.Stack | None = None
    _yopo_warned = False

    def set_plan(self, plan: PruningPlan | None) -> None:
        """Prunes by `plan` from now on; None: as stock. Raises ValueError if it does not fit."""
        if plan is not None:
            plan.validate(self.config)
            if plan.ffn_order is not None:
                self.yopo_ffn_order = plan.ffn_order
        # Not as inference tensors, should apply() be called in inference mode: training may follow.
        with torch.inference_mode(False):
            self._yopo_stack = None if plan is None else engine.Stack.build(self.config, plan)
        self.yopo_plan = plan

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        visual_mask: Tensor | None = None,
        visual_grids: Sequence[Sequence[Grid]] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """As stock's. The visual tokens are those of visual_mask (B, n), else of the call in
        progress (layout.py).

        Raises ValueError where a pruned pass cannot be right: output_attentions, an image split by
        a chunk under a bidirectional window, a mask other than padding, a cache of another kind.
        """
        flags = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "return_dict": return_dict,
        }
        given = {name: value for name, value in flags.items() if value is not None}

        def as_stock() -> Any:
            return super(PrunedModelMixin, self).forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                **given,
                **kwargs,
            )

        if self.yopo_plan is None:
            return as_stock()
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None or (input_ids is not None and inputs_embeds is not None):
            return as_stock()  # which knows what to say of it
        batch, n = tokens.shape[:2]
        past = past_length(past_key_values)
        embedded = input_ids is None
        known = CALL.get()
        if visual_mask is not None or visual_grids is not None:
            known = told(visual_mask, visual_grids)
        if known is None and embedded and past == 0 and n > 1 and not self._yopo_warned:
            self._yopo_warned = warn_of_foreign_embeddings(n, self.config)
        if not may_show_image(known, past_key_values, past, batch, n, embedded, self.config):
            return as_stock()
        refuse_foreign(past_key_values)
        if isinstance(past_key_values, VisualCache):
            past_key_values.check(self.yopo_plan, batch)
        if isinstance(attention_mask, dict):
            raise ValueError(
                "attention_mask is a dict of masks made for a static or sliding cache, which a "
                "pruned pass over an image cannot fill: generate without cache_implementation"
            )
        valid = valid_tokens(attention_mask, past_key_values, batch, past, n)
        layout = resolve_layout(known, past_key_values, past, valid[:, past:], self.config)
        if not layout.visual.any() and not isinstance(past_key_values, VisualCache):
            return as_stock()

        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        refuse_outputs_and_packing(output_attentions, output_hidden_states, kwargs)
        refuse_split_image(self.yopo_plan, layout, past_key_values)
        refuse_long_for_window(self.config, past + n)
        if self.training and getattr(self.config, "resid_pdrop", 0):
            raise ValueError(
                f"resid_pdrop is {self.config.resid_pdrop}: a pruned pass has no dropout on the "
                "residual stream. Train with resid_pdrop=0, or without the plan"
            )
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache is None:
            use_cache = self.config.use_cache
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if checkpointing and past_key_values is not None:
            raise ValueError(
                "past_key_values is given, but with gradient checkpointing layers run twice and "
                "nothing can be cached: pass past_key_values=None"
            )
        masked = attention_mask is not None
        position_ids = positions(position_ids, batch, past, n, inputs_embeds.device, masked)
        cos, sin = rope(self, inputs_embeds, position_ids, past + n)
        heads = self._yopo_stack.kv_heads()
        cache = VisualCache.adopt(past_key_values, self.yopo_plan, batch, valid[:, :past], heads)
        hidden_states: list[Tensor] | None = [] if output_hidden_states else None
        keep_cache = (use_cache and not checkpointing) or past_key_values is not None
        out = engine.run(
            self.layers,
            self._yopo_stack,
            self.yopo_plan,
            layout,
            inputs_embeds,
            cos,
            sin,
            valid,
            cache,
            keep_cache,
            self.training,
            self._gradient_checkpointing_func if checkpointing else None,
            hidden_states,
        )
        out = self.norm(out)
        output = BaseModelOutputWithPast(
            last_hidden_state=out,
            past_key_values=cache if keep_cache else None,
            hidden_states=None if hidden_states is None else (*hidden_states, out),
        )
        return output.to_tuple() if return_dict is False else output


class PrunedCausalLMMixin:
    """A causal LM whose forward takes where the visual tokens are, put before the stock class."""

    def forward(
        self,
        *args: Any,
        visual_mask: Tensor | None = None,
        visual_grids: Sequence[Sequence[Grid]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As stock's, and:

        visual_mask: (B, n) bool, True at the visual tokens of this call's rows.
        visual_grids: for each batch row the (rows, cols) of its images in order; None: each run of
            visual tokens is one square grid.

        Raises ValueError if they do not fit the tokens or each other.
        """
        if visual_mask is None and visual_grids is None:
            return super().forward(*args, **kwargs)
        with during(told(visual_mask, visual_grids)):
            return super().forward(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        mask, tokens = kwargs.get("visual_mask"), kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        if mask is not None and tokens is not None and mask.shape != tokens.shape[:2]:
            raise ValueError(other_shape(mask, *tokens.shape[:2]))
        return super().generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        visual = {name: kwargs.pop(name, None) for name in ("visual_mask", "visual_grids")}
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        mask = visual["visual_mask"]
        if mask is not None and past_length(inputs.get("past_key_values")) == 0:
            # Without a cache all tokens come again at each step, the generated ones with them.
            tokens = inputs.get("inputs_embeds")
            tokens = inputs["input_ids"] if tokens is None else tokens
            visual["visual_mask"] = F.pad(mask, (0, max(0, tokens.shape[1] - mask.shape[1])))
        grids = visual["visual_grids"]
        if mask is not None and grids and mask.shape[0] % len(grids) == 0:
            # generate() repeats tensors for beams; lists it leaves as they are.
            repeats = mask.shape[0] // len(grids)
            visual["visual_grids"] = [row for row in grids for _ in range(repeats)]
        return {**inputs, **{name: value for name, value in visual.items() if value is not None}}


class LlamaModel(PrunedModelMixin, StockLlamaModel):
    def __init__(self, config: Any) -> None:
        plan = PruningPlan.from_config(config)  # first: a plan that cannot be costs no loading
        super().__init__(config)
        self.set_plan(plan)


class _Llama(StockLlamaForCausalLM):
    """`super(LlamaForCausalLM, self).__init__(config)`, as LLaVA calls it to skip the language
    model's own constructor, must skip stock's too, or it would build a second LlamaModel and shift
    the random state."""

    def __init__(self, config: Any) -> None:
        super(StockLlamaForCausalLM, self).__init__(config)


class LlamaForCausalLM(PrunedCausalLMMixin, _Llama):
    def __init__(self, config: Any) -> None:
        StockLlamaForCausalLM.__init__(self, config)
        if not isinstance(self.model, PrunedModelMixin):  # unless patched, stock builds stock's
            exchange_class(self.model, LlamaModel)
            self.model.set_plan(PruningPlan.from_config(config))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for hook in SUBCLASS_HOOKS:
            hook(cls)


def _tell_signature(name: str, extra: list[inspect.Parameter]) -> None:
    """Gives the mixin's method stock's signature and our arguments: generate() looks names up in
    it."""
    stock_parameters = list(
        inspect.signature(getattr(StockLlamaForCausalLM, name)).parameters.values()
    )
    end = len(stock_parameters)
    end -= stock_parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    signature = inspect.Signature(stock_parameters[:end] + extra + stock_parameters[end:])
    getattr(PrunedCausalLMMixin, name).__signature__ = signature


_ours = inspect.signature(PrunedCausalLMMixin.forward).parameters
for _name in ("forward", "prepare_inputs_for_generation"):
    _tell_signature(_name, [_ours["visual_mask"], _ours["visual_grids"]])

"""A causal LM whose forward and generate take where the visual tokens are: a mixin before the stock
class. It tells the decoder, which prunes (decoder.py)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from yopo.engine.layout import Grid
from yopo.models.ahead import forget_ready, make_ready_ahead
from yopo.models.arguments import cache_of, past_length
from yopo.models.decoder import prune_decoder_of
from yopo.models.exchange import named, original_of, stock_method, with_signature
from yopo.models.generating import Generating
from yopo.models.original_llava import keep_instrumented
from yopo.models.shown import other_shape
from yopo.models.told import during, told
from yopo.versions import TRACING, skipped, uncompiled


class PrunedCausalLM(Generating):
    """A causal LM around a PrunedDecoder."""

    @skipped
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
        if TRACING() is not None:
            stock, args, kwargs = _to_be_traced(self, args, kwargs, visual_mask, visual_grids)
            try:
                return stock(*args, **kwargs)
            finally:
                forget_ready(kwargs)
        stock = stock_method(self, PrunedCausalLM)
        if isinstance(self, PrunedCausalLM):
            keep_instrumented(self)
            prune_decoder_of(self)
        if visual_mask is None and visual_grids is None:
            return stock(*args, **kwargs)
        with during(told(visual_mask, visual_grids)):
            return stock(*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        stock = stock_method(self, PrunedCausalLM, "generate")
        if not isinstance(self, PrunedCausalLM):
            return stock(*args, **kwargs)
        keep_instrumented(self)
        prune_decoder_of(self)
        mask, tokens = kwargs.get("visual_mask"), kwargs.get("inputs_embeds")
        if tokens is None:
            tokens = args[0] if args else kwargs.get("inputs", kwargs.get("input_ids"))
        whole = kwargs.get("images") is None  # LLaVA has yet to put features between these tokens
        if whole and mask is not None and tokens is not None and mask.shape != tokens.shape[:2]:
            raise ValueError(other_shape(mask, *tokens.shape[:2]))
        assistant = kwargs.get("assistant_model")
        if not (mask is None or assistant is None or isinstance(assistant, PrunedCausalLM)):
            raise ValueError(
                "assistant_model is given with visual_mask, which a "
                f"{type(assistant).__name__} without a plan does not take: apply one to it, too, "
                "or generate with prompt_lookup_num_tokens"
            )
        return stock(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        visual = {name: kwargs.pop(name, None) for name in ("visual_mask", "visual_grids")}
        stock = stock_method(self, PrunedCausalLM, "prepare_inputs_for_generation")
        inputs = stock(*args, **kwargs)
        mask = visual["visual_mask"]
        if mask is not None and past_length(cache_of(inputs)) == 0:
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

    @classmethod
    def _yopo_attributes(cls, stock: type) -> dict[str, Any]:
        """The methods that tell stock's signature and our arguments: generate() looks names up."""
        told = [
            parameter
            for name, parameter in inspect.signature(cls.forward).parameters.items()
            if name in ("visual_mask", "visual_grids")
        ]
        names = ("forward", "prepare_inputs_for_generation")
        return {n: with_signature(vars(cls)[n], getattr(stock, n), told) for n in names}


@uncompiled
def _to_be_traced(
    model: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    visual_mask: Tensor | None,
    visual_grids: Sequence[Sequence[Grid]] | None,
) -> tuple[Callable[..., Any], Sequence[Any], Mapping[str, Any]]:
    """What torch.compile is to trace of a forward, and with which arguments."""
    stock = stock_method(model, PrunedCausalLM)
    is_told = visual_mask is not None or visual_grids is not None
    if isinstance(model, PrunedCausalLM):
        keep_instrumented(model)
        prune_decoder_of(model)
        if original_of(type(model)).forward.__module__.startswith("transformers."):
            given = named(model, args, kwargs)
            ready = make_ready_ahead(model.model, given, visual_mask, visual_grids)
            if ready is not None:
                return stock, (), ready
    if not is_told:
        return stock, args, kwargs

    def untraced(*args: Any, **kwargs: Any) -> Any:
        with during(told(visual_mask, visual_grids)):
            return stock(*args, **kwargs)

    return uncompiled(untraced), args, kwargs

"""A decoder (LlamaModel and its like) whose forward follows a plan: a mixin before the stock class.
Without a plan, or with one and no image, stock's own forward runs.

The way of a call: arguments.resolve → ready.make_ready → ready.compute. Knows nothing of LLaVA,
composites or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from yopo.engine.layer_plan import LayerPlans
from yopo.engine.layout import Grid
from yopo.engine.model_part import WHOLE, ModelPart
from yopo.engine.visual_cache import VisualCache
from yopo.models.arguments import cache_of, inputs_of, resolve
from yopo.models.exchange import Exchanged, derive, named, put, stock_method
from yopo.models.functions import Functions
from yopo.models.fused_weights import forget, forget_moved, fused_layers, unfuse_decoder
from yopo.models.known_layouts import unwatch_text, watch_text
from yopo.models.layers import exchange_layers, exchange_new, restore_layers
from yopo.models.probe import probe
from yopo.models.ready import (
    Ready,
    answer,
    can_be_traced,
    compute,
    for_tracing,
    make_ready,
    taken,
)
from yopo.models.told import CALL
from yopo.models.zero_leaves import ZeroLeaves
from yopo.plan.pruning_plan import PruningPlan
from yopo.versions import is_compiling, tells_tracing, uncompiled

# Of a decoder whose sinks are being trained (trained_sinks.py): a and b.
SINK_PARAMETERS = ("yopo_sink_a", "yopo_sink_b")


class PrunedDecoder(ZeroLeaves, Exchanged):
    """A decoder whose forward follows `yopo_plan`."""

    yopo_plan: PruningPlan | None = None
    yopo_ffn_order: str | None = None  # which the FFN neurons are in, as the plan names it
    yopo_fused: bool = False  # passes are to go by fused weights
    yopo_part: ModelPart = WHOLE  # of its layers, where several processes share them
    yopo_layout: str | None = None  # "released": what apply() was told of unknown embeddings
    _yopo_layer_plans: LayerPlans | None = None
    _yopo_graphs: Any = None  # see graphs.py
    _yopo_known: Functions | None = None  # what the layers went by when they were probed
    _yopo_uncalled: tuple[str, ...] = ()  # what warn_of_uncalled has named

    def set_plan(self, plan: PruningPlan | None) -> None:
        """Prunes by `plan` from now on; None: as stock. Raises ValueError if it does not fit."""
        if plan is None:
            unfuse_decoder(self)
            restore_layers(self.layers)
            self._yopo_layer_plans = self.yopo_plan = None
            _UNDER_PLAN.discard(self)
            if all(other.embed_tokens is not self.embed_tokens for other in list(_UNDER_PLAN)):
                unwatch_text(self.embed_tokens)
            return
        plan.validate(self.config)
        if plan.ffn_order is not None:
            self.yopo_ffn_order = plan.ffn_order
        # Not as inference tensors, should apply() be called in inference mode: training may follow.
        with torch.inference_mode(False):
            self._yopo_layer_plans = LayerPlans.build(self.config, plan, self.yopo_part)
        exchange_layers(self.layers)
        watch_text(self.embed_tokens)
        self.yopo_plan = plan
        _UNDER_PLAN.add(self)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        if self.yopo_fused:
            forget(self)  # what is moved would be held here as well
        return super()._apply(*args, **kwargs)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        result = super().train(*args, **kwargs)
        if self.training and self.yopo_fused:
            forget_moved(self)
        return result

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "embed_tokens" and self.yopo_plan is not None:  # resized, or an adapter on it
            watch_text(value)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Stock's. Sinks that are being trained belong to the plan and are saved with it."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in SINK_PARAMETERS:
            destination.pop(prefix + name, None)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, metadata: Any, strict: bool, missing: Any, *more: Any
    ) -> None:
        lacking: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, lacking, *more)
        missing += [name for name in lacking if name.removeprefix(prefix) not in SINK_PARAMETERS]

    def forward(
        self,
        *args: Any,
        visual_mask: Tensor | None = None,
        visual_grids: Sequence[Sequence[Grid]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """As stock's. The visual tokens are those of visual_mask (B, n), else what is known of the
        embeddings.

        Raises ValueError where a pruned pass cannot be right: embeddings of which nothing is known,
        output_attentions, an image split by a chunk under a bidirectional window, a mask other than
        padding, a cache of another kind, arguments that the pass does not know.
        """
        begun = None
        if isinstance(self, PrunedDecoder) and self.yopo_plan is not None:
            if (ready := taken(kwargs)) is not None:
                ready = replace(ready, return_dict=kwargs.get("return_dict") is not False)
                return compute(self, ready, *inputs_of(self, kwargs, ready.past))
            if not (is_compiling() and _is_text(args, kwargs, visual_mask)):
                begun = self._begin(args, kwargs, visual_mask, visual_grids, is_compiling())
        if begun is None:
            return stock_method(self, PrunedDecoder)(*args, **kwargs)
        ready, embeds, places = begun
        return embeds if ready is None else compute(self, ready, embeds, places)

    @uncompiled
    def _begin(
        self,
        args: Any,
        kwargs: Any,
        visual_mask: Tensor | None,
        visual_grids: Sequence[Sequence[Grid]] | None,
        traced: bool,
    ) -> tuple[Ready, Tensor, Tensor] | tuple[None, Any, None] | None:
        """A pass over a call with an image in it, or in its cache, ready for its embeddings and
        their positions; or its outcome, where torch.compile is not to trace it. None: stock's own
        forward is to run."""
        if (told := CALL.get()) is not None:
            told.taken = True
        called = resolve(self, named(self, args, kwargs), visual_mask, visual_grids)
        if called is None:
            return None
        self.look_again()
        graphs, embeds = self._yopo_graphs, called.inputs_embeds
        with nullcontext() if graphs is None else graphs.lock:
            fused = fused_layers(self, embeds) if self.yopo_fused else None
            if graphs is not None:
                out = graphs.run(self, called, fused)
                if out is not None:
                    return None, answer(called, self.norm(out), None), None
            ready = make_ready(self, called, fused, embeds.device)
            if graphs is not None or (traced and not can_be_traced(self, called)):
                return None, compute(self, ready, embeds, called.position_ids), None
        if traced:
            ready = for_tracing(self, ready, embeds.dtype)
        return ready, embeds, called.position_ids

    def look_again(self) -> None:
        """Sees to layers that were put in, and what they go by that was replaced, since the last
        pass."""
        is_new, known = exchange_new(self.layers), self._yopo_known
        if is_new or known is None or known.changed(self):
            probe(self, PrunedDecoder)


def _is_text(args: Any, kwargs: Any, visual_mask: Tensor | None) -> bool:
    """Whether a call that is traced is plainly one without an image: whoever is around the decoder
    and knows of one has made the pass ready."""
    if args or visual_mask is not None or kwargs.get("input_ids") is None:
        return False
    return tells_tracing() and not isinstance(cache_of(kwargs), VisualCache)


_UNDER_PLAN: WeakSet[PrunedDecoder] = WeakSet()


def shares_config(decoder: Any) -> bool:
    """Whether the config of a decoder is that of another one, which is under a plan."""
    others = (other for other in list(_UNDER_PLAN) if other is not decoder)
    return any(other.config is decoder.config for other in others)


def prune_decoder_of(model: Any) -> None:
    """Puts the plan in the config of `model`, a causal LM under it, on a decoder that the model was
    given since. Raises ValueError where there is none."""
    decoder = model.model
    if isinstance(decoder, PrunedDecoder) and decoder.yopo_plan is not None:
        return
    inside = (module for module in decoder.modules() if isinstance(module, PrunedDecoder))
    if any(module.yopo_plan is not None for module in inside):
        return  # in a wrapper
    plan = PruningPlan.from_config(model.config)
    if plan is None:
        raise ValueError(
            f"the decoder of this {type(model).__name__} was replaced since a plan was put on, and "
            "its config has none: put it on once more (yopo.apply), or take it off (yopo.remove)"
        )
    put(decoder, derive(PrunedDecoder, type(decoder)))
    decoder.set_plan(plan)

"""graphed: passes whose shapes and memory do not change, captured as CUDA graphs.

At batch 1 a pass is bound by the host, which launches hundreds of kernels one by one; a graph
launches them at once. What is captured is the engine's own (forward.py): decode steps in
decode_graph.py, prefills in prefill_graph.py. On other devices the same passes run uncaptured, so
that they can be tried there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from yopo.engine.forward import OBSERVER, Run
from yopo.engine.fused import FusedLayer
from yopo.engine.layer_plan import LayerPlans
from yopo.engine.packing import Packing
from yopo.models.decode_graph import Step, fits, has_fixed_angles, is_step, slots_of
from yopo.models.fusing import fuse
from yopo.models.layers import call_layer, is_called_by_us_alone
from yopo.models.parts import Parts
from yopo.models.prefill_graph import Places, Prefill, is_prefill

Model = TypeVar("Model", bound=nn.Module)

KEPT = 8  # graphs, of one model; each holds the memory of a pass


def graphed(model: Model) -> Model:
    """Has `model`, which has a plan, run prefills and decode steps as CUDA graphs where it can, and
    returns it. Its weights are fused (`yopo.fuse`); `yopo.unfuse` and `yopo.remove` end it.

    A prefill is captured once for each batch size, image layout and number of text tokens rounded
    up to 32, a decode step for each batch size and length of the cache rounded up to 256: that
    takes as long as a few such passes, and is replayed then. The last 8 are kept. Captured is what
    has no padding, and as many tokens of each kind in each row of the batch; steps besides only
    where the blind heads of the plan share no keys with seeing ones, and see by `drop` or `sink`.
    All else runs as before.

    Raises ValueError where the model cannot be fused.
    """
    fuse(model)
    Parts.of(model).decoder._yopo_graphs = Graphs()
    return model


class Graphs:
    """The captured passes of one decoder. A copy of a model, or one from a pickle, has none."""

    def __init__(self) -> None:
        self._captured: dict[Any, Any] = {}
        self._places = Places()
        # Over every pass: those that are not captured read the same memory.
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def run(
        self, decoder: Any, called: Any, weights: Sequence[FusedLayer | None] | None
    ) -> Tensor | None:
        """The output (B, n, d), not normed, of a pass; None where it is not one that is captured.

        `called`: what the decoder was called with, resolved."""
        if weights is None or called.layout.shape[0] == 0:
            return None
        if None in weights:  # quantised since, say: the memory of what they were is to go
            self.clear()
            return None
        if OBSERVER.get() is not None or not has_fixed_angles(decoder):
            return None
        if decoder.training or not all(map(is_called_by_us_alone, map(vars, decoder.layers))):
            return None
        how = Run(call_layer, keep_cache=True, fused=weights)
        if is_prefill(called):
            return self._prefill(decoder, called, how)
        if is_step(called) and fits(decoder._yopo_layer_plans):
            return self._step(decoder, called, how)
        return None

    def clear(self) -> None:
        """Lets go of all that was captured."""
        self._captured, self._places = {}, Places()

    def _prefill(self, decoder: Any, called: Any, how: Run) -> Tensor:
        plans, embeds = decoder._yopo_layer_plans, called.inputs_embeds
        placed = self._places.of(called, decoder.yopo_plan)
        rotary = id(decoder.rotary_emb)  # kept alive by the prefill
        key = placed.shape, embeds.shape[2], embeds.dtype, rotary
        captured = self._known(plans, how, key, lambda: Prefill(decoder, plans, how, placed))
        return captured(called, placed)

    def _step(self, decoder: Any, called: Any, how: Run) -> Tensor | None:
        plans, cache, embeds = decoder._yopo_layer_plans, called.cache, called.inputs_embeds
        slots = slots_of(cache)
        if slots is None:
            return None
        rotary = id(decoder.rotary_emb)  # kept alive by the step
        key = embeds.shape, embeds.dtype, called.position_ids.shape, slots, rotary
        captured = self._known(plans, how, key, lambda: Step(decoder, plans, how, called, slots))
        batch = embeds.shape[0]
        text, visual = Packing.all_of(batch, 1, cache.length), Packing.all_of(batch, 0, 0)
        cache.extend(called.layout, called.valid, text, visual)
        out = captured(cache, embeds, called.position_ids)
        cache.filling = False
        return out

    def _known(self, plans: LayerPlans, how: Run, key: Any, make: Callable[[], Any]) -> Any:
        """What was captured under `key` with these plans and weights; made now if nothing was."""
        of = id(plans), id(how.fused)  # both are kept alive by what was captured with them
        kept = {k: v for k, v in self._captured.items() if k[0] == of}
        found = kept.pop((of, key), None) or make()
        self._captured = {**dict(list(kept.items())[-(KEPT - 1) :]), (of, key): found}
        return found

"""The layer loop never asks the device for a value: run where there is none to be had.

Tensors on the meta device have shapes but no content, so whatever would make a host wait for a GPU
(a bool, an item, a mask turned into indices, a copy to the CPU) raises there.
"""

from __future__ import annotations

import pytest
import torch
from layouts import Shape, build, make_case, random_sinks

from yopo.engine import forward as engine
from yopo.engine import weights
from yopo.engine.layout import VisualLayout
from yopo.engine.visual_cache import VisualCache
from yopo.models.layers import call_layer
from yopo.plan.pruning_plan import MASSES, PruningPlan


@pytest.mark.parametrize("mass", MASSES)
@pytest.mark.parametrize("window", [None, 5])
def test_prefill_and_decode_run_without_content(
    mass: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(layers=3)
    keep = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1], [1, 1, 0, 1]])
    sinks = random_sinks(shape, 0, True)
    plan = PruningPlan(
        keep, window, layer_cut=2, ffn_ratio=2, head_mass=mass, cut_mass=mass, sinks=sinks
    )
    rows = [
        [("text", 2), ("image", 6, 6, False), ("text", 3), ("image", 3, 2, False), ("text", 1)],
        [("text", 9)],
    ]
    case = make_case(rows, shape.heads * 8)
    model = build(shape, plan).model
    plans = model._yopo_layer_plans
    meta = torch.device("meta")
    model.to(meta)
    # As on a real device: weights are there to be sliced, and layers compute where they lie.
    monkeypatch.setattr(engine, "execution_device", lambda layer, default: meta)
    monkeypatch.setattr(weights, "is_plain", lambda module: True)

    batch, n = case.visual.shape
    here = VisualLayout.from_mask(case.visual, case.all_grids)
    valid = case.attention_mask.bool()
    cache = VisualCache.adopt(None, plan, batch, valid[:, :0], plans.stored)
    for columns, layout in ((n, here), (1, VisualLayout.empty(batch, 1).after(here))):
        embeds = torch.empty(batch, columns, model.config.hidden_size, device=meta)
        angles = torch.empty(batch, columns, plans.head_dim, device=meta)
        with torch.no_grad():
            index = engine.prepare(layout, valid, cache, plan)
            how = engine.Run(call_layer, keep_cache=True)
            out = engine.run(model.layers, plans, index, embeds, angles, angles, cache, how)
        assert out.shape == embeds.shape and out.is_meta
        valid = torch.cat([valid, torch.ones(batch, 1, dtype=torch.bool)], dim=1)


def test_the_meta_device_does_refuse_a_synchronisation() -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(torch.empty(1, device="meta").any())

"""Plans and configs of one small size, for the tests of plan/."""

from __future__ import annotations

from transformers import LlamaConfig

from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

LAYERS, HEADS, NEURONS = 4, 10, 48
KEEP = [[(layer + head) % 3 == 0 for head in range(HEADS)] for layer in range(LAYERS)]
SHARES = [[(layer + head) / 16 for head in range(HEADS)] for layer in range(LAYERS)]
RELEASED = {
    "attncut_w": 5,
    "layercut_num": 2,
    "headcut_num": 3,
    "mlpcut_ratio": 2,
    "sprompt_len": 35,
}
DECIDED = {
    "window": 4,
    "layer_cut": 2,
    "ffn_ratio": 2.5,
    "head_mass": "sink",
    "cut_mass": "drop",
    "window_causal": True,
    "prune_visual_queries": False,
    "sinks": Sinks(SHARES),
    "ffn_order": "sha256:" + "0" * 64,
}


def plan(**values: object) -> PruningPlan:
    return PruningPlan(**{"head_keep": KEEP, **values})


def config(cls: type = LlamaConfig, **values: object) -> LlamaConfig:
    return cls(
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        hidden_size=HEADS * 4,
        intermediate_size=NEURONS,
        **values,
    )


def with_block(**changes: object) -> LlamaConfig:
    """A config whose block differs from a good one in the keys given."""
    made = config()
    plan(window=5).save_to(made)
    made.yopo = {**made.yopo, **changes}
    return made

"""What torch.compile makes of a model with a plan, against stock's: graphs, graph breaks, seconds.

    python benchmarks/compile.py [--backend inductor] [--live] [--mass drop sink exact]

Two models with random weights: a Llama given three prompts of unlike lengths with an image in each,
and decode steps after each; and transformers' own LLaVA given one picture. Each is compiled by
itself, by stock and by every mass, one after the other in this process, with caches off.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch._inductor.config
import transformers
from torch import Tensor, nn
from torch._dynamo.utils import counters

import yopo
from yopo import PruningPlan
from yopo.plan.sinks import Sinks
from yopo.versions import CACHE_FIELD

LAYERS, HEADS, HIDDEN, NEURONS, SIDE = 6, 8, 64, 96, 8
STOCK = "stock"
TEXTS, STEPS = (20, 33, 47), 4  # text tokens of the prompts, decode steps after each
IMAGE = 5  # the placeholder's id
TEXT_SIZES: dict[str, Any] = dict(
    vocab_size=128,
    hidden_size=HIDDEN,
    intermediate_size=NEURONS,
    num_hidden_layers=LAYERS,
    num_attention_heads=HEADS,
    num_key_value_heads=HEADS,
)


@dataclass
class Row:
    """What one compilation came to. seconds: of the first calls; cpu: of all processors, which
    others on the machine change less. far: the greatest difference of logits from eager ones."""

    model: str
    arm: str
    graphs: int
    breaks: int
    seconds: float
    cpu: float
    far: float


def plan(mass: str) -> PruningPlan:
    """Ragged: in each layer other heads, and another number of them; a cut, an FFN slice."""
    keep = torch.rand(LAYERS, HEADS, generator=torch.Generator().manual_seed(0)) < 0.5
    sinks = Sinks(torch.zeros(LAYERS, HEADS), torch.randn(LAYERS, HEADS, HIDDEN // HEADS) / 8)
    return PruningPlan(
        keep,
        window=5,
        layer_cut=LAYERS - 2,
        ffn_ratio=2,
        head_mass=mass,
        cut_mass=mass,
        sinks=sinks if mass == "sink" else None,
    )


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT_SIZES)).eval()


def llava() -> Any:
    text = dict(model_type="llama", **TEXT_SIZES)
    tower = dict(
        model_type="clip_vision_model",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIDE * 4,
        patch_size=4,
    )
    config = transformers.LlavaConfig(
        text_config=text, vision_config=tower, image_token_index=IMAGE, image_seq_length=1
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def chat(model: Any, plain: bool) -> list[Tensor]:
    """Logits of the prompts and of the steps after them; plain: without a word of the image."""
    out = []
    generator = torch.Generator().manual_seed(1)
    for text in TEXTS:
        n = text + SIDE * SIDE
        embeds = torch.randn(1, n, HIDDEN, generator=generator)
        mask = torch.zeros(1, n, dtype=torch.bool)
        mask[:, 5 : 5 + SIDE * SIDE] = True
        more = {} if plain else {"visual_mask": mask, "visual_grids": [[(SIDE, SIDE)]]}
        answer = model(inputs_embeds=embeds, use_cache=True, **more)
        out.append(answer.logits)
        for step in range(STEPS):
            ids = torch.tensor([[10 + step]])
            given = {CACHE_FIELD: answer[CACHE_FIELD]}
            answer = model(input_ids=ids, use_cache=True, **given)
            out.append(answer.logits)
    return out


def look(model: Any, plain: bool) -> list[Tensor]:
    """Logits of one prompt with a picture."""
    del plain
    pixels = torch.randn(1, 3, SIDE * 4, SIDE * 4, generator=torch.Generator().manual_seed(2))
    ids = torch.cat([torch.arange(10, 20), torch.full((SIDE * SIDE,), IMAGE), torch.arange(20, 60)])
    return [model(input_ids=ids[None], pixel_values=pixels, use_cache=True).logits]


MODELS: dict[str, tuple[Callable[[], Any], Callable[[Any, bool], list[Tensor]]]] = {
    "Llama, 3 prompts and steps": (llama, chat),
    "LLaVA, 1 picture": (llava, look),
}


def cpu_seconds() -> float:
    """Of this process, and of those that it waited for (C++ compilers)."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    used = [resource.getrusage(each) for each in whose]
    return sum(each.ru_utime + each.ru_stime for each in used)


@torch.no_grad()
def compiled(name: str, arm: str, backend: str, live: bool) -> Row:
    make, use = MODELS[name]
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 1.0)
    if arm != STOCK:
        yopo.apply(model, plan(arm))
        if not live:
            yopo.fuse(model)
    expected = use(model, arm == STOCK)
    torch._dynamo.reset()
    counters.clear()
    made = torch.compile(model, backend=backend)
    start, before = time.perf_counter(), cpu_seconds()
    found = use(made, arm == STOCK)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - before
    far = max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))
    breaks = sum(counters["graph_break"].values())
    row = Row(name, arm, counters["stats"]["unique_graphs"], breaks, seconds, cpu, far)
    for reason, count in counters["graph_break"].items():
        print(f"    {count} × {reason.splitlines()[0]}", flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--live", action="store_true", help="weights are not fused")
    parser.add_argument("--arms", nargs="+", default=[STOCK, "drop", "sink", "exact"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    given = parser.parse_args()
    torch._inductor.config.force_disable_caches = True
    torch._inductor.config.compile_threads = 1  # all in this process, where it can be measured
    for name in MODELS:
        if not any(name.startswith(chosen) for chosen in given.models):
            continue
        for arm in given.arms:
            print(json.dumps(asdict(compiled(name, arm, given.backend, given.live))), flush=True)


if __name__ == "__main__":
    main()

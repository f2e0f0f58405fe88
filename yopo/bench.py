"""`python -m yopo bench`: prefill and decode of random-weight models at real shapes, ours against
stock transformers with SDPA and with eager attention, and against the masked simulation.

All arms run on the same weights in the same process, one after the other in each round, so that a
machine that speeds up or slows down does so for all. Reported are medians, and next to them what
was to be expected: the ideal ratio (counted FLOPs) and the roofline floor (FLOPs at the GEMM rate,
or weight bytes at the bandwidth, measured in the same run, whichever is longer for a layer).
"""

from __future__ import annotations

import argparse
import inspect
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from . import attach
from . import modeling_llama_prune as prune
from ._compat import attention_is_switchable, exchange_class, read_stock_cache
from .bench_report import Arm, Probe, machine, result_of, save, table, timed
from .cli import BadInput
from .flops import Prompt
from .layout import VisualLayout
from .plan import MASSES, PruningPlan
from .presets import PRESETS, Shape, named_plan, with_masses
from .simulation import simulate

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--preset", default="llava-1.5-7b", help=", ".join(PRESETS))
    parser.add_argument("--layers", type=int, help="only so many layers, the plan in proportion")
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--images", type=int, default=1, help="in each row of the batch")
    parser.add_argument("--text-tokens", type=int, default=60)
    parser.add_argument("--plan", default="25", help="25, 12, 7b_16 …, none, or a JSON file")
    parser.add_argument(
        "--mass",
        metavar="HEAD[/CUT]",
        help=f"{', '.join(MASSES)} (drop; of a JSON file's plan: its own)",
    )
    parser.add_argument("--steps", type=int, default=8, help="decode steps; 0: none")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of all arms")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument(
        "--arms", default="sdpa,eager,masked,yopo", help="which to run; sdpa and yopo always"
    )
    parser.add_argument("--out", type=Path, help="folder for results.csv and results.png")
    parser.set_defaults(command=bench)


def bench(args: argparse.Namespace) -> int:
    """Runs the benchmark. Raises BadInput before any heavy work where something is wrong."""
    shape, plan, device, dtype = _checked(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    prompt = _prompt(args, shape)
    _check_memory(shape, prompt, args.batch, dtype, device)
    tqdm.write(machine(device, dtype))
    model = _random_model(shape, dtype, device)
    case = _case(prompt, args.batch, shape, dtype, device)
    arms = _arms(args, model, plan, case)
    probe = Probe(shape, dtype, device, prompt, args.batch)
    for _ in tqdm(range(args.rounds + 1), desc="rounds (the first is not counted)"):
        first = not arms[0].prefill_s and not arms[0].failed and not arms[0].peak_bytes
        for arm in arms:
            _run(arm, args.steps, device, counted=not first)
        probe.run()
    result = result_of(args, shape, prompt, plan, arms, probe.rates(), dtype)
    print(table(arms))
    if args.out:
        save(args.out, arms, result)
    print(json.dumps(result))
    return 0


# ------------------------------------------------------------------------------------------ input


def _checked(
    args: argparse.Namespace,
) -> tuple[Shape, PruningPlan | None, torch.device, torch.dtype]:
    if args.preset not in PRESETS:
        raise BadInput(f"--preset is {args.preset!r}; allowed: {', '.join(PRESETS)}")
    shape = PRESETS[args.preset]
    layers = shape.num_hidden_layers if args.layers is None else args.layers
    if not 1 <= layers <= shape.num_hidden_layers:
        raise BadInput(
            f"--layers is {layers}; {args.preset} has {shape.num_hidden_layers}: allowed are 1 to "
            f"{shape.num_hidden_layers}"
        )
    shape = replace(shape, num_hidden_layers=layers)
    if args.dtype not in DTYPES:
        raise BadInput(f"--dtype is {args.dtype!r}; allowed: {', '.join(DTYPES)}")
    for name, low in (("batch", 1), ("images", 1), ("text_tokens", 2), ("rounds", 1), ("steps", 0)):
        if getattr(args, name) < low:
            raise BadInput(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; allowed: {low} and more"
            )
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device, dtype=DTYPES[args.dtype])
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {args.device} cannot be used here: {reason}") from error
    if args.plan == "none":
        return shape, None, device, DTYPES[args.dtype]
    try:
        plan = named_plan(args.plan, shape, "drop")
        if args.mass is not None:
            plan = with_masses(plan, args.mass)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    return shape, plan, device, DTYPES[args.dtype]


def _prompt(args: argparse.Namespace, shape: Shape) -> Prompt:
    return Prompt.around((shape.grid,) * args.images, args.text_tokens)


def _check_memory(
    shape: Shape, prompt: Prompt, batch: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Raises BadInput where weights and the arms' own needs exceed the free memory."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = psutil.virtual_memory().available
    layer = shape.layer_weights * dtype.itemsize
    n = prompt.text + prompt.visual
    # Activations of one layer at once, the widest being the FFN's; the cache of all layers.
    activations = batch * n * (3 * shape.intermediate_size + 8 * shape.hidden_size) * dtype.itemsize
    cache = 2 * batch * n * shape.num_key_value_heads * shape.head_dim * dtype.itemsize
    fixed = 2 * shape.vocab_size * shape.hidden_size * dtype.itemsize + activations
    needed = fixed + shape.num_hidden_layers * (layer + cache)
    if needed > free:
        fits = int((free - fixed) // (layer + cache))
        advice = (
            f"--layers {fits} would" if fits >= 1 else "no number of layers would: lower --batch"
        )
        raise BadInput(
            f"{shape.num_hidden_layers} layers need about {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free on {device}; {advice}"
        )


# ------------------------------------------------------------------------------------------- arms


def _random_model(shape: Shape, dtype: torch.dtype, device: torch.device) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_hidden_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_key_value_heads,
        vocab_size=shape.vocab_size,
        max_position_embeddings=32768,
    )
    config._attn_implementation = "sdpa"
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with _no_init():
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    # A repeated block of random numbers: as good as fresh ones for timing, and there at once.
    block = torch.randn(1 << 20, dtype=torch.float32) * 0.02
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
                continue
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(block)):
                flat[start : start + len(block)] = block[: len(flat) - start]
    return model.to(device)


@contextmanager
def _no_init() -> Iterator[None]:
    """Leaves out the initialisation of weights, which are overwritten anyway."""
    names = ("normal_", "uniform_", "kaiming_uniform_", "trunc_normal_")
    saved = {name: getattr(nn.init, name) for name in names}
    try:
        for name in names:
            setattr(nn.init, name, lambda tensor, *args, **kwargs: tensor)
        yield
    finally:
        for name, function in saved.items():
            setattr(nn.init, name, function)


@dataclass(frozen=True)
class Case:
    """What every arm is given: embeddings (B, n, d), and where the visual tokens are."""

    embeds: Tensor
    layout: VisualLayout


def _case(
    prompt: Prompt, batch: int, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Case:
    n = prompt.text + prompt.visual
    mask = torch.zeros(batch, n, dtype=torch.bool)
    mask[:, prompt.text_before : prompt.text_before + prompt.visual] = True
    layout = VisualLayout.from_mask(mask, [prompt.grids] * batch)
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(batch, n, shape.hidden_size, generator=generator)
    return Case(embeds.to(device, dtype), layout)


def _arms(args: argparse.Namespace, model: Any, plan: PruningPlan | None, case: Case) -> list[Arm]:
    """The arms asked for. They share the model: each puts it in its own state first."""

    def prefill(**told: Any) -> Any:
        out = model(inputs_embeds=case.embeds, use_cache=True, **_last_only(model), **told)
        return out.past_key_values

    def decode(cache: Any) -> None:
        token = torch.zeros(case.embeds.shape[0], 1, dtype=torch.long, device=case.embeds.device)
        model(input_ids=token, past_key_values=cache, use_cache=True)

    def stock(implementation: str) -> Callable[[], None]:
        def enter() -> None:
            attach.remove(model)
            exchange_class(model, prune.StockLlamaForCausalLM)
            exchange_class(model.model, prune.StockLlamaModel)
            model.config._attn_implementation = implementation

        return enter

    def pruned() -> None:
        model.config._attn_implementation = "sdpa"
        if plan is not None:
            attach.apply(model, plan)
        else:  # as the patch alone would have built it
            exchange_class(model, prune.LlamaForCausalLM)
            exchange_class(model.model, prune.LlamaModel)

    def masked() -> None:
        released = replace(plan, head_mass="exact", cut_mass="exact", text_mass=None)
        simulate(model.model, released, case.layout, case.embeds)

    told = {} if plan is None else {
        "visual_mask": case.layout.visual.to(case.embeds.device), "visual_grids": case.layout.grids
    }  # fmt: skip
    arms = {
        "sdpa": Arm("stock SDPA", prefill, decode, stock("sdpa")),
        "eager": Arm("stock eager", prefill, decode, stock("eager")),
        "masked": Arm("masked simulation", masked, None, stock("sdpa")),
        "yopo": Arm("yopo", lambda: prefill(**told), decode, pruned),
    }
    if not attention_is_switchable():
        arms["eager"].failed = "needs transformers 4.48"
    wanted = args.arms.split(",")
    if unknown := set(wanted) - arms.keys():
        raise BadInput(f"--arms names {sorted(unknown)}; allowed: {', '.join(arms)}")
    if plan is None or not plan.prune_visual_queries:
        wanted = [name for name in wanted if name != "masked"]
    return [arm for name, arm in arms.items() if name in {*wanted, "sdpa", "yopo"}]


def _last_only(model: Any) -> dict[str, int]:
    """Logits of the last row alone, under the name this transformers has for it (none: all)."""
    known = inspect.signature(type(model).forward).parameters
    return {name: 1 for name in ("logits_to_keep", "num_logits_to_keep") if name in known}


@torch.inference_mode()
def _run(arm: Arm, steps: int, device: torch.device, counted: bool) -> None:
    if arm.failed:
        return
    try:
        arm.enter()
        with _peak(device) as peak:
            seconds, cache = timed(arm.prefill, device)
        if not counted:
            arm.peak_bytes = max(1, peak())
            arm.cache_bytes = 0 if cache is None else _cache_bytes(cache)
        else:
            arm.prefill_s.append(seconds)
        if arm.decode is not None:
            for _ in range(steps):
                seconds, _ = timed(lambda: arm.decode(cache), device)
                if counted:
                    arm.decode_s.append(seconds)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in str(error).lower() and not isinstance(error, MemoryError):
            raise
        arm.failed = "out of memory"


@contextmanager
def _peak(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields a function that says by how many bytes memory had grown at most within the block."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
        yield lambda: torch.cuda.max_memory_allocated(device) - base
        return
    process, done = psutil.Process(), threading.Event()
    base = most = process.memory_info().rss

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield lambda: most - base
    finally:
        done.set()
        thread.join()


def _cache_bytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return cache.nbytes()
    return sum(t.numel() * t.element_size() for pair in read_stock_cache(cache) for t in pair)

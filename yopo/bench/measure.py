"""`python -m yopo bench`: prefill and decode of random-weight models at real shapes, ours against
stock transformers with SDPA and with eager attention, and against the masked simulation.

The model has the preset's sizes and Llama's layers: biases, rotary angles in three dimensions and
fused projections of other families, which cost next to nothing, are left out.

All arms run on the same weights in the same process, one after the other in each round, so that a
machine that speeds up or slows down does so for all. Reported are medians, and next to them what
was to be expected: the ideal ratio (counted FLOPs) and the roofline floor (FLOPs at the GEMM rate,
or weight bytes at the bandwidth, measured in the same run, whichever is longer for a layer).
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm

from yopo import modeling_llama_prune as prune
from yopo.bench.memory import (
    fixed_bytes,
    free_bytes,
    is_out_of_memory,
    layer_bytes,
    peak_of,
    square_bytes,
)
from yopo.bench.report import Arm, Probe, machine, result_of, save, table, timed
from yopo.bench.simulation import simulate
from yopo.counting.flops import Prompt
from yopo.counting.presets import PRESETS, Shape, named_plan, with_masses
from yopo.counting.setting import (
    add_prompt_arguments,
    grids_of,
    prompt_of,
    refuse_less,
    some_layers,
)
from yopo.engine.layout import VisualLayout
from yopo.engine.visual_cache import VisualCache
from yopo.errors import BadInput
from yopo.models import attach
from yopo.plan.pruning_plan import MASSES, PruningPlan, split_masses
from yopo.versions import attention_is_switchable, exchange_class, read_stock_cache

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
ARMS = ("sdpa", "eager", "masked", "yopo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--preset", default="llava-1.5-7b", help=", ".join(PRESETS))
    parser.add_argument("--layers", type=int, help="only so many layers, the plan in proportion")
    parser.add_argument("--device", default="cpu")
    add_prompt_arguments(parser)
    parser.add_argument("--plan", default="25", help="25, 12, 7b_16 …, none, or a JSON file")
    parser.add_argument(
        "--mass",
        metavar="HEAD[/CUT]",
        help=f"{', '.join(MASSES)} (drop; of a JSON file's plan: its own)",
    )
    parser.add_argument("--steps", type=int, default=8, help="decode steps; 0: none")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of all arms")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--arms", default=",".join(ARMS), help="which to run; sdpa and yopo always")
    parser.add_argument("--out", type=Path, help="folder for results.csv and results.png")
    parser.set_defaults(command=bench)


def bench(args: argparse.Namespace) -> int:
    """Runs the benchmark. Raises BadInput before any heavy work where something is wrong."""
    shape, prompt, plan, run = _checked(args)
    device, dtype = run.device, run.dtype
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    _check_memory(args, shape, prompt, run)
    tqdm.write(machine(device, dtype))
    try:
        model = _random_model(shape, dtype, device)
        case = _case(prompt, args.batch, shape, dtype, device)
        probe = Probe(shape, dtype, device, prompt, args.batch)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise BadInput(f"out of memory on {device} for the model alone: lower --layers") from error
    arms = _arms(args, model, plan, case)
    _refuse_square(args, shape, case, arms)
    for number in tqdm(range(args.rounds + 1), desc="rounds (the first is not counted)"):
        for arm in arms:
            _run(arm, args.steps, device, counted=number > 0)
        probe.run()
    result = result_of(args, shape, prompt, plan, arms, probe.rates(), dtype)
    print(table(arms, result))
    try:
        if args.out:
            save(args.out, arms, result)
    except OSError as error:
        raise BadInput(f"--out {args.out} cannot be written: {error}") from error
    finally:  # hours of work are not lost to a full disk
        print(json.dumps(result))
    return 0


@dataclass(frozen=True)
class Run:
    """Where and in which precision all arms run."""

    device: torch.device
    dtype: torch.dtype


# ------------------------------------------------------------------------------------------ input


def _checked(args: argparse.Namespace) -> tuple[Shape, Prompt, PruningPlan | None, Run]:
    shape, whole = some_layers(args.preset, args.layers), PRESETS[args.preset].num_hidden_layers
    prompt = prompt_of(args, grids_of(args.grid, shape.grid))
    refuse_less(args, rounds=1, steps=0, threads=1)
    if unknown := set(args.arms.split(",")) - {*ARMS}:
        raise BadInput(f"--arms names {sorted(unknown)}; allowed: {', '.join(ARMS)}")
    try:
        device = torch.device(args.device)
        if device.type not in ("cpu", "cuda"):
            raise BadInput(f"--device is {args.device!r}; allowed: cpu, cuda, cuda:N")
        torch.zeros(1, device=device, dtype=DTYPES[args.dtype])
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise BadInput(f"--device {args.device} cannot be used here: {reason}") from error
    _check_output(args.out)
    run = Run(device, DTYPES[args.dtype])
    try:
        if args.mass is not None:
            split_masses(args.mass, "--mass")
        if args.plan == "none":
            return shape, prompt, None, run
        plan = named_plan(args.plan, shape, "drop", whole=whole)
        if args.mass is not None:
            plan = with_masses(plan, args.mass)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    return shape, prompt, replace(plan, ffn_order=None), run  # random weights are in any order


def _check_output(out: Path | None) -> None:
    """Raises BadInput where the table or the files could not be written at the end."""
    needed = ("tabulate",) if out is None else ("tabulate", "matplotlib")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise BadInput(f"{', '.join(missing)} is missing: pip install {' '.join(missing)}")
    try:
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"--out {out} cannot be made: {error}") from error


def _check_memory(args: argparse.Namespace, shape: Shape, prompt: Prompt, run: Run) -> None:
    """Raises BadInput where the model and what every arm needs exceed the free memory."""
    free = free_bytes(run.device)
    fixed, layer = (f(shape, prompt, args.batch, run.dtype) for f in (fixed_bytes, layer_bytes))
    needed = fixed + shape.num_hidden_layers * layer
    if needed > free:
        fits = int((free - fixed) // layer)
        advice = (
            f"--layers {fits} would" if fits >= 1 else "no number of layers would: lower --batch"
        )
        raise BadInput(
            f"{shape.num_hidden_layers} layers need about {needed / 2**30:.1f} GiB, and "
            f"{free / 2**30:.1f} GiB are free on {run.device}; {advice}"
        )


def _refuse_square(args: argparse.Namespace, shape: Shape, case: Case, arms: list[Arm]) -> None:
    """Leaves out the arms whose n × n scores do not fit beside the model: an operating system that
    overcommits would kill the whole benchmark instead of saying so."""
    device, dtype = case.embeds.device, case.embeds.dtype
    square = square_bytes(shape, case.prompt, args.batch, dtype)
    cache = shape.num_hidden_layers * layer_bytes(shape, case.prompt, args.batch, dtype)
    cache -= shape.num_hidden_layers * shape.layer_weights * dtype.itemsize
    needed, free = square + cache, free_bytes(device)
    for arm in arms:
        if arm.square and not arm.failed and needed > free:
            arm.failed = f"out of memory: needs about {needed / 2**30:.0f} GiB"


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
        with _no_init(), device:
            model = transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)
    # A repeated block of random numbers: as good as fresh ones for timing, and there at once.
    block = torch.randn(1 << 20, dtype=torch.float32, device=device) * 0.02
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1)
                continue
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(block)):
                flat[start : start + len(block)] = block[: len(flat) - start]
    return model


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

    prompt: Prompt
    embeds: Tensor
    layout: VisualLayout


def _case(
    prompt: Prompt, batch: int, shape: Shape, dtype: torch.dtype, device: torch.device
) -> Case:
    n = prompt.text + prompt.visual
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(batch, n, shape.hidden_size, generator=generator)
    return Case(prompt, embeds.to(device, dtype), prompt.layout(batch))


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
            for index in range(len(model.model.layers)):  # as after the first image ever
                model.model._yopo_stack.on(index, case.embeds.device)
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
        "eager": Arm("stock eager", prefill, decode, stock("eager"), square=True),
        "masked": Arm("masked simulation", masked, None, stock("sdpa"), square=True),
        "yopo": Arm("yopo", lambda: prefill(**told), decode, pruned),
    }
    if not attention_is_switchable():
        arms["eager"].failed = "needs transformers 4.48"
    wanted = args.arms.split(",")
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
        if counted:
            seconds, cache = timed(arm.prefill, device)
            arm.prefill_s.append(seconds)
        else:
            arm.peak_bytes, cache = peak_of(arm.prefill, device)
            arm.cache_bytes = 0 if cache is None else _cache_bytes(cache)
            if isinstance(cache, VisualCache):
                arm.visual_bytes = cache.nbytes(visual_only=True)
        if arm.decode is not None:
            for _ in range(steps):
                seconds, _ = timed(lambda: arm.decode(cache), device)
                if counted:
                    arm.decode_s.append(seconds)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        arm.failed = "out of memory"
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _cache_bytes(cache: Any) -> int:
    if hasattr(cache, "nbytes"):
        return cache.nbytes()
    return sum(t.numel() * t.element_size() for pair in read_stock_cache(cache) for t in pair)

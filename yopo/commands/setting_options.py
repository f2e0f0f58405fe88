"""The options that `flops`, `inspect` and `bench` have in common, and the Setting that they make:
of a preset, or of a checkpoint's config.json. Arguments and their checks; nothing is counted here.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import replace

import torch

from yopo.checkpoint.config_file import Checkpoint, Grid, read_checkpoint
from yopo.counting.flops import Prompt
from yopo.counting.presets import PRESETS, Shape
from yopo.counting.setting import ITEMSIZE, Setting
from yopo.errors import BadInput
from yopo.plan import recipes
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """The options that describe the prompt counted or timed."""
    parser.add_argument("--images", type=int, default=1, help="in each row of the batch")
    parser.add_argument(
        "--grid",
        metavar="RxC[,RxC…]",
        help="visual tokens of an image, rows x columns; several for one of several views "
        "(default: the model's)",
    )
    parser.add_argument("--text-tokens", type=int, default=60, help="in each row, in all")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", help=", ".join(ITEMSIZE))


def checkpoint_setting(
    args: argparse.Namespace, folder: str, plan_name: str | None, mass: str | None
) -> tuple[Checkpoint, Setting]:
    """The setting of a checkpoint under its own plan, or the one named. Raises BadInput."""
    try:
        checkpoint = read_checkpoint(folder)
        plan = checkpoint.plan() if plan_name is None else _plan(plan_name, checkpoint.shape)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    grids = grids_of(args.grid, checkpoint.grid)
    if None in grids:
        raise BadInput(
            f"{folder}/config.json does not say how many visual tokens an image has (no readable "
            f"vision_config, mm_vision_tower {checkpoint.config.get('mm_vision_tower')!r}): give "
            "--grid ROWSxCOLUMNS"
        )
    plan = _with_masses(plan, mass, checkpoint.shape.head_dim)
    prompt = prompt_of(args, grids)
    name = str(checkpoint.folder)
    shape = replace(checkpoint.shape, grid=grids[0])
    setting = Setting(name, shape, plan, plan_name, prompt, args.batch, args.dtype)
    return checkpoint, setting


def preset_setting(
    args: argparse.Namespace, preset: str, layers: int | None, plan_name: str, mass: str | None
) -> Setting:
    """The setting of a preset, with fewer `layers` if so told. Raises BadInput."""
    shape = some_layers(preset, layers)
    try:
        plan = _plan(plan_name, shape, PRESETS[preset].num_hidden_layers)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    prompt = prompt_of(args, grids_of(args.grid, shape.grid))
    plan = _with_masses(plan, mass, shape.head_dim)
    return Setting(preset, shape, plan, plan_name, prompt, args.batch, args.dtype)


def some_layers(preset: str, layers: int | None) -> Shape:
    """A preset with its first `layers` layers, None: all. Raises BadInput."""
    if preset not in PRESETS:
        raise BadInput(f"--preset is {preset!r}; allowed: {', '.join(PRESETS)}")
    whole = PRESETS[preset].num_hidden_layers
    layers = whole if layers is None else layers
    if not 1 <= layers <= whole:
        raise BadInput(f"--layers is {layers}; {preset} has {whole}: allowed are 1 to {whole}")
    return replace(PRESETS[preset], num_hidden_layers=layers)


def _plan(name: str, shape: Shape, whole: int | None = None) -> PruningPlan | None:
    """The plan that --plan names, with drop where the name says no masses. Raises ValueError."""
    if name == "none":
        return None
    sizes = (shape.num_hidden_layers, shape.num_attention_heads)
    plan = recipes.named_plan(name, *sizes, mass="drop", whole=whole, setting="--plan")
    plan.ffn_neurons(shape.intermediate_size)  # refuses a ratio that leaves none
    return plan


def _with_masses(plan: PruningPlan | None, mass: str | None, head_dim: int) -> PruningPlan | None:
    """`plan` with the masses HEAD[/CUT], with its own where none are given. Sinks that it lacks are
    0, which costs the same as any others."""
    if mass is None:
        return plan
    if plan is None:
        raise BadInput(f"--mass is {mass!r}, but there is no plan: leave it out, or name a --plan")
    try:
        if plan.sinks is None and "sink" in mass:
            shape = plan.head_keep.shape
            plan = replace(plan, sinks=Sinks(torch.zeros(shape), torch.zeros(*shape, head_dim)))
        return plan.with_mass(mass, name="--mass")
    except ValueError as error:
        raise BadInput(str(error)) from error


def grids_of(text: str | None, otherwise: Grid | None) -> tuple[Grid | None, ...]:
    """The grids of --grid, `otherwise` where it is not given. Raises BadInput."""
    if not text:
        return (otherwise,)
    grids = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", part)
        if not found or 0 in (int(found[1]), int(found[2])):
            raise BadInput(
                f"--grid is {text!r}; allowed: ROWSxCOLUMNS such as 24x24, or several, 24x24,48x48"
            )
        grids.append((int(found[1]), int(found[2])))
    return tuple(grids)


def refuse_less(args: argparse.Namespace, **least: int) -> None:
    """Raises BadInput for a number below its least; None passes."""
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise BadInput(f"--{name.replace('_', '-')} is {value}; allowed: {low} and more")


def prompt_of(args: argparse.Namespace, grids: tuple[Grid, ...]) -> Prompt:
    """The prompt of `add_prompt_arguments`' options, all checked. Raises BadInput."""
    if args.dtype not in ITEMSIZE:
        raise BadInput(f"--dtype is {args.dtype!r}; allowed: {', '.join(ITEMSIZE)}")
    refuse_less(args, batch=1, images=1, text_tokens=2)
    return Prompt.around(grids * args.images, args.text_tokens)

"""`python -m yopo inspect CHECKPOINT`: says in words what a checkpoint's plan prunes and what that
saves; draws it with --png. Only config.json (and the head mask or sinks that it names) is read.

Holds the command and its words; the numbers are put together in counts.py, drawn in inspect_png.py.
"""

from __future__ import annotations

import argparse
import json
import os
import textwrap
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from yopo.checkpoint.config_file import Checkpoint
from yopo.commands.count_flops import savings_table
from yopo.commands.setting_options import add_prompt_arguments, checkpoint_setting
from yopo.counting.counts import counts
from yopo.counting.setting import Setting
from yopo.errors import BadInput
from yopo.plan.pruning_plan import PruningPlan

_MOST_RUNS = 6  # of layers that keep equally many heads; more are summed up

_MASS = {
    "exact": "the visual keys keep their share of the softmax and give nothing for it, as the "
    "released code computes it; so these keys are still computed and cached",
    "drop": "the visual keys leave the softmax; nothing of them is computed or cached",
    "sink": "one predicted logit of each head, fitted once, takes the visual keys' share of the "
    "softmax; nothing of them is computed or cached",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("checkpoint", help="folder; config.json is read, no weights")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw heads and FLOPs of layers")
    add_prompt_arguments(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.set_defaults(command=inspect)


def inspect(args: argparse.Namespace) -> int:
    """Prints the words. Raises BadInput where something is wrong."""
    if args.png and args.png.suffix.lower() != ".png":
        raise BadInput(f"--png is {str(args.png)!r}; allowed: the name of a .png file")
    checkpoint, setting = checkpoint_setting(args, args.checkpoint, None, None)
    result = counts(setting)
    said = words(checkpoint, setting)
    if args.png:
        _draw(args.png, setting, result)
    if args.json:
        keep = None if setting.plan is None else setting.plan.head_keep.int().tolist()
        print(json.dumps({"kind": checkpoint.kind, "words": said, "head_keep": keep, **result}))
        return 0
    print(_heading(checkpoint, setting))
    title = "What its plan prunes, the same for every input"
    print(f"\n{title if setting.plan else 'No plan'}\n")
    for name, sentence in said.items():
        print(textwrap.fill(f"{name}: {sentence}", 100, subsequent_indent="  "))
    prompt = f"{setting.prompt.visual} visual + {setting.prompt.text} text tokens"
    batch = f", batch {setting.batch}" if setting.batch > 1 else ""
    what = "What that saves" if setting.plan else "What the dense model costs"
    print(f"\n{what} ({prompt}{batch}, {setting.dtype})\n\n{savings_table(result)}")
    if args.png:
        print(f"\ndrawn: {args.png}")
    return 0


def _draw(file: Path, setting: Setting, result: dict[str, Any]) -> None:
    try:
        from yopo.counting.plan_picture import draw
    except ImportError as error:
        raise BadInput(f"{error}: --png needs matplotlib (pip install matplotlib)") from error
    try:
        draw(file, setting, result)
    except OSError as error:
        raise BadInput(f"--png: {file} cannot be written: {error}") from error


def _heading(checkpoint: Checkpoint, setting: Setting) -> str:
    shape = setting.shape
    grids = " + ".join(f"{rows} × {cols}" for rows, cols in setting.prompt.grids)
    return (
        f"{setting.name}\n{checkpoint.kind}: {shape.num_hidden_layers} layers, "
        f"{shape.num_attention_heads} heads ({shape.num_key_value_heads} key/value), hidden "
        f"{shape.hidden_size}, FFN {shape.intermediate_size}\nvisual tokens in the prompt counted "
        f"here: {grids} = {setting.prompt.visual}"
    )


def words(checkpoint: Checkpoint, setting: Setting) -> dict[str, str]:
    """A sentence or more on each part of the plan."""
    plan = setting.plan
    if plan is None:
        return {
            "Nothing is pruned": "the config has neither a `yopo` block nor the released fields "
            "(attncut_w, headcut_num, …), so the model runs as stock. What a plan would save: "
            f"python -m yopo flops {setting.name} --plan 25"
        }
    said = {
        "Heads": _heads(plan),
        "Window": _window(plan),
        "FFN": _ffn(plan, setting.shape.intermediate_size),
        "Layer cut": _cut(plan),
    }
    idle = [layer for layer, attends in enumerate(plan.visual_attends) if not attends]
    if idle:
        said["Attention"] = (
            f"in {_ranges(idle)} visual tokens do not attend: they have no queries there, and keys "
            "and values only for the heads that read them"
        )
    pruned_below = not bool(plan.head_keep[: plan.layer_cut].all())
    cut = plan.layer_cut < plan.num_layers
    if pruned_below and cut and plan.head_mass == plan.cut_mass:
        said["Mass, in pruned heads and cut layers"] = f"{plan.head_mass}: {_MASS[plan.head_mass]}"
    else:
        if pruned_below:
            said["Mass, in pruned heads"] = f"{plan.head_mass}: {_MASS[plan.head_mass]}"
        if cut:
            said["Mass, in cut layers"] = f"{plan.cut_mass}: {_MASS[plan.cut_mass]}"
    if os.environ.get("YOPO_MASS"):
        said["YOPO_MASS"] = f"is {os.environ['YOPO_MASS']} here and overrides the config's masses"
    said["Where the image is"] = _image(checkpoint.config)
    return said


def _heads(plan: PruningPlan) -> str:
    heads, cut = plan.num_heads, plan.layer_cut
    per_layer = plan.head_keep[:cut].sum(1).tolist()
    if not per_layer:
        return "the layer cut is at layer 0, so no head reads visual tokens"
    kept = sum(per_layer)
    if kept == cut * heads:
        return f"all {heads} heads of {_layers(0, cut - 1)} read visual tokens; none is pruned"
    runs, at = [], 0
    for count, same in groupby(per_layer):
        length = len(list(same))
        runs.append((_layers(at, at + length - 1), count))
        at += length
    if len(runs) <= _MOST_RUNS:
        shown = "; ".join(f"{_amount(count, heads)} in {where}" for where, count in runs)
    else:
        whole = [layer for layer, count in enumerate(per_layer) if count == heads]
        rest = [count for count in per_layer if count < heads]
        shown = f"{min(rest)} to {max(rest)} of {heads} in the others"
        if whole:
            shown = f"all {heads} in {_ranges(whole)}; {shown}"
    zero = (
        "and for visual queries it gives zero"
        if plan.prune_visual_queries
        else "and the same holds for visual queries"
    )
    return (
        f"{kept} of {cut * heads} ({kept / cut / heads:.0%}) read visual tokens: {shown}. A pruned "
        f"head takes no visual values for text queries, {zero}"
    )


def _amount(count: int, heads: int) -> str:
    return f"all {heads}" if count == heads else f"{count} of {heads}" if count else "none"


def _layers(first: int, last: int) -> str:
    return f"layer {first}" if first == last else f"layers {first}–{last}"


def _ranges(layers: list[int]) -> str:
    groups = groupby(enumerate(layers), lambda pair: pair[1] - pair[0])
    parts = [[layer for _, layer in group] for _, group in groups]
    return ", ".join(_layers(part[0], part[-1]) for part in parts)


def _of_layers(values: tuple[Any, ...], words: Callable[[Any], str]) -> str:
    """What `words` says of a value; of several, each with the layers that have it."""
    if len(set(values)) == 1:
        return words(values[0])
    return "; ".join(
        f"in {_ranges([layer for layer, one in enumerate(values) if one == value])} {words(value)}"
        for value in dict.fromkeys(values)
    )


def _window(plan: PruningPlan) -> str:
    ways = "those before it only" if plan.window_causal else "before and after it"

    def words(window: int | None) -> str:
        if window is None:
            return "none: a visual token sees the visual tokens before it, as in the dense model"
        side = 2 * ((window - 1) // 2) + 1
        return (
            f"{window}: a visual token sees the text before it and, of visual tokens, the "
            f"{side} × {side} around it on its own image ({ways})"
        )

    return _of_layers(plan.windows, words)


def _ffn(plan: PruningPlan, size: int) -> str:
    def words(neurons: int) -> str:
        if neurons == size:
            return f"visual tokens use all {size} neurons, as text does"
        if not neurons:
            return f"visual tokens do not pass it, text uses all {size} neurons"
        return f"visual tokens use the first {neurons} of {size} neurons, text all"

    return _of_layers(plan.ffn_neurons(size), words)


def _cut(plan: PruningPlan) -> str:
    first, layers = plan.layer_cut, plan.num_layers
    if first == layers:
        return f"none: visual tokens are read in all {layers} layers"
    where = _layers(first, layers - 1)
    if plan.cut_mass == "exact":
        return (
            f"in {where} of {layers} no head reads visual values; the visual rows still run there, "
            "since their keys are needed, and the heads that the mask keeps there serve their "
            "queries alone"
        )
    return f"in {where} of {layers} visual tokens are not there at all: not computed, not cached"


def _image(config: dict[str, Any]) -> str:
    token = config.get("image_token_id", config.get("image_token_index"))
    if "mm_vision_tower" in config:
        found = "from LLaVA's own image placeholders in each prompt, any number and any size"
    elif token is not None:
        found = f"at the tokens with id {token} in each prompt"
    else:
        found = "as forward's visual_mask says"
    start = config.get("sprompt_len")
    if start is not None:
        found += (
            f"; sprompt_len {start} counts only for inputs_embeds that nobody described: there one "
            f"24 × 24 image is taken to follow {start} tokens"
        )
    return found

"""`python -m yopo flops`: FLOPs of a prefill and a decode step, KV and weight bytes, of a preset or
a checkpoint, dense and under a plan; as tables, or as one JSON object.

Holds the command and its tables; what they show is put together in counts.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from yopo.commands.setting_options import (
    add_prompt_arguments,
    checkpoint_setting,
    preset_setting,
)
from yopo.counting.counts import counts
from yopo.counting.presets import PRESETS
from yopo.errors import BadInput
from yopo.plan.pruning_plan import MASSES

_FLOPS = ((1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1, "FLOP"))
_BYTES = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("checkpoint", nargs="?", help="folder; only its config.json is read")
    parser.add_argument("--model", metavar="DIR", help="the same, as an option")
    parser.add_argument("--preset", help=", ".join(PRESETS))
    parser.add_argument("--layers", type=int, help="of the preset, only so many")
    parser.add_argument(
        "--plan",
        help="25, 12, 7b_16 …, none, or a JSON file (default: the checkpoint's own; 25 for a "
        "preset)",
    )
    parser.add_argument(
        "--mass",
        metavar="HEAD[/CUT]",
        help=f"{', '.join(MASSES)} (default: the plan's own; drop for 25, 12, 7b_16 …)",
    )
    add_prompt_arguments(parser)
    parser.add_argument("--per-layer", action="store_true", help="a table of the layers, too")
    parser.add_argument("--json", action="store_true", help="one JSON object and nothing else")
    parser.set_defaults(command=flops)


def flops(args: argparse.Namespace) -> int:
    """Prints the counts. Raises BadInput where something is wrong."""
    given = [
        name
        for name, value in (
            ("a checkpoint", args.checkpoint),
            ("--model", args.model),
            ("--preset", args.preset),
        )
        if value is not None
    ]
    if len(given) != 1:
        got = " and ".join(given) if given else "nothing"
        raise BadInput(
            f"flops of what? got {got}: name one checkpoint folder, or one --preset "
            f"({', '.join(PRESETS)})"
        )
    folder = args.checkpoint if args.checkpoint is not None else args.model
    if folder is None:
        plan = "25" if args.plan is None else args.plan
        setting = preset_setting(args, args.preset, args.layers, plan, args.mass)
    elif args.layers is not None:
        raise BadInput(f"--layers is {args.layers}; it goes with --preset, not with a checkpoint")
    else:
        _, setting = checkpoint_setting(args, folder, args.plan, args.mass)
    result = counts(setting)
    if args.json:
        print(json.dumps(result))
    else:
        print(as_text(result, args.per_layer))
    return 0


def as_text(result: dict[str, Any], per_layer: bool = False) -> str:
    """The tables of `result`, of counts.counts."""
    parts = [_heading(result)]
    for name, title in (("prefill", "Prefill"), ("decode", "One decode step after it")):
        parts.append(_flops_table(result[name], title))
    parts += [_bytes_table(result), _paper(result)]
    if per_layer:
        parts.append(_layer_table(result))
    return "\n\n".join(parts)


def _heading(result: dict[str, Any]) -> str:
    model, prompt, plan = result["model"], result["prompt"], result["plan"]
    grids = " + ".join(f"{rows}×{cols}" for rows, cols in prompt["grids"])
    lines = [
        f"{model['name']}: {model['num_hidden_layers']} layers, hidden {model['hidden_size']}, "
        f"{model['num_attention_heads']} heads ({model['num_key_value_heads']} key/value), FFN "
        f"{model['intermediate_size']}; {result['dtype']}",
        f"prompt: {prompt['visual_tokens']} visual ({grids}) + {prompt['text_tokens']} text tokens"
        f"{', batch ' + str(prompt['batch']) if prompt['batch'] > 1 else ''}",
        "plan: none, the dense model"
        if plan is None
        else f"plan {plan['name']}: {plan['summary']}",
        "Counted: the language model's products (2 FLOPs a multiply-add), attention by the (query, "
        "key) pairs that see each other.",
    ]
    return "\n".join(lines)


def scaled(values: Sequence[float], units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit that the largest of `values` fills."""
    return next((unit for unit in units if max(values) >= unit[0]), units[-1])


def number(value: float) -> str:
    return f"{value:.4g}"


def share(dense: float, pruned: float | None) -> str:
    return "" if pruned is None or not dense else f"{pruned / dense:.1%}"


def _tabulate(rows: list[list[str]], headers: list[str]) -> str:
    try:
        from tabulate import tabulate
    except ImportError as error:
        raise BadInput(
            "tabulate is missing, which prints the tables: pip install tabulate, or use --json"
        ) from error
    align = ["left"] + ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def _row(name: str, dense: float, pruned: float | None, unit: float) -> list[str]:
    shown = "" if pruned is None else number(pruned / unit)
    return [name, number(dense / unit), shown, share(dense, pruned)]


def _flops_table(part: dict[str, Any], title: str) -> str:
    dense, pruned = part["dense"], part["pruned"]
    unit, name = scaled([dense["total"]], _FLOPS)
    keys = [k for k in dense if k not in ("visual", "total") and (dense[k] or k == "lm_head")]
    labels = {key: key.replace("_", " ") for key in keys} | {"lm_head": "lm_head, last position"}
    rows = [_row(labels[k], dense[k], pruned and pruned[k], unit) for k in keys]
    if dense["visual"]:
        rows.append(_row("visual rows", dense["visual"], pruned and pruned["visual"], unit))
    rows.append(_row("total", dense["total"], pruned and pruned["total"], unit))
    run = part["executed"]
    rows.append(_row("executed (masked pairs too)", run["dense"], run["pruned"], unit))
    return _tabulate(rows, [f"{title}, {name}", "dense", "pruned", "share"])


def _bytes_table(result: dict[str, Any]) -> str:
    kv, weights = result["kv_bytes"], result["weight_bytes"]
    rows = []

    def add(name: str, both: dict[str, Any], key: str) -> None:
        dense, pruned = both["dense"][key], both["pruned"] and both["pruned"][key]
        unit, size = scaled([dense, pruned or 0], _BYTES)
        rows.append(_row(f"{name}, {size}", dense, pruned, unit))

    add("KV cache, text", kv, "text")
    add("KV cache, visual", kv, "visual")
    add("KV cache", kv, "filled")
    if kv["pruned"]:
        add("room for tokens to come", kv, "room")
    add("weights", weights, "total")
    add("weights read by a prefill or a step", weights, "forward")
    add("weights multiplied with visual rows", weights, "visual")
    return _tabulate(rows, ["Memory", "dense", "pruned", "share"])


def savings_table(result: dict[str, Any]) -> str:
    """The few rows that say what a plan saves, or what the dense model costs."""
    rows = []
    for name, part, key, units in (
        ("FLOPs of visual rows, prefill", "prefill", "visual", _FLOPS),
        ("FLOPs of the whole prefill", "prefill", "total", _FLOPS),
        ("FLOPs of a decode step", "decode", "total", _FLOPS),
        ("visual keys and values cached", "kv_bytes", "visual", _BYTES),
        ("KV cache", "kv_bytes", "filled", _BYTES),
    ):
        dense, pruned = result[part]["dense"][key], result[part]["pruned"]
        unit, size = scaled([dense, pruned[key] if pruned else 0], units)
        rows.append(_row(f"{name}, {size}", dense, pruned and pruned[key], unit))
    headers = ["", "dense", "pruned", "left"]
    if result["plan"] is None:
        rows, headers = [row[:2] for row in rows], headers[:2]
    return _tabulate(rows, headers)


def _paper(result: dict[str, Any]) -> str:
    paper = result["paper_convention"]
    dense, pruned = paper["dense_tflops"], paper["pruned_tflops"]
    digits = ".2f" if dense >= 0.1 else ".3g"
    line = f"The paper's convention: dense {dense:{digits}} TFLOPs"
    if pruned is not None:
        line += f", pruned {pruned:{digits}} ({share(dense, pruned)})"
    return "\n".join([f"{line}.", f"It counts {paper['counts']}.", *map(_sentence, paper["notes"])])


def _sentence(note: str) -> str:
    return f"Note: {note}."


def _layer_table(result: dict[str, Any]) -> str:
    layers = result["per_layer"]
    totals = [sum(layer["dense"]["prefill"].values()) for layer in layers]
    unit, name = scaled(totals, _FLOPS)
    size, size_name = scaled([sum(layer["dense"]["kv_bytes"].values()) for layer in layers], _BYTES)
    rows = []
    for layer, total in zip(layers, totals, strict=True):
        kept = layer["kept_heads"]
        dense, pruned = layer["dense"], layer["pruned"]
        row = [str(layer["layer"]), "" if kept is None else str(kept), number(total / unit)]
        if pruned is None:
            row += ["", "", "", number(_filled(dense) / size), ""]
        else:
            parts = pruned["prefill"]
            visual = sum(value for key, value in parts.items() if key.startswith("visual"))
            now = sum(parts.values())
            row += [number(now / unit), number(visual / unit), share(total, now)]
            row += [number(_filled(dense) / size), number(_filled(pruned) / size)]
        rows.append(row)
    headers = ["layer", "heads that read", f"dense, {name}", "pruned", "of it visual", "share"]
    return _tabulate(rows, [*headers, f"KV dense, {size_name}", "KV pruned"])


def _filled(layer: dict[str, Any]) -> int:
    return layer["kv_bytes"]["text"] + layer["kv_bytes"]["visual"]

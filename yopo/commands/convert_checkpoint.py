"""`python -m yopo convert SRC DST`: a checkpoint in its makers' own format becomes one that
transformers' own classes read (yopo/convert/). Arguments and words; nothing is converted here.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from yopo.commands import INTERRUPTED
from yopo.convert.common import local_folder
from yopo.convert.conversion import check_version, partial_of, prepare, write
from yopo.errors import BadInput


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("source", metavar="SRC", help="folder or Hub id of the checkpoint")
    parser.add_argument("target", metavar="DST", help="folder to make; it must not be there yet")
    parser.add_argument(
        "--vision-tower",
        metavar="FOLDER",
        help="LLaVA's vision tower, where config.json's mm_vision_tower is not where it lies",
    )
    parser.add_argument(
        "--shard-gb", type=float, default=4.0, help="largest file to write (default: %(default)g)"
    )
    parser.set_defaults(command=convert)


def convert(args: argparse.Namespace) -> int:
    """Converts args.source to args.target. Raises BadInput before anything is written where the
    checkpoint cannot be converted; interrupted, goes on where it stopped when it is run again."""
    check_version()
    target = Path(args.target)
    if target.exists() or target.is_symlink():
        raise BadInput(f"DST is there already: {target}; remove it, or name another folder")
    if not 0 < args.shard_gb < math.inf:
        raise BadInput(f"--shard-gb is {args.shard_gb:g}; allowed: finite numbers above 0")
    source = local_folder(args.source, "SRC")
    conversion, pieces = prepare(source, args.vision_tower)
    try:
        write(conversion, pieces, source, target, int(args.shard_gb * 1e9), args.source)
    except KeyboardInterrupt:
        print(f"yopo: stopped; the same command goes on from {partial_of(target)}", file=sys.stderr)
        return INTERRUPTED
    print(
        f"{target}: {conversion.kind} as {conversion.model_class.__name__}, {len(pieces)} tensors"
    )
    plan = conversion.plan.summary() if conversion.plan else "none in this checkpoint"
    print(f"plan: {plan}")
    for note in conversion.notes:
        print(f"note: {note}")
    return 0

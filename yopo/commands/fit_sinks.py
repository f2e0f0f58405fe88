"""`python -m yopo sinks CHECKPOINT --data FILE [--out DIR]`: sinks for a pruned checkpoint, from
questions about images. Arguments, files and words; nothing is computed here.

Without --out they go into CHECKPOINT itself, its config.json and a file beside it; its weights are
not touched.
"""

from __future__ import annotations

import argparse
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from yopo.errors import BadInput

if TYPE_CHECKING:
    from yopo.calibration.sink_fit import SinkFit

SAMPLES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("checkpoint", help="folder of a pruned checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="questions, as JSON lines")
    parser.add_argument("--out", type=Path, help="folder to make (default: into CHECKPOINT)")
    parser.add_argument("--image-folder", type=Path, help="of relative paths (default: --data's)")
    parser.add_argument("--samples", type=int, default=SAMPLES, help="questions taken (100)")
    parser.add_argument(
        "--target",
        choices=("exact", "dense"),
        default="exact",
        help="whose visual mass sinks stand for: the plan's own under exact mass (the default; for "
        "weights fine-tuned so), or the dense model's (for weights that never were)",
    )
    parser.add_argument(
        "--tune", type=int, metavar="STEPS", help="then move them by gradient descent"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.set_defaults(command=fit)


def fit(args: argparse.Namespace) -> int:
    """Writes the sinks. Raises BadInput before any heavy work where something is wrong."""
    from safetensors import SafetensorError

    try:
        _check(args)
        _write(args, _fitted(args))
        return 0
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise BadInput(str(error)) from error


def _check(args: argparse.Namespace) -> None:
    from yopo.checkpoint.shards import read_json
    from yopo.commands.input_checks import check_model, check_new_folder
    from yopo.commands.setting_options import refuse_less
    from yopo.plan import sinks
    from yopo.plan.pruning_plan import PruningPlan
    from yopo.prompts.loading import kind_of

    folder, out = Path(args.checkpoint), args.out
    if not folder.is_dir():
        raise BadInput(f"there is no folder {args.checkpoint!r} (from {Path.cwd()})")
    refuse_less(args, samples=1, tune=1)
    if out is not None:
        check_new_folder(out)
        check_new_folder(_partial(out))
    elif not os.access(folder, os.W_OK):
        raise BadInput(f"{folder} is not yours to write to: name a folder to make (--out)")
    check_model(args.checkpoint, "checkpoint")
    if out is not None and kind_of(folder) == "llava" and "llava" not in out.name.lower():
        raise BadInput(f"--out: LLaVA loads only folders with 'llava' in the name: {out}")
    config = read_json(folder / "config.json") | {"_name_or_path": str(folder)}
    with sinks.unread():
        if PruningPlan.found_in(config) is None:
            raise BadInput(
                f"{folder} has no plan, so no head is blind: make one of it first (python -m yopo "
                f"calibrate {folder} --data {args.data} --out DIR), which fits sinks, too"
            )


def _fitted(args: argparse.Namespace) -> SinkFit:
    from yopo.commands.input_checks import device_of, told_questions

    device = device_of(args.device)
    questions = told_questions(args.data, args.samples, args.image_folder)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from yopo.calibration.sink_fit import fit_sinks
    from yopo.plan import sinks
    from yopo.prompts.loading import load
    from yopo.prompts.questions import Samples

    os.environ.pop("YOPO_MASS", None)  # sinks are fitted to the plan as the checkpoint has it
    with sinks.unread():  # those there now may be the ones to be replaced
        loaded = load(args.checkpoint, device)
    samples = Samples(questions, loaded)
    return fit_sinks(loaded.model, samples, target=args.target, tune=args.tune, progress=True)


def _write(args: argparse.Namespace, fit: SinkFit) -> None:
    from yopo.checkpoint import pruned_folder

    source, out = Path(args.checkpoint), args.out
    print(fit)
    if out is None:
        pruned_folder.put_plan(source, fit.plan)
    else:
        try:
            pruned_folder.write(source, _partial(out), fit.plan, None)
            _partial(out).rename(out)
        except BaseException:
            shutil.rmtree(_partial(out), ignore_errors=True)  # _check saw that it was not there
            raise
    print(f"written: {out or source}")


def _partial(out: Path) -> Path:
    """The folder that becomes `out`."""
    return out.with_name(f"{out.name}.partial")

"""`python -m yopo calibrate MODEL --data FILE --out DIR`: a pruned checkpoint of a model, from
questions about images. Arguments, files and words; nothing is computed here.

Under `accelerate launch` with several processes these share the samples, and the plan is the same.

DIR is made under the name DIR.partial, and renamed when all is in it. Statistics and the plans
that a search tries are kept there from the start: the same command goes on from where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yopo.calibration.config import RULES, CalibrationConfig, config_of
from yopo.calibration.results_folder import STATISTICS, TRIALS, is_ours, write
from yopo.commands import INTERRUPTED
from yopo.errors import BadInput, CannotGoOn

if TYPE_CHECKING:
    from yopo.prompts.questions import Question

SAMPLES = 100  # for statistics: over so many the released rule votes
_BY_HAND = ("alpha", "keep", "layer_cut", "ffn_ratio", "window")  # where there is no budget


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="folder of a checkpoint: original LLaVA's, or transformers'")
    parser.add_argument("--data", type=Path, help="questions, as JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--image-folder", type=Path, help="of relative paths (default: --data's)")
    parser.add_argument(
        "--samples",
        type=int,
        help="questions taken (100; with --budget 200, every second one held out)",
    )
    parser.add_argument(
        "--statistics", type=Path, help="of an earlier run, in place of taking them"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    plan = parser.add_argument_group("the plan, by a rule for heads")
    plan.add_argument("--rule", choices=RULES, default=RULES[0], help=f"({RULES[0]})")
    plan.add_argument("--alpha", type=float, help="a head stays if it looks at the image more")
    plan.add_argument("--keep", type=float, help="the alpha that keeps this share of heads (0.5)")
    plan.add_argument(
        "--layer-cut", type=int, help="heads are blind from here on (half the layers)"
    )
    plan.add_argument("--ffn-ratio", type=float, help="visual tokens use 1/r of the neurons (2)")
    plan.add_argument("--window", type=int, help="neighbours that visual tokens see (5); 0: all")
    search = parser.add_argument_group("or the best one found for a budget")
    search.add_argument("--budget", type=float, help="share of the visual FLOPs, such as 0.25")
    search.add_argument("--evaluations", type=int, default=100, help="most plans tried (100)")
    both = parser.add_argument_group("with either")
    both.add_argument("--mass", default="sink", metavar="HEAD[/CUT]", help="(sink)")
    both.add_argument(
        "--tune", type=int, metavar="STEPS", help="move the sinks fitted by gradient descent, too"
    )
    both.add_argument(
        "--first-neurons", action="store_true", help="leave FFN neurons in the order they have"
    )
    parser.set_defaults(command=calibrate)


def calibrate(args: argparse.Namespace) -> int:
    """Makes args.out. Raises BadInput before any heavy work where something is wrong."""
    from safetensors import SafetensorError

    partial = _partial(args)
    try:
        config = _config(args)
        _check_out(args)
        _calibrate(args, config)
        return 0
    except CannotGoOn as error:
        raise BadInput(f"{error}; remove {partial} to start anew") from error
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise BadInput(str(error)) from error
    except KeyboardInterrupt:
        begun = (partial / STATISTICS).exists()
        goes_on = f"the same command goes on from {partial}" if begun else "nothing is kept"
        print(f"yopo: stopped; {goes_on}", file=sys.stderr)
        return INTERRUPTED


def _calibrate(args: argparse.Namespace, config: CalibrationConfig) -> None:
    from yopo.commands.input_checks import check_model, device_of
    from yopo.prompts.loading import kind_of, load
    from yopo.prompts.questions import Samples

    if kind_of(args.model) == "llava":
        check_model(args.model, "model")
        if "llava" not in args.out.name.lower():
            raise BadInput(f"--out: LLaVA loads only folders with 'llava' in the name: {args.out}")
    questions, together = _questions(args, config), _joined(args.device)
    device = device_of(args.device)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from yopo.calibration.calibrate import calibrate
    from yopo.calibration.sample_split import split
    from yopo.calibration.sample_statistics import Statistics

    if config.holds_out:
        split(questions)  # too few are refused before the model is loaded
    known = None if args.statistics is None else Statistics.load(args.statistics)
    loaded, partial = load(args.model, device), _partial(args)
    calibration = calibrate(
        loaded.model,
        Samples(questions, loaded),
        config,
        statistics=known,
        statistics_path=partial / STATISTICS if known is None else None,
        search_path=partial / TRIALS,
        progress=True,
        tell=print,
        distributed=together is not None,
    )
    if together is None or together.is_main_process:
        write(calibration, Path(args.model), partial)
        partial.rename(args.out)
        print(f"written: {args.out}")
    if together is not None:
        together.wait_for_everyone()


def _joined(device: str) -> Any:
    """accelerate's state of the processes that this is one of, joined; None: it is alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2:
        return None
    from accelerate import PartialState

    return PartialState(cpu=device == "cpu")


def _questions(args: argparse.Namespace, config: CalibrationConfig) -> list[Question]:
    from yopo.commands.input_checks import told_questions

    if args.data is None:
        return []
    wanted = args.samples or SAMPLES * (2 if config.holds_out else 1)
    return told_questions(args.data, wanted, args.image_folder)


def _config(args: argparse.Namespace) -> CalibrationConfig:
    """What is asked for. Raises BadInput or ValueError, in the words of the command's options."""
    if args.data is None and (args.statistics is None or args.budget is not None):
        raise BadInput("--data is missing: questions about images, one JSON object a line")
    settings = {name: getattr(args, name) for name in _BY_HAND if getattr(args, name) is not None}
    if args.window == 0:
        settings["window"] = None
    if args.budget is not None:
        settings |= {"budget": args.budget, "evaluations": args.evaluations}
    else:
        settings["rule"] = args.rule
    config = config_of(
        {
            **settings,
            "mass": args.mass,
            "tune_sinks": args.tune,
            "reorder_neurons": not args.first_neurons,
            "influence": True,
        },
        called=lambda name: "--tune" if name == "tune_sinks" else f"--{name.replace('_', '-')}",
    )
    if args.tune is not None and args.data is None:
        raise BadInput("--tune needs --data to tune by")
    for name in ("samples", "evaluations"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise BadInput(f"--{name} is {getattr(args, name)}; allowed: from 1")
    if args.budget is not None and importlib.util.find_spec("matplotlib") is None:
        raise BadInput("matplotlib is missing, which draws pareto.png: pip install matplotlib")
    return config


def _check_out(args: argparse.Namespace) -> None:
    """Raises BadInput where the folders named are not there, or are in the way."""
    from yopo.commands.input_checks import check_new_folder

    if not Path(args.model).is_dir():
        raise BadInput(f"there is no folder {args.model!r} (from {Path.cwd()}); download it first")
    check_new_folder(args.out)
    partial = _partial(args)
    if partial.exists() and not partial.is_dir():
        raise BadInput(f"--out: {partial} is in the way, a file: remove it, or take another name")
    inside = sorted(partial.iterdir()) if partial.exists() else []
    foreign = [path for path in inside if not is_ours(Path(args.model), path)]
    if foreign:
        raise BadInput(
            f"--out: {foreign[0]} is none of this command's files, which makes {partial} anew: "
            "move it away, or take another name"
        )


def _partial(args: argparse.Namespace) -> Path:
    """The folder that becomes args.out."""
    return args.out.with_name(f"{args.out.name}.partial")

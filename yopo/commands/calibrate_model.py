"""`python -m yopo calibrate MODEL --data FILE --out DIR`: a pruned checkpoint of a model, from
questions about images. Arguments, files and words; nothing is computed here.

DIR is made under the name DIR.partial, and renamed when all is in it. Statistics are kept there
from the start: the same command goes on from where it was stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any

from yopo.commands.command_line import INTERRUPTED
from yopo.errors import BadInput

RULES = ("released",)  # calibration.RULES, which takes seconds to import
STATISTICS = "statistics.safetensors"
MOST_NAMED = 10  # of the entries passed over
SAMPLES = 100  # for statistics: over so many the released rule votes
JUDGING = 3  # of the questions held out every third judges the plan and chooses nothing
SHOWN = 25  # questions that show what a plan by a rule changes, for which none are held out
_CHOSEN = ("layer_cut", "ffn_ratio", "window")  # by hand, where there is no budget


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("model", help="folder of a checkpoint: original LLaVA's, or transformers'")
    parser.add_argument("--data", type=Path, help="questions, as JSON lines")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--image-folder", type=Path, help="of relative paths (default: --data's)")
    parser.add_argument(
        "--samples",
        type=int,
        help="questions taken (100; with --budget or --fit-mass 200, every second one held out)",
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
    search.add_argument("--evaluations", type=int, default=40, help="most plans tried (40)")
    both = parser.add_argument_group("with either")
    both.add_argument("--mass", default="calibrated", metavar="HEAD[/CUT]", help="(calibrated)")
    both.add_argument(
        "--fit-mass", type=int, metavar="STEPS", help="fit the calibrated constants to the plan"
    )
    both.add_argument(
        "--first-neurons", action="store_true", help="leave FFN neurons in the order they have"
    )
    parser.set_defaults(command=calibrate)


def calibrate(args: argparse.Namespace) -> int:
    """Makes args.out. Raises BadInput before any heavy work where something is wrong."""
    from safetensors import SafetensorError

    try:
        return _calibrate(args)
    except (ValueError, TypeError, OSError, SafetensorError) as error:
        raise BadInput(str(error)) from error
    except KeyboardInterrupt:
        begun = (_partial(args) / STATISTICS).exists()
        goes_on = f"the same command goes on from {_partial(args)}" if begun else "nothing is kept"
        print(f"yopo: stopped; {goes_on}", file=sys.stderr)
        return INTERRUPTED


def _calibrate(args: argparse.Namespace) -> int:
    _check(args)
    from yopo.commands.infer import check_model, device_of
    from yopo.prompts.loading import kind_of, load
    from yopo.prompts.questions import Samples, read_questions

    if kind_of(args.model) == "llava":
        check_model(args.model)
        if "llava" not in args.out.name.lower():
            raise BadInput(f"--out: LLaVA loads only folders with 'llava' in the name: {args.out}")
    device, questions = device_of(args.device), []
    if args.data is not None:
        wanted = args.samples or SAMPLES * (2 if _holds_out(args) else 1)
        questions, passed_over = read_questions(args.data, wanted, args.image_folder)
        for line in passed_over[:MOST_NAMED]:
            print(f"passed over: {line}", file=sys.stderr)
        if len(passed_over) > MOST_NAMED:
            print(f"passed over: {len(passed_over) - MOST_NAMED} more", file=sys.stderr)
        print(f"{len(questions)} questions, {len(passed_over)} passed over")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from yopo.calibration.search import split

    if _holds_out(args):
        taken, held_out = split(questions)
        judging = held_out[JUDGING - 1 :: JUDGING]
        choosing = [q for i, q in enumerate(held_out) if i % JUDGING != JUDGING - 1]
        judges = f"held out, {'by which the plan was not chosen' if judging else 'which chose it'}"
    else:
        taken, choosing, judging = questions, [], questions[:SHOWN]
        judges = "of those that the statistics were taken of"
    loaded = load(args.model, device)
    parts = [Samples(some, loaded) for some in (taken, choosing, judging or choosing)]
    _make(args, loaded.model, *parts, judges)
    return 0


def _holds_out(args: argparse.Namespace) -> bool:
    """Whether a plan is chosen, or constants fitted, by the answers to questions held out."""
    return args.budget is not None or args.fit_mass is not None


def _check(args: argparse.Namespace) -> None:
    if args.data is None and (args.statistics is None or args.budget is not None):
        raise BadInput("--data is missing: questions about images, one JSON object a line")
    named = [name for name in ("alpha", "keep", *_CHOSEN) if getattr(args, name) is not None]
    if args.budget is not None and named:
        flag = named[0].replace("_", "-")
        raise BadInput(f"--{flag} and --budget are both given: a budget chooses the whole plan")
    if args.alpha is not None and args.keep is not None:
        raise BadInput("--alpha and --keep are both given: each decides how many heads are kept")
    if args.alpha is not None and not isfinite(args.alpha):
        raise BadInput(f"--alpha is {args.alpha}; allowed: finite numbers")
    if args.keep is not None and not 0 <= args.keep <= 1:
        raise BadInput(f"--keep is {args.keep:g}; allowed: a share of the heads, 0 to 1")
    if args.budget is not None and not 0 < args.budget <= 1:
        raise BadInput(f"--budget is {args.budget:g}; allowed: above 0, to 1 (all visual FLOPs)")
    if args.budget is not None and importlib.util.find_spec("matplotlib") is None:
        raise BadInput("matplotlib is missing, which draws pareto.png: pip install matplotlib")
    from yopo.plan.pruning_plan import split_masses

    try:
        masses = split_masses(args.mass, "--mass")
    except ValueError as error:
        raise BadInput(str(error)) from error
    if args.fit_mass is not None and (args.fit_mass < 1 or args.data is None):
        raise BadInput("--fit-mass takes a number of steps from 1, and --data to fit to")
    if args.fit_mass is not None and "calibrated" not in masses:
        raise BadInput(f"--fit-mass fits the constants of calibrated mass; --mass is {args.mass}")
    if args.samples is not None and args.samples < 1:
        raise BadInput(f"--samples is {args.samples}; allowed: from 1")
    if args.evaluations < 1:
        raise BadInput(f"--evaluations is {args.evaluations}; allowed: from 1")
    if not Path(args.model).is_dir():
        raise BadInput(f"there is no folder {args.model!r} (from {Path.cwd()}); download it first")
    if args.out.exists():
        raise BadInput(f"--out: {args.out} is there already: take another name, or remove it")
    above = next(folder for folder in args.out.absolute().parents if folder.exists())
    if not above.is_dir():
        raise BadInput(f"--out: {args.out} cannot be made: {above} is a file")
    partial = _partial(args)
    if partial.exists() and not partial.is_dir():
        raise BadInput(f"--out: {partial} is in the way, a file: remove it, or take another name")
    foreign = (
        [p for p in sorted(partial.iterdir()) if not _ours(args, p)] if partial.exists() else []
    )
    if foreign:
        raise BadInput(
            f"--out: {foreign[0]} is none of this command's files, which makes {partial} anew: "
            "move it away, or take another name"
        )


def _partial(args: argparse.Namespace) -> Path:
    """The folder that becomes args.out."""
    return args.out.with_name(f"{args.out.name}.partial")


def _ours(args: argparse.Namespace, path: Path) -> bool:
    """Whether this command may have written `path`, and so may delete it."""
    own = (f"{STATISTICS}*", "ffn_order.safetensors", "headmask_*.npy", "search.csv", "pareto.png")
    copied = (Path(args.model) / path.name).is_file()
    return path.is_file() and (copied or any(path.match(pattern) for pattern in own))


def _make(
    args: argparse.Namespace, model: Any, taken: Any, choosing: Any, judging: Any, judges: str
) -> None:
    """Takes statistics of the samples `taken`, makes the plan, searched or fitted by the answers to
    `choosing`, says what it changes for `judging` (in words: `judges`), writes the folder."""
    from yopo.calibration import neurons
    from yopo.calibration.budget import VisualCost
    from yopo.calibration.calibrate import plan_from
    from yopo.calibration.collect import collect
    from yopo.calibration.divergence import divergence, references
    from yopo.calibration.head_rule import solve_alpha
    from yopo.calibration.mass_fit import fit_text_mass
    from yopo.calibration.sample_statistics import Statistics
    from yopo.calibration.search import search
    from yopo.models.attach import ffn_order_of
    from yopo.models.trial import stack_of
    from yopo.plan.pruning_plan import PruningPlan

    partial = _partial(args)
    stack = stack_of(model)
    before = ffn_order_of(model)
    if before is not None and not args.first_neurons:
        raise BadInput(
            f"the FFN neurons of {args.model} are in another order already: calibrate the "
            "checkpoint that it was made of, or keep their order (--first-neurons)"
        )
    chosen = {name: getattr(args, name) for name in _CHOSEN if getattr(args, name) is not None}
    if args.window == 0:
        chosen["window"] = None
    replace(PruningPlan.dense(stack.config), **chosen).validate(stack.config)  # before hard work
    if args.statistics is not None:
        statistics = Statistics.load(args.statistics)
        statistics.check(model)
    else:
        begun = (partial / STATISTICS).exists()
        try:
            statistics = collect(model, taken, path=partial / STATISTICS, progress=True)
        except ValueError as error:
            remedy = f"; remove {partial} to start anew" if begun else ""
            raise BadInput(f"{error}{remedy}") from error
        if len(statistics) > len(taken):
            print(f"statistics of {len(statistics)} samples, as many as {partial} has already")
        print(_influence(statistics))
    original, order = statistics, None
    if not args.first_neurons:
        try:
            order, statistics = neurons.reorder(model, statistics)
        except TypeError as error:
            raise BadInput(f"{error}; or keep their order: --first-neurons") from error
    known = references(model, choosing)
    if args.budget is None:
        keep = 0.5 if args.keep is None else args.keep
        alpha = solve_alpha(statistics.ratios, keep) if args.alpha is None else args.alpha
        plan = plan_from(statistics, rule=args.rule, alpha=alpha, mass=args.mass, **chosen)
        print(f"alpha: {alpha:.4g}")
        found = None
    else:
        found = search(
            model,
            choosing,
            args.budget,
            statistics,
            mass=args.mass,
            evaluations=args.evaluations,
            known=known,
            progress=True,
        )
        plan = found.plan
    if args.fit_mass is not None:
        answers = references(model, taken)
        plan = fit_text_mass(model, plan, answers, known, args.fit_mass, progress=True)
    print(f"plan: {plan.summary()}")
    known = references(model, judging)
    if known:
        share = VisualCost(stack.config, (r.prompt for r in known)).share(plan)
        change = divergence(model, plan, known)
        print(
            f"visual FLOPs: {100 * share:.1f} % of the dense model's. {len(known)} questions "
            f"{judges}: {100 * change.same.double().mean():.1f} % answered as by the dense model, "
            f"KL {change.kl.mean():.3g} nats per token"
        )
        if len(known) < 20:
            print("note: so few questions tell little; give more (--samples)")
    plan = replace(plan, ffn_order=before if order is None else neurons.checksum(order))
    _write(args, partial, plan, order, original, found)
    print(f"written: {args.out}")


def _influence(statistics: Any) -> str:
    """In which layers the image still matters: where a layer cut costs little."""
    mean = statistics.influence.double().nanmean(0).tolist()
    layers = ", ".join(f"{layer}: {value:.2g}" for layer, value in enumerate(mean))
    return (
        "KL (nats) of the next token's distribution from the dense model's, if the visual tokens "
        f"leave at layer … {layers}"
    )


def _write(
    args: argparse.Namespace, partial: Path, plan: Any, order: Any, statistics: Any, found: Any
) -> None:
    """The folder, under its name when all is in it."""
    from yopo.calibration import search_report
    from yopo.checkpoint import pruned_folder as checkpoint_folder
    from yopo.plan import head_mask

    if partial.is_dir():  # what a run that was stopped had written may not belong to this plan
        for file in partial.iterdir():
            if file.name != STATISTICS and _ours(args, file):
                file.unlink()
    checkpoint_folder.write(Path(args.model), partial, plan, order)
    statistics.save(partial / STATISTICS)
    size = head_mask.SIZES.get(tuple(plan.head_keep.shape), "{}x{}".format(*plan.head_keep.shape))
    kept = round(float(plan.head_keep.sum()) / plan.num_layers)
    head_mask.save(partial / f"headmask_{size}_{kept}.npy", plan.head_keep)
    if found is not None:
        search_report.write_csv(partial / "search.csv", found)
        search_report.draw(partial / "pareto.png", found)
    partial.rename(args.out)

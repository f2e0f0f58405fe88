"""`python -m yopo infer`: one question about one image, answered by the model of a checkpoint, with
what the plan prunes before it and what the prefill took after it.

The original LLaVA's models answer through LLaVA's own command line (llava.serve.cli), transformers'
own through yopo.prompts. Nothing here computes for a model.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

from yopo.commands.input_checks import check_masses, check_model, device_of, local_image
from yopo.errors import BadInput

# Relative to the working directory, as the vision tower's path in the checkpoint is.
DEFAULT_MODEL = "examples/tiny_llava/checkpoints/tiny-llava-v1-pruned"
DEFAULT_IMAGE = "examples/tiny_llava/images/easy-vqa-test-0.png"
DEFAULT_QUESTION = "what color is the shape?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--model-path", default=DEFAULT_MODEL, help="folder or Hub id")
    parser.add_argument("--image-file", default=DEFAULT_IMAGE, help="path or http(s) address")
    parser.add_argument("--question", default=DEFAULT_QUESTION)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--mass", metavar="HEAD[/CUT]", help="exact, drop or sink")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.set_defaults(command=infer)


def infer(args: argparse.Namespace) -> int:
    """Answers args.question. Raises BadInput before any heavy work where something is wrong."""
    # transformers' advice, to LLaVA's code as to others', would break up the answer.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)
    check_model(args.model_path, "--model-path")
    if args.mass is not None:
        check_masses(args.mass)
    if args.max_new_tokens < 1:
        raise BadInput(f"--max-new-tokens is {args.max_new_tokens}; allowed: from 1")
    with TemporaryDirectory() as folder:
        image = local_image(args.image_file, Path(folder))
        device = device_of(args.device)
        from yopo.prompts.loading import kind_of

        answer = _ask_llava if kind_of(args.model_path) == "llava" else _ask_transformers
        meter = answer(args, image, device)
    print(meter.report())
    return 0


def _told_plan(model: Any, mass: str | None) -> None:
    """Says what the plan of `model` prunes, with the masses of --mass."""
    from yopo import apply, plan_of

    plan = plan_of(model)
    if mass is not None:
        if plan is None:
            raise BadInput(
                f"--mass is {mass!r}, but there is no plan in this checkpoint: leave it out"
            )
        try:
            plan = plan.with_mass(mass, name="--mass")
        except ValueError as error:
            raise BadInput(str(error)) from error
        apply(model, plan)
    print(f"plan: {plan.summary() if plan else 'none in this checkpoint: nothing is pruned.'}")


# ------------------------------------------------------------------------ transformers' own models


def _ask_transformers(args: argparse.Namespace, image: Path, device: str) -> Any:
    """Prints the question and the answer as LLaVA's command line does; returns the meter."""
    from yopo.bench.prefill_meter import PrefillMeter
    from yopo.prompts import load
    from yopo.prompts.questions import Question

    prompter = load(args.model_path, device)
    _told_plan(prompter.model, args.mass)
    config = prompter.model.config
    placeholder = getattr(config, "image_token_id", None)
    if placeholder is None:  # up to 4.51
        placeholder = getattr(config, "image_token_index", None)
    meter = PrefillMeter(prompter.model, placeholder)
    print(f"USER: {args.question}", flush=True)
    answer = prompter.answer(Question(image, args.question, None), args.max_new_tokens)
    print(f"ASSISTANT: {answer}")
    return meter


# -------------------------------------------------------------------------------- original LLaVA's


def _ask_llava(args: argparse.Namespace, image: Path, device: str) -> Any:
    """Has LLaVA's command line print question and answer; returns the meter."""
    llava_cli = _llava_cli()
    name = Path(args.model_path).name
    given = argparse.Namespace(
        model_path=args.model_path,
        model_base=None,
        image_file=str(image),
        device=device,
        # LLaVA goes by "v1" in the name, which the released llava-1.5-… do not have.
        conv_mode="llava_v1" if re.search("llava-1.5|v1", name, re.IGNORECASE) else None,
        temperature=0,
        max_new_tokens=args.max_new_tokens,
        load_8bit=False,
        load_4bit=False,
        debug=False,
    )
    with _put_in(llava_cli, args) as meters:
        llava_cli.main(given)
    return meters[0]


def _llava_cli() -> ModuleType:
    try:
        import_module("yopo.patch")
        return import_module("llava.serve.cli")
    except ImportError as error:
        raise BadInput(
            f"{error}. LLaVA itself is missing or lacks something: pip install --no-deps "
            "llava-torch==1.2.2.post1, and pillow sentencepiece requests protobuf with it"
            if "llava" in str(error).lower() and "imported before" not in str(error)
            else str(error)
        ) from error


@contextmanager
def _put_in(llava_cli: ModuleType, args: argparse.Namespace) -> Iterator[list[Any]]:
    """Puts args.question where LLaVA's command line reads the user's, and a meter on its model,
    which the list yielded gets."""
    from safetensors import SafetensorError

    load = llava_cli.load_pretrained_model
    questions, meters = [args.question], []

    def load_and_tell(*load_args: Any, **load_kwargs: Any) -> Any:
        from llava.constants import IMAGE_TOKEN_INDEX

        from yopo.bench.prefill_meter import PrefillMeter

        try:
            loaded = load(*load_args, **load_kwargs)
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            raise BadInput(f"cannot load {args.model_path}: {error}") from error
        _told_plan(loaded[1], args.mass)
        meters.append(PrefillMeter(loaded[1], IMAGE_TOKEN_INDEX))
        return loaded

    def ask(prompt: str) -> str:
        question = questions.pop(0) if questions else ""
        print(f"{prompt}{question}")
        return question

    llava_cli.load_pretrained_model = load_and_tell
    llava_cli.input = ask  # found before the builtin
    try:
        yield meters
    finally:
        llava_cli.load_pretrained_model = load
        del llava_cli.input

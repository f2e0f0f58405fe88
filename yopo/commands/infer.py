"""`python -m yopo infer`: one question about one image, answered by LLaVA's own command line
(llava.serve.cli), with what the plan prunes before it and what the prefill took after it.

Holds the command and its checks of what the user gave; nothing here computes for a model.
"""

from __future__ import annotations

import argparse
import os
import re
import time
import zipfile
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from yopo.errors import BadInput

# Relative to the working directory, as the vision tower's path in the checkpoint is.
DEFAULT_MODEL = "examples/tiny_llava/checkpoints/tiny-llava-v1-pruned"
DEFAULT_IMAGE = "examples/tiny_llava/images/easy-vqa-test-0.png"
DEFAULT_QUESTION = "what color is the shape?"

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument("--model-path", default=DEFAULT_MODEL, help="folder or Hub id")
    parser.add_argument("--image-file", default=DEFAULT_IMAGE, help="path or http(s) address")
    parser.add_argument("--question", default=DEFAULT_QUESTION)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--mass", metavar="HEAD[/CUT]", help="exact, drop or calibrated")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.set_defaults(command=infer)


def infer(args: argparse.Namespace) -> int:
    """Answers args.question. Raises BadInput before any heavy work where something is wrong."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its advice would break up the answer
    check_model(args.model_path)
    check_image(args.image_file)
    if args.mass:
        os.environ["YOPO_MASS"] = args.mass  # PruningPlan.from_config obeys it and checks it
    llava_cli = _llava_cli()
    device = device_of(args.device)
    meter = _Meter()
    _ask_through(llava_cli, args, meter)
    name = Path(args.model_path).name
    llava_cli.main(
        argparse.Namespace(
            model_path=args.model_path,
            model_base=None,
            image_file=args.image_file,
            device=device,
            # LLaVA goes by "v1" in the name, which the released llava-1.5-… do not have.
            conv_mode="llava_v1" if re.search("llava-1.5|v1", name, re.IGNORECASE) else None,
            temperature=0,
            max_new_tokens=args.max_new_tokens,
            load_8bit=False,
            load_4bit=False,
            debug=False,
        )
    )
    print(meter.report())
    return 0


def check_model(path: str) -> None:
    """Raises BadInput where a checkpoint folder is missing, cut off, or not one LLaVA can load."""
    folder = Path(path)
    if not folder.is_dir():
        if _HUB_ID.fullmatch(path) and not Path(path).parent.exists():
            return  # from_pretrained downloads it
        raise BadInput(f"--model-path: there is no folder {path!r} (from {Path.cwd()})")
    # LLaVA's loader chooses by the name; get_model_name_from_path knows Trainer's subfolders.
    name = folder.name if not folder.name.startswith("checkpoint-") else folder.parent.name
    if "llava" not in name.lower():
        raise BadInput(f"--model-path: LLaVA loads only folders with 'llava' in their name: {path}")
    from yopo.checkpoint.shards import read_json, weight_files

    config = read_json(folder / "config.json")
    if not any((folder / file).is_file() for file in ("tokenizer.model", "tokenizer.json")):
        raise BadInput(f"{path} is cut off: it has neither tokenizer.model nor tokenizer.json")
    for file in weight_files(folder):
        _check_weights(file)
    tower = str(config.get("mm_vision_tower", ""))
    hub_tower = tower.startswith(("openai", "laion")) or "ShareGPT4V" in tower  # LLaVA's rule
    if not (hub_tower or Path(tower).exists()):
        raise BadInput(
            f"the vision tower {tower!r} that {path}/config.json names in mm_vision_tower is not "
            f"there (from {Path.cwd()}): run from the folder that it is relative to"
        )


def check_image(path: str) -> None:
    """Raises BadInput unless `path` is an image PIL can read; addresses are left to LLaVA."""
    if path.startswith(("http://", "https://")):
        return
    if not Path(path).is_file():
        raise BadInput(f"--image-file: there is no file {path!r} (from {Path.cwd()})")
    try:
        from PIL import Image
    except ImportError as error:
        raise BadInput("Pillow is missing, which reads images: pip install pillow") from error
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(f"--image-file: {path!r} is not an image PIL can read: {error}") from error


def _check_weights(file: Path) -> None:
    """Without reading the tensors."""
    if file.suffix == ".safetensors":
        from yopo.checkpoint.shards import Shard

        with Shard(file):
            return
    with file.open("rb") as stream:
        start = stream.read(2)
    if not start or (start == b"PK" and not zipfile.is_zipfile(file)):
        raise BadInput(f"{file} is cut off: download it again")


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


def device_of(wanted: str) -> str:
    """ "cpu" or "cuda", of "auto" and these."""
    import torch

    there = torch.cuda.is_available()
    if wanted == "cuda" and not there:
        raise BadInput("--device cuda: torch sees no GPU here; use --device cpu")
    return "cuda" if wanted == "cuda" or (wanted == "auto" and there) else "cpu"


def _ask_through(llava_cli: ModuleType, args: argparse.Namespace, meter: _Meter) -> None:
    """Puts args.question where LLaVA's command line reads the user's, and watches its model."""
    load = llava_cli.load_pretrained_model
    questions = [args.question]

    def load_and_tell(*load_args: Any, **load_kwargs: Any) -> Any:
        from yopo import plan_of

        try:
            loaded = load(*load_args, **load_kwargs)
        except (OSError, ValueError) as error:
            raise BadInput(f"cannot load {args.model_path}: {error}") from error
        plan = plan_of(loaded[1])
        print(f"plan: {plan.summary() if plan else 'none in this checkpoint: nothing is pruned.'}")
        meter.watch(loaded[1])
        return loaded

    def ask(prompt: str) -> str:
        question = questions.pop(0) if questions else ""
        print(f"{prompt}{question}")
        return question

    llava_cli.load_pretrained_model = load_and_tell
    llava_cli.input = ask  # found before the builtin


class _Meter:
    """Counts tokens and takes the time of a model's first forward, the prefill, and of the rest."""

    def __init__(self) -> None:
        self.tokens = self.visual = self._text = 0
        self.seconds: list[float] = []
        self._started = 0.0

    def watch(self, model: Any) -> None:
        """Hooks into `model`, a LLaVA model with generate(input_ids, …)."""
        from llava.constants import IMAGE_TOKEN_INDEX

        generate = model.generate

        def counting(input_ids: Any, **kwargs: Any) -> Any:
            self._text = int((input_ids != IMAGE_TOKEN_INDEX).sum())
            return generate(input_ids, **kwargs)

        model.generate = counting
        model.register_forward_pre_hook(self._start, with_kwargs=True)
        model.register_forward_hook(self._stop)

    def report(self) -> str:
        """One line on what the prefill took; the tokens after it, too."""
        if not self.seconds:
            return "prefill: none was run"
        first, *rest = self.seconds
        line = (
            f"prefill: {self.tokens} tokens ({self.visual} visual, {self.tokens - self.visual} "
            f"text) in {first:.3f} s"
        )
        if rest:
            line += f"; {len(rest)} further tokens in {1000 * sum(rest) / len(rest):.1f} ms each"
        return line

    def _start(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.seconds:
            from yopo.models.told import CALL

            embeds, known = kwargs.get("inputs_embeds"), CALL.get()
            self.tokens = embeds.shape[1] if embeds is not None else self._text
            layout = known.layout if known is not None else None
            # Without a plan nobody asks for the layout: what is not the prompt's is the image's.
            self.visual = int(layout.visual.sum()) if layout else self.tokens - self._text
        _settle(model)
        self._started = time.perf_counter()

    def _stop(self, model: Any, args: Any, output: Any) -> None:
        _settle(model)
        self.seconds.append(time.perf_counter() - self._started)


def _settle(model: Any) -> None:
    """Waits for a GPU, so that times are those of the work and not of its queueing."""
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize(model.device)

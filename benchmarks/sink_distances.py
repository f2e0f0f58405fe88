"""How well sinks hold far from the image and behind several images, on the embedded checkpoint.

    python benchmarks/sink_distances.py  # writes sink_distances.csv and .png beside it
    python benchmarks/sink_distances.py --questions 1000 --places 0:1 --out FILE.csv

Test questions about test pictures, of which sinks were fitted to none, at each place TEXT:IMAGES:
so many text tokens between image and question, so many images. Between them stand other questions
and answers of the training split, as in one long conversation, cut off in front; further images
are other test pictures. Measured against exact mass: the mean error of m, the share of the softmax
that stays on text, in blind heads over the last rows, and the KL of the answer's tokens.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for yopo where it is not installed
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "tiny_llava"))

import yopo.patch  # noqa: I001  first, so that LLaVA builds its models on yopo's classes

import easy_vqa
import torch
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import get_model_name_from_path, process_images
from llava.model.builder import load_pretrained_model
from PIL import Image
from text import Prompts
from torch import Tensor

from yopo.calibration.collect import fit_weight
from yopo.calibration.divergence import Reference, divergence, references
from yopo.calibration.sink_fit import Look, blind_heads, looks
from yopo.engine import forward as engine
from yopo.plan.pruning_plan import PruningPlan
from yopo.plan.sinks import Sinks

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINT = "examples/tiny_llava/checkpoints/tiny-llava-v1-pruned"
LAST = 14  # rows of text that the error of m is taken over: the end of the question, the answer
CONSTANTS = 100  # training questions that `a` alone is fitted to


class Place(NamedTuple):
    text: int
    images: int


PLACES = [Place(d, 1) for d in (0, 10, 100, 1000, 4000)]
PLACES += [Place(0, n) for n in (2, 4, 8)] + [Place(4000, 8)]


@dataclass
class Asked:
    """Questions of a split of easy-VQA as samples of the embedded model."""

    model: Any
    prompts: Prompts
    processor: Any
    turns: list[tuple[str, str, int]]  # question, answer, image
    paths: dict[int, str]

    @classmethod
    def load(cls, loaded: tuple[Any, Prompts, Any], split: str) -> Asked:
        of = {"train": easy_vqa.get_train_questions, "test": easy_vqa.get_test_questions}[split]
        paths = {"train": easy_vqa.get_train_image_paths, "test": easy_vqa.get_test_image_paths}
        return cls(*loaded, list(zip(*of(), strict=True)), paths[split]())

    def chosen(self, count: int) -> list[int]:
        """So many of the questions, at random but always the same: of the training split the ones
        that questions.py gives."""
        return random.Random(0).sample(range(len(self.turns)), count)

    def pixels(self, image: int) -> Tensor:
        picture = Image.open(self.paths[image]).convert("RGB")
        return process_images([picture], self.processor, self.model.config).float()

    def sample(self, number: int, place: Place, filler: list[int]) -> dict[str, Any]:
        question, answer, image = self.turns[number]
        others = sorted(self.paths.keys() - {image})
        shown = [image, *random.Random(number).sample(others, place.images - 1)]
        between = filler[len(filler) - place.text :]
        asked = self.prompts.question(question, "yes" if between else "")
        ids = [*self.prompts.system, *[IMAGE_TOKEN_INDEX] * place.images, *between, *asked]
        return {
            "input_ids": torch.tensor([ids]),
            "images": torch.cat([self.pixels(one) for one in shown]),
            "answer_ids": torch.tensor([self.prompts.answer(answer)]),
        }

    def conversation(self, tokens: int) -> list[int]:
        """At least so many tokens of questions and answers."""
        ids: list[int] = []
        for number in self.chosen(tokens // 10 + 1):  # a turn has more than ten
            question, answer, _ = self.turns[number]
            ids += self.prompts.question(question, "yes" if ids else "")
            ids += self.prompts.answer(answer)
        return ids


@contextmanager
def observed(layers: int, found: list[tuple[int, Look]], last: int | None) -> Iterator[None]:
    """`found` gets what the text queries of the passes within make of the image, and the layer."""
    passed = 0

    def observe(call: Any, still: Tensor, q: Tensor, visual_q: Tensor, stores: Any) -> None:
        nonlocal passed
        found.extend((passed % layers, look) for look in looks(call, still, q, stores, last))
        passed += 1

    token = engine.OBSERVER.set(observe)
    try:
        yield
    finally:
        engine.OBSERVER.reset(token)


def constants(plan: PruningPlan, seen: list[tuple[int, Look]], tokens: int) -> Sinks:
    """`a` alone, weighted as `fit_sinks` weights it."""
    sums = torch.zeros(2, *plan.head_keep.shape, dtype=torch.float64)
    for layer, look in seen:
        weight = fit_weight(look.sums)
        logits = look.sums[0] - (look.before / tokens).log()
        sums[0, layer].index_add_(0, look.heads, (weight * logits).sum(1))
        sums[1, layer].index_add_(0, look.heads, weight.sum(1))
    return Sinks((sums[0] / sums[1]).float(), None, tokens)


def error_of_m(plan: PruningPlan, seen: list[tuple[int, Look]], sinks: Sinks | None) -> float:
    """Mean |m of the sinks − m of exact mass| over blind heads and rows; None: drop, m = 1."""
    blind, errors = blind_heads(plan), []
    for layer, look in seen:
        exact = torch.sigmoid(look.sums[1] - look.sums[0])
        drawn = torch.ones_like(exact)
        if sinks is not None:
            logits = sinks.a[layer, look.heads][:, None] + (look.before / sinks.tokens).log()
            if sinks.b is not None:
                logits = logits + (look.still @ sinks.b[layer, look.heads][..., None])[..., 0]
            drawn = torch.sigmoid(look.sums[1] - logits)
        errors.append((drawn - exact).abs()[blind[layer, look.heads]].flatten())
    return float(torch.cat(errors).mean())


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each place and predictor."""
    name = get_model_name_from_path(args.checkpoint)
    tokenizer, model, processor, _ = load_pretrained_model(
        args.checkpoint, None, name, device="cpu"
    )
    loaded = model.float(), Prompts(tokenizer), processor
    train, test = (Asked.load(loaded, split) for split in ("train", "test"))
    plan = yopo.plan_of(model)
    fitting = [train.sample(number, Place(0, 1), []) for number in train.chosen(CONSTANTS)]
    a_alone = constants(plan, exactly(model, plan, fitting, None)[1], plan.sinks.tokens)
    arms = {"drop": None, "a": a_alone, "a + b·q": plan.sinks}
    filler = train.conversation(max(place.text for place in args.places))
    for place in args.places:
        count = args.questions
        samples = [test.sample(number, place, filler) for number in test.chosen(count)]
        known, seen = exactly(model, plan, samples, LAST)
        right = [bool((one.log_probabilities.argmax(-1) == one.answer[0]).all()) for one in known]
        for arm, sinks in arms.items():
            of = plan.with_mass("drop") if sinks is None else replace(plan, sinks=sinks)
            change = divergence(model, of, known)
            yield {
                "text": place.text,
                "images": place.images,
                "predictor": arm,
                "questions": count,
                "error_of_m": round(error_of_m(plan, seen, sinks), 4),
                "kl": float(f"{change.kl.mean():.3g}"),
                "largest_kl": float(f"{change.kl.max():.3g}"),
                "same_answer_%": round(100 * float(change.same.double().mean()), 1),
                "exact_is_right_%": round(100 * sum(right) / count, 1),
            }


def exactly(
    model: Any, plan: PruningPlan, samples: list[dict[str, Any]], last: int | None
) -> tuple[list[Reference], list[tuple[int, Look]]]:
    """What the model answers under exact mass, and what its heads see."""
    seen: list[tuple[int, Look]] = []

    def watching(number: int) -> AbstractContextManager[None]:
        return observed(plan.num_layers, seen, last)

    return references(model, samples, 1, plan.with_mass("exact"), watching), seen


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Error of m and KL, against the distance and against the number of images."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(9, 6), sharey="row", sharex="col")
    for line, (value, label) in enumerate(
        [("error_of_m", "error of m"), ("kl", "KL from exact, nats a token")]
    ):
        for axis, along, held in (
            (axes[line][0], "text", "images"),
            (axes[line][1], "images", "text"),
        ):
            least = 1 if held == "images" else 0
            for arm in ("drop", "a", "a + b·q"):
                mine = [r for r in rows if r["predictor"] == arm and r[held] == least]
                mine.sort(key=lambda row: row[along])
                axis.plot(
                    [r[along] for r in mine], [max(r[value], 1e-6) for r in mine], "o-", label=arm
                )
            axis.grid(alpha=0.3)
        axes[line][0].set_ylabel(label)
    for axis in axes[1]:
        axis.set_yscale("log")
        axis.axhline(0.01, color="grey", lw=0.8, ls="--")
    axes[1][0].set_xscale("symlog", linthresh=10)
    axes[1][0].set_xlim(-1, 6000)
    axes[1][0].set_xlabel("text tokens between image and question (one image)")
    axes[1][1].set_xlabel("images (the question right behind them)")
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=CHECKPOINT)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--places", nargs="+", default=PLACES, metavar="TEXT:IMAGES",
                        type=lambda word: Place(*map(int, word.split(":"))))  # fmt: skip
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "sink_distances.csv")
    args = parser.parse_args()
    args.out = args.out.absolute()
    os.chdir(ROOT)  # the checkpoint names its vision tower relative to it
    rows = []
    with args.out.open("w", newline="", encoding="utf-8") as file:
        for row in measure(args):
            print(row, flush=True)
            if not rows:
                writer = csv.DictWriter(file, row, lineterminator="\n")
                writer.writeheader()
            writer.writerow(row)
            rows.append(row)
    draw(rows, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()

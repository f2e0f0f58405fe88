"""The whole study, one command: `python examples/quality/run.py`.

Trains the dense reader (unless its weights are here), prunes it in all ways of variants.py,
measures each on the whole test sets and writes results/: quality.csv, .json, .md and .png. Stages
are skipped when their result is in work/, long ones go on from where they were stopped. A variant
that fails is said at the end, and loses no other.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for yopo where it is not installed

import answers
import learn
import pictures
import plans
import rivals
import torch
import variants
from network import VISUAL, Reader, TowerClassifier
from report import write_report
from safetensors.torch import load_file, save_file
from torch import Tensor
from variants import Variant

from yopo import PruningPlan, apply
from yopo.calibration.divergence import Reference, references
from yopo.calibration.sink_fit import blind_heads
from yopo.files import write_whole

HERE = Path(__file__).resolve().parent
COMMITTED = HERE / "weights.safetensors"  # tower and dense reader as trained, float16
TRAIN_PICTURES, TEST_PICTURES = 8000, 1000  # of digits
EASY_COPIES = 1
LEAST = 100  # pictures of each kind in a trial
ASKED = 12  # questions in one, where the study has its SAMPLES and HELD_OUT
STEPS = {"tower": 600, "projector": 300, "dense": 1800, "tuned": 120}
BATCH, RATE, TUNED_RATE = 32, 1.5e-3, 5e-4


class Study:
    def __init__(self, work: Path, results: Path, share: float) -> None:
        self.work, self.results, self.share = work, results, share
        print(f"products in {learn.fast_products()}")
        # A trial's weights do not take the place of the study's.
        self.weights = COMMITTED if COMMITTED.exists() or share == 1 else work / COMMITTED.name
        for folder in (work, results):
            folder.mkdir(parents=True, exist_ok=True)
        steps = {stage: self.steps(stage) for stage in STEPS}
        self._refuse_other("course.json", {"steps": steps, "batch": BATCH, "rate": RATE})
        self.test = {
            "easy": self._some(pictures.easy_task("test")),
            "digits": self._some(pictures.digits_task("test", TEST_PICTURES)),
        }

    def _refuse_other(self, name: str, value: Any) -> None:
        """Stages are skipped by the name of their file: ends the program where those in the work
        folder were made otherwise."""
        path = self.work / name
        known = json.loads(path.read_text()) if path.exists() else value
        if known != value:
            sys.exit(f"{path} says {known}, this run is {value}: give another --work, or remove it")
        path.write_text(json.dumps(value))

    def steps(self, stage: str) -> int:
        return max(2, round(STEPS[stage] * self.share))

    def _some(self, task: pictures.Task) -> pictures.Task:
        """All of a task; in a trial its first pictures."""
        return task if self.share == 1 else task.first(round(len(task.pixels) * self.share) + LEAST)

    # -- training ------------------------------------------------------------------------------

    def train_weights(self) -> None:
        """Leaves `self.weights`: the tower learns to see, then the reader learns to answer."""
        torch.manual_seed(0)
        path = self.work / "tower.pt"
        tower = learn.train_tower(self._tasks, path, self.steps("tower"))
        for name, task in self.test.items() if not (self.work / "dense.partial").exists() else ():
            print(f"tower on {name}'s test patches: {learn.tower_accuracy(path, task)} %")
        del tower
        reader = Reader()
        reader.start_well()
        learn.align(reader, self.train_data, self.steps("projector"))
        steps, dense = self.steps("dense"), self.work / "dense.pt"
        learn.train_reader(
            reader,
            self.train_data,
            dense,
            steps,
            BATCH,
            RATE,
            seed=5,
            readings=0.3,
        )
        classifier = TowerClassifier()
        classifier.load_state_dict(torch.load(path, weights_only=True))
        tensors = {f"tower.{k}": v for k, v in classifier.tower.state_dict().items()}
        tensors |= {f"reader.{k}": v for k, v in reader.state_dict().items()}
        halves = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        save_file({k: v.contiguous() for k, v in halves.items()}, self.weights)

    @cached_property
    def _tasks(self) -> list[pictures.Task]:
        easy = pictures.easy_task("train", EASY_COPIES)
        return [self._some(easy), self._some(pictures.digits_task("train", TRAIN_PICTURES))]

    def _tower(self) -> torch.nn.Module:
        classifier = TowerClassifier()
        if self.weights.exists():
            stored = load_file(self.weights)
            part = {k[6:]: v.float() for k, v in stored.items() if k.startswith("tower.")}
            part = {k: v.long() if k.endswith("tracked") else v for k, v in part.items()}
            classifier.tower.load_state_dict(part)
        else:
            tensors = torch.load(self.work / "tower.pt", weights_only=True)
            classifier.load_state_dict(tensors)
            for parameter in classifier.tower.state_dict().values():
                if parameter.is_floating_point():
                    parameter.copy_(parameter.half())  # what the stored weights hold
        return classifier.tower.eval()

    @cached_property
    def train_data(self) -> list[tuple[pictures.Task, Tensor]]:
        """Both training tasks with their features."""
        tower = self._tower()
        return [
            (task, learn.features(tower, task, self.work / f"train-{name}.pt"))
            for name, task in zip(("easy", "digits"), self._tasks, strict=True)
        ]

    # -- the models compared -------------------------------------------------------------------

    def reader(self, order: Tensor | None = None) -> Reader:
        """The dense reader as stored; its FFN neurons in another order if given."""
        reader, stored = Reader(), load_file(self.weights)
        part = {k[7:]: v.float() for k, v in stored.items() if k.startswith("reader.")}
        reader.load_state_dict(part)
        if order is not None:
            plans.put(reader.llama, order)
        return reader.eval()

    def prepare(self) -> None:
        """Statistics of the dense reader, and test features."""
        self._refuse_other("weights.json", hashlib.sha256(self.weights.read_bytes()).hexdigest())
        tower = self._tower()
        self.features = {
            name: learn.features(tower, task, self.work / f"test-{name}.pt")
            for name, task in self.test.items()
        }
        self.statistics = plans.statistics(
            self.reader(), self.samples, self.work / "statistics.safetensors"
        )
        self.ranked = plans.ranked(self.statistics)

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        return self._questions(plans.SAMPLES, seed=8)

    @cached_property
    def held_out(self) -> list[Reference]:
        """What the dense reader answers to the questions that choose plans."""
        return references(self.reader().llama, self._questions(plans.HELD_OUT, seed=9))

    def _questions(self, count: int, seed: int) -> list[dict[str, Any]]:
        count = count if self.share == 1 else ASKED
        return plans.samples(self.reader(), self.train_data, count, seed)

    def plan(self, variant: Variant) -> PruningPlan | None:
        """Under drop where it has a mass. None: the variant has no plan."""
        if variant.rule in variants.RECIPES:
            return self._recipe(variant.rule, variant.budget)
        if variant.rule == "hand":
            return variants.plan_by_hand(variant.budget, self.statistics.ratios)
        return self._searched(variant.budget) if variant.rule == "search" else None

    def _recipe(self, rule: str, budget: int) -> PruningPlan | None:
        reader = self.reader()
        order = list(reversed(range(reader.config.num_hidden_layers)))
        if rule != "VTW":
            order = plans.ranking(reader, self.held_out, rule, self.work / f"order-{rule}.json")
        return variants.within(reader.config, rule, order, budget)

    def _searched(self, budget: int) -> PruningPlan:
        """Begins from what there is without a search, and from what was found for more FLOPs."""
        path = self.work / f"search-{budget}.json"
        if not path.exists():
            reader = self.reader()
            _, measured = plans.reorder(reader.llama, self.statistics)
            start = [self._recipe(rule, budget) for rule in variants.RECIPES]
            if budget in variants.BY_HAND:
                start.insert(0, variants.plan_by_hand(budget, self.statistics.ratios))
            if budget in variants.FURTHER:
                start.append(self._searched(variants.FURTHER[budget]))
            given = [plan for plan in start if plan is not None]
            plans.searched(reader, measured, self.held_out, budget, given, path)
        shutil.copy(path, self.results)
        return PruningPlan.load(path)

    def tune(self, reader: Reader, variant: Variant) -> None:
        """All fine-tunes are equal but for the plan and who teaches: steps, rate, and the questions
        drawn. Sinks stay as they were fitted to the dense weights."""
        path = self.work / "tuned" / f"{variant.name}.pt"
        path.parent.mkdir(exist_ok=True)
        learn.train_reader(
            reader,
            self.train_data,
            path,
            self.steps("tuned"),
            BATCH,
            TUNED_RATE,
            seed=99,
            teacher=self.reader() if variant.taught else None,
        )

    # -- measuring -----------------------------------------------------------------------------

    def measure(self, variant: Variant) -> None:
        """Leaves work/measured/NAME.json: which test questions are answered rightly."""
        path = self._measured(variant)
        if path.exists():
            return
        began, plan = time.time(), self.plan(variant)
        if plan is None:
            guess, facts = self._without_plan(variant)
        elif variant.mass in variants.MASSES[1:] and not blind_heads(plan).any():
            return self._copy(replace(variant, mass="drop"), variant)  # no mass goes anywhere
        else:
            guess, facts = self._under(plan, variant)
        right = self._right(guess)
        facts |= {"products": str(learn.fast_products()), "seconds": time.time() - began}
        self._write(variant, facts | {"right": right})
        got = ", ".join(f"{task} {answers.accuracy(r):.2f}" for task, r in right.items())
        at = f"at {facts['visual']:.1f} % ({facts['seconds']:.0f} s)"
        print(f"{variant.name}: {got} {at}", flush=True)

    def _under(self, plan: PruningPlan, variant: Variant) -> tuple[answers.Guess, dict[str, Any]]:
        reader = self.reader(self.ranked)
        if variant.mass == "sink":
            plan = plans.with_sinks(reader, plan, self.samples)
        elif variant.mass:
            plan = plan.with_mass(variant.mass)
        visual, total = variants.shares(reader.config, plan)
        apply(reader.llama, plan)
        if variant.tuned:
            self.tune(reader, variant)
        facts = {"plan": plan.summary(), "visual": visual, "total": total}
        return answers.guesses(reader.eval()), facts

    def _without_plan(self, variant: Variant) -> tuple[answers.Guess, dict[str, Any]]:
        reader, rule, layer, tokens = self.reader(), variant.rule, 0, VISUAL
        if rule in variants.RIVALS:
            layer, tokens = rivals.kept(reader.config, rule, variant.budget / 100)
        if rule == "downsampling":
            reader.grid = rivals.COARSE[variant.budget]
            tokens = math.prod(reader.grid)
        if variant.tuned:
            self.tune(reader, variant)
        reader.eval()
        choose = rivals.CHOICES.get(rule)
        guess = answers.guesses(reader)
        if choose is not None:
            guess = rivals.dropping(reader, layer, tokens, choose)
        least, dense = (rivals.visual_flops(reader.config, layer, n) for n in (tokens, VISUAL))
        told = f"{tokens} of {VISUAL} visual tokens from layer {layer} on"
        return guess, {"plan": told, "visual": 100 * least / dense}

    def _measured(self, variant: Variant) -> Path:
        return self.work / "measured" / f"{variant.name}.json"

    def _write(self, variant: Variant, facts: dict[str, Any]) -> None:
        with write_whole(self._measured(variant)) as partial:
            partial.write_text(json.dumps({**facts, "name": variant.name, **vars(variant)}))

    def _copy(self, known: Variant, variant: Variant) -> None:
        self.measure(known)
        self._write(variant, json.loads(self._measured(known).read_text()))
        print(f"{variant.name}: the same as {known.name}, nothing is blind")

    def _right(self, guess: answers.Guess) -> dict[str, list[list[bool]]]:
        """Each task in a thread of its own: operations are too small to share one among cores."""
        torch.set_num_threads(1)
        with ThreadPoolExecutor(initializer=torch.set_num_threads, initargs=(1,)) as pool:
            given = [(guess, self.test[task], self.features[task]) for task in self.test]
            found = pool.map(answers.right_answers, *zip(*given, strict=True))
            return dict(zip(self.test, found, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the stages (work; work-SHARE)")
    parser.add_argument(
        "--results", type=Path, help="what is reported (results; in a trial, in the work folder)"
    )
    parser.add_argument("--train-only", action="store_true", help="stop after the dense weights")
    parser.add_argument(
        "--share", type=float, default=1, help="of steps and pictures: 0.01 tries it out"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="NAME", help="variants of such names: '12-search-*'"
    )
    arguments = parser.parse_args()
    trial = arguments.share != 1
    work = arguments.work or HERE / (f"work-{arguments.share:g}" if trial else "work")
    results = arguments.results or (work / "results" if trial else HERE / "results")
    study = Study(work, results, arguments.share)
    if not study.weights.exists():
        study.train_weights()
    if arguments.train_only:
        return
    study.prepare()
    failed = []
    try:
        for variant in variants.all_variants():
            if not any(fnmatch(variant.name, name) for name in arguments.only or ("*",)):
                continue
            try:
                study.measure(variant)
            except Exception:
                traceback.print_exc()
                failed.append(variant.name)
    finally:
        write_report(work / "measured", results, study.test)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; why is said above, the others are in {results}")


if __name__ == "__main__":
    main()

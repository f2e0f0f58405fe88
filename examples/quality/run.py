"""The whole study, one command: `python examples/quality/run.py`.

Trains the dense reader (unless its weights are here), prunes it in all ways of variants.py,
measures each on the whole test sets and writes results/: quality.csv, .json, .md and .png. Stages
are skipped when their result is in work/, long ones go on from where they were stopped.
"""

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Callable
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

from yopo import apply

HERE = Path(__file__).resolve().parent
COMMITTED = HERE / "weights.safetensors"  # tower and dense reader as trained, float16
TRAIN_PICTURES, TEST_PICTURES = 8000, 1000  # of digits
EASY_COPIES = 1
STEPS = {"tower": 600, "dense": 1800, "tuned": 120}
BATCH, RATE, TUNED_RATE = 32, 1.5e-3, 5e-4


class Study:
    def __init__(self, work: Path, results: Path, share: float) -> None:
        self.work, self.results, self.share = work, results, share
        # A trial's weights do not take the place of the study's.
        self.weights = COMMITTED if COMMITTED.exists() or share == 1 else work / COMMITTED.name
        for folder in (work, results):
            folder.mkdir(parents=True, exist_ok=True)
        steps = {stage: self.steps(stage) for stage in STEPS}
        self._refuse_other("course.json", {"steps": steps, "batch": BATCH, "rate": RATE})
        self.test = {
            "easy": pictures.easy_task("test"),
            "digits": pictures.digits_task("test", TEST_PICTURES),
        }
        self._train: list[tuple[pictures.Task, Tensor]] | None = None

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

    # -- training ------------------------------------------------------------------------------

    def train_weights(self) -> None:
        """Leaves `self.weights`: the tower learns to see, then the reader learns to answer."""
        torch.manual_seed(0)
        path = self.work / "tower.pt"
        tower = learn.train_tower(self._tasks(), path, self.steps("tower"))
        for name, task in self.test.items() if not (self.work / "dense.partial").exists() else ():
            print(f"tower on {name}'s test patches: {learn.tower_accuracy(path, task)} %")
        del tower
        reader = Reader()
        reader.start_well()
        steps, dense = self.steps("dense"), self.work / "dense.pt"
        learn.train_reader(
            reader,
            self.train_data(),
            dense,
            steps,
            BATCH,
            RATE,
            seed=5,
            kinds=pictures.KINDS,
            readings=0.3,
        )
        classifier = TowerClassifier()
        classifier.load_state_dict(torch.load(path, weights_only=True))
        tensors = {f"tower.{k}": v for k, v in classifier.tower.state_dict().items()}
        tensors |= {f"reader.{k}": v for k, v in reader.state_dict().items()}
        halves = {k: v.half() if v.is_floating_point() else v for k, v in tensors.items()}
        save_file({k: v.contiguous() for k, v in halves.items()}, self.weights)

    def _tasks(self) -> list[pictures.Task]:
        if not hasattr(self, "_made"):
            easy = pictures.easy_task("train", EASY_COPIES)
            self._made = [easy, pictures.digits_task("train", TRAIN_PICTURES)]
        return self._made

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

    def train_data(self) -> list[tuple[pictures.Task, Tensor]]:
        """Both training tasks with their features."""
        if self._train is None:
            tower = self._tower()
            self._train = []
            for name, task in zip(("easy", "digits"), self._tasks(), strict=True):
                stored = learn.features(tower, task, self.work / f"train-{name}.pt")
                self._train.append((task, stored))
        return self._train

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
            self.reader(), self.samples(plans.SAMPLES, 8), self.work / "statistics.safetensors"
        )

    def variant_reader(self, variant: Variant, plan: Any = None) -> Reader:
        """The pruned reader of a variant, fine-tuned if the variant is."""
        order = plans.ranked(self.statistics) if variant.neurons == "ranked" else None
        reader = self.reader(order)
        apply(reader.llama, plan or self.plan(variant))
        if variant.tuned:
            self.tune(reader, variant.name)
        return reader.eval()

    def plan(self, variant: Variant) -> Any:
        text_mass = self.statistics.text_mass()
        plan = variants.plan_by_hand(variant.budget, self.statistics.ratios)
        if variant.rule == "search":
            plan = self.searched(variant.budget, variants.with_mass(plan, "calibrated", text_mass))
        elif variant.rule == "random":
            plan = variants.with_random_heads(plan, variant.seed)
        plan = variants.with_mass(plan, variant.mass, text_mass)
        if variant.mass == "fitted":
            reader = self.reader(plans.ranked(self.statistics))
            plan = plans.fitted(reader, plan, self.samples(plans.SAMPLES, 8), self.held_out())
        return plan

    def samples(self, count: int, seed: int) -> list[dict[str, Any]]:
        return plans.samples(self.reader(), self.train_data(), count, seed)

    def held_out(self) -> list[dict[str, Any]]:
        return self.samples(plans.HELD_OUT, 9)

    def searched(self, budget: int, start: Any) -> Any:
        reader = self.reader()
        _, measured = plans.reorder(reader.llama, self.statistics)
        path = self.work / f"search-{budget}.json"
        plan = plans.searched(reader, measured, self.held_out(), budget, start, path)
        shutil.copy(path, self.results)
        return plan

    def tune(self, reader: Reader, name: str) -> None:
        """All fine-tunes are equal but for the plan: steps, rate, and the questions drawn."""
        path = self.work / "tuned" / f"{name}.pt"
        path.parent.mkdir(exist_ok=True)
        learn.train_reader(
            reader, self.train_data(), path, self.steps("tuned"), BATCH, TUNED_RATE, seed=99
        )

    # -- measuring -----------------------------------------------------------------------------

    def measure(self, name: str, make: Callable[[], answers.Guess], facts: dict[str, Any]) -> None:
        """Leaves work/measured/NAME.json: which test questions are answered rightly."""
        path = self.work / "measured" / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            return
        began, guess = time.time(), make()
        torch.set_num_threads(1)
        right = {
            task: answers.right_answers(guess, self.test[task], self.features[task])
            for task in self.test
        }
        path.write_text(json.dumps({**facts, "name": name, "right": right}))
        got = ", ".join(f"{task} {answers.accuracy(r):.2f}" for task, r in right.items())
        print(f"{name}: {got} ({time.time() - began:.0f} s)", flush=True)

    def measure_dense(self) -> None:
        for tuned in (False, True):
            facts = {"budget": 100, "mass": "", "tuned": tuned, "rule": "dense", "neurons": ""}
            facts |= {"visual": 100.0, "total": 100.0}

            def make(tuned: bool = tuned) -> answers.Guess:
                reader = self.reader()
                if tuned:
                    self.tune(reader, "dense-tuned")
                return answers.guesses(reader.eval())

            self.measure("dense-tuned" if tuned else "dense", make, facts)

    def measure_variant(self, variant: Variant) -> None:
        if (self.work / "measured" / f"{variant.name}.json").exists():
            return
        plan = self.plan(variant)
        config = self.reader().config
        visual, total = variants.shares(config, plan)
        facts = {**vars(variant), "visual": visual, "total": total, "plan": plan.summary()}
        self.measure(
            variant.name, lambda: answers.guesses(self.variant_reader(variant, plan)), facts
        )

    def measure_rivals(self) -> None:
        """FastV after layer 2, or 1 where 2 dense layers are beyond the budget; VTW; random."""
        config, layers = self.reader().config, self.reader().config.num_hidden_layers
        dense = rivals.visual_flops(config, 0, VISUAL)
        for budget in variants.BUDGETS:
            share = budget / 100
            able = [k for k in range(layers) if rivals.affordable(config, k, share) is not None]
            early, last = min(2, able[-1]), able[-1]
            for rule, layer, choose in (
                ("FastV", early, rivals.by_attention),
                ("random after layer", early, rivals.at_random),
                ("random", 0, rivals.at_random),
                ("VTW", last, rivals.by_attention),
            ):
                keep = 0 if rule == "VTW" else rivals.affordable(config, layer, share)
                visual = 100 * rivals.visual_flops(config, layer, keep) / dense
                facts = {"budget": budget, "mass": "", "tuned": False, "rule": rule, "neurons": ""}
                facts |= {"visual": visual, "plan": f"{keep} of {VISUAL} from layer {layer} on"}

                def make(layer: int = layer, keep: int = keep, choose: Any = choose) -> Any:
                    return rivals.dropping(self.reader(), layer, keep, choose)

                self.measure(f"{budget}-{rule}".replace(" ", "-"), make, facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, help="folder of the stages (work; work-SHARE)")
    parser.add_argument(
        "--results", type=Path, help="what is reported (results; in a trial, in the work folder)"
    )
    parser.add_argument("--train-only", action="store_true", help="stop after the dense weights")
    parser.add_argument(
        "--share", type=float, default=1, help="of each stage's steps: 0.01 tries the course out"
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
    study.measure_dense()
    for variant in variants.all_variants():
        study.measure_variant(variant)
    study.measure_rivals()
    write_report(work / "measured", results, study.test)


if __name__ == "__main__":
    main()

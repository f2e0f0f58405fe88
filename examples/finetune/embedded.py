"""What the configs here run on without a download: the embedded tiny LLaVA in transformers' format,
questions of easy-VQA, and two plans by hand with sinks fitted to them.

    python examples/finetune/embedded.py        # into examples/finetune/work, in a minute

With a model of your own you need none of this: any transformers model, questions and plan do.
"""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for yopo where it is not installed

import torch

import yopo
from yopo.prompts import load
from yopo.prompts.questions import Samples, read_questions

ROOT = Path(__file__).resolve().parents[2]
DENSE = "examples/tiny_llava/checkpoints/tiny-llava-v1-dense"
# Kept heads in each layer before the cut, and 1/r of the FFN's neurons. By hand, so that there is
# something to learn: a plan that yopo calibrate finds loses next to nothing at 12 %.
PLANS = {"12": ((3, 3, 3), 6), "4": ((2, 1), 16)}
SAMPLES = 60  # that sinks are fitted to


def plan_of(heads: tuple[int, ...], ffn_ratio: int) -> yopo.PruningPlan:
    keep = torch.zeros(6, 6, dtype=torch.bool)
    for layer, count in enumerate(heads):
        keep[layer, :count] = True
    mass = {"head_mass": "drop", "cut_mass": "drop"}
    return yopo.PruningPlan(keep, window=5, ffn_ratio=ffn_ratio, **mass)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path(__file__).parent / "work")
    parser.add_argument("--number", type=int, default=2000, help="training questions (2000)")
    given = parser.parse_args()
    work, model = given.work, given.work / "tiny-llava"
    work.mkdir(parents=True, exist_ok=True)

    def run(*words: str) -> str:
        done = subprocess.run([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        return done.stdout if done.returncode == 0 else sys.exit(done.returncode)

    if not model.exists():
        run("-m", "yopo", "convert", DENSE, str(model.resolve()))
    for split, number in (("train", given.number), ("test", 500)):
        lines = run("examples/tiny_llava/questions.py", "--split", split, "--number", str(number))
        (work / f"{split}.jsonl").write_text(lines)
    loaded = load(model, "cpu")
    questions, _ = read_questions(work / "train.jsonl", min(SAMPLES, given.number))
    for name, shape in PLANS.items():
        samples = Samples(questions, loaded)
        fit = yopo.fit_sinks(loaded.model, samples, plan_of(*shape), target="dense", progress=True)
        fit.plan.save(work / f"plan-{name}.json")
        print(f"plan-{name}.json: {fit.plan.summary()} {fit}")
    print(f"written: {work}")


if __name__ == "__main__":
    main()

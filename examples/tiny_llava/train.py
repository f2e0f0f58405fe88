"""Makes the tiny LLaVA, dense and pruned, from easy-VQA: `python examples/tiny_llava/train.py`.

Every stage leaves its result in work/ and is skipped when that is there; the long ones also go on
from where they were stopped. Delete work/ to start afresh.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for yopo where it is not installed

import torch
from checkpoint import CHECKPOINTS, CLIP_FOLDER, HERE, write_clip, write_text_files, write_weights
from conversations import conversations
from data import PATCHES_PER_SIDE, Split, load_split
from language import TinyLlava, compute_features, train_language
from safetensors.torch import load_file
from text import VOCABULARY, Prompts, train_tokenizer
from tower import train_tower
from tqdm import trange
from transformers import AutoTokenizer

from yopo import PruningPlan, apply, fit_sinks
from yopo.calibration.head_rule import released_head_keep, solve_alpha, visual_ratio

LAYER_CUT, WINDOW, FFN_RATIO = 3, 5, 2
KEPT_HEADS = 0.5  # of all, the first two layers' (which the released rule always keeps) included
SAMPLES = 100  # for the head mask, as released
SINK_SAMPLES = 200
ROOT = HERE.parents[1]
TUNED = {  # arguments of LLaVA's train.py
    "version": "v1",
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "num_train_epochs": 1,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-4,
    "warmup_steps": 5,
    "lr_scheduler_type": "cosine",
    "model_max_length": 1024,
    "lazy_preprocess": True,
    "logging_steps": 5,
    "save_steps": 50,
    "report_to": "none",
    "use_cpu": True,
}


@torch.no_grad()
def asked(
    model: TinyLlava, stored: torch.Tensor, split: Split, prompts: Prompts, images: Iterable[int]
) -> Iterator[dict[str, torch.Tensor]]:
    """The language model's inputs for the first question about each image, and its answer."""
    for image in images:
        question, answer = split.turns[image][0]
        ids = torch.tensor([prompts.question(question)])
        rows = model.embed(stored[0, image, None].float(), ids)
        place = torch.arange(rows.shape[1]) - len(prompts.system)
        visual = (place >= 0) & (place < PATCHES_PER_SIDE**2)
        ids = torch.tensor([prompts.answer(answer)])
        yield {"inputs_embeds": rows, "visual_mask": visual[None], "answer_ids": ids}


@torch.no_grad()
def head_ratios(
    model: TinyLlava, stored: torch.Tensor, split: Split, prompts: Prompts
) -> torch.Tensor:
    """(samples, layers, heads): how much each head of the dense model looks at the image."""
    model.llama.set_attn_implementation("eager")  # the only one that returns its probabilities
    ratios = []
    for sample in asked(model, stored, split, prompts, trange(SAMPLES, desc="heads")):
        rows, visual = sample["inputs_embeds"], sample["visual_mask"][0]
        attentions = model.llama.model(inputs_embeds=rows, output_attentions=True).attentions
        ratios.append(visual_ratio((layer[0] for layer in attentions), visual))
    model.llama.set_attn_implementation("sdpa")
    return torch.stack(ratios)


def fine_tuned(plan: PruningPlan, work: Path, steps: int) -> dict[str, torch.Tensor]:
    """The dense checkpoint's tensors, by TinyLlava's names, after as many steps of LLaVA's train.py
    under the plan."""
    out, data = work / "tiny-llava-v1-tuned", work / "conversations.json"
    if not (out / "model.safetensors").exists():
        plan.save(work / "plan.json")
        data.write_text(json.dumps(conversations(steps * TUNED["per_device_train_batch_size"])))
        folders = {"model_name_or_path": CHECKPOINTS["dense"], "vision_tower": CLIP_FOLDER}
        given = {name: path.relative_to(ROOT) for name, path in folders.items()}
        given |= {"data_path": data.resolve(), "image_folder": "/", "output_dir": out.resolve()}
        words = [str(word) for pair in (given | TUNED).items() for word in pair]
        words[::2] = [f"--{name}" for name in words[::2]]
        plan_file = str((work / "plan.json").resolve())
        command = [sys.executable, "-m", "yopo", "run", "--plan", plan_file]
        subprocess.run([*command, "-m", "llava.train.train", *words], cwd=ROOT, check=True)
    tensors = load_file(out / "model.safetensors")
    named = {n.replace("model.mm_projector.", "projector."): t for n, t in tensors.items()}
    return {n if n.startswith("projector.") else f"llama.{n}": t for n, t in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=HERE / "work", help="folder of the stages")
    parser.add_argument(
        "--share", type=float, default=1, help="of each stage's steps: 0.01 tries the course out"
    )
    arguments = parser.parse_args()
    work = arguments.work

    def share(steps: int) -> int:
        return max(2, round(steps * arguments.share))

    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    began = time.time()
    train, test = load_split("train"), load_split("test")

    # The tokenizer, and the images that the README and the tests show the model.
    dense, pruned = CHECKPOINTS["dense"], CHECKPOINTS["pruned"]
    write_text_files(dense, VOCABULARY)
    if not (dense / "tokenizer.model").exists():
        train_tokenizer(dense)
    prompts = Prompts(AutoTokenizer.from_pretrained(dense, use_fast=False))
    (HERE / "images").mkdir(exist_ok=True)
    for path in test.paths[:4]:
        shutil.copy(path, HERE / "images" / f"easy-vqa-test-{path.name}")

    # 1. The tower learns to see, then stays as it is.
    if not (work / "tower.pt").exists():
        train_tower(train, test, work, steps=share(1400), batch=32, rate=1e-3)
    write_clip(torch.load(work / "tower.pt", weights_only=True))
    # From the files, so that the language model meets what float16 makes of the tower.
    stored = compute_features(CLIP_FOLDER, train, work / "train-features.pt")
    test_stored = compute_features(CLIP_FOLDER, test, work / "test-features.pt")

    model = TinyLlava(VOCABULARY, prompts.system)

    def learn(name: str, **settings: Any) -> None:
        """Leaves the model as the stage makes it, or made it before."""
        if not (work / f"{name}.pt").exists():
            data = (train, stored, test, test_stored)
            train_language(name, model, data, prompts, work, **settings)
        model.load_state_dict(torch.load(work / f"{name}.pt", weights_only=True))

    # 2. Projector and language model learn to answer, cheaply: 36 averaged visual tokens, and
    # at first no "no" or "not" in the questions;
    # 3. then with all 576.
    learn("plain", side=6, steps=share(500), batch=16, rate=1e-3, negations=False)
    learn("pooled", side=6, steps=share(300), batch=16, rate=1e-3)
    learn("dense", side=PATCHES_PER_SIDE, steps=share(150), batch=16, rate=5e-4)
    write_weights(dense, model.llava_weights())

    # 4. Which heads look at the image.
    ratios = head_ratios(model, stored, train, prompts)
    alpha = solve_alpha(ratios, KEPT_HEADS)
    keep = released_head_keep(ratios, alpha)
    print(f"alpha {alpha:.4f} keeps {keep.sum()} of {keep.numel()} heads: {keep.sum(1).tolist()}")

    # 5. The model learns to do with what the plan leaves: LLaVA's own training script.
    plan = PruningPlan(
        head_keep=keep,
        window=WINDOW,
        layer_cut=LAYER_CUT,
        ffn_ratio=FFN_RATIO,
        head_mass="exact",
        cut_mass="exact",
    )
    model.load_state_dict(fine_tuned(plan, work, share(100)), strict=False)
    apply(model.llama, plan)

    # 6. What it has learnt under exact mass, at what drop costs.
    samples = asked(model, stored, train, prompts, range(SINK_SAMPLES))
    fit = fit_sinks(model.llama, samples, progress=True)
    print(fit)
    apply(model.llama, fit.plan)
    fit.plan.sinks.save(pruned)
    extra = {"sprompt_len": len(prompts.system), "yopo": model.llama.config.yopo}
    write_text_files(pruned, VOCABULARY, extra)
    shutil.copy(dense / "tokenizer.model", pruned)
    write_weights(pruned, model.llava_weights())
    print(f"all stages: {(time.time() - began) / 60:.0f} minutes")


if __name__ == "__main__":
    main()

"""Accuracy of the committed checkpoints, or others made of them, on easy-VQA's test set, loaded by
the LLaVA package.

An answer is right if greedy generation gives exactly it and then ends. That is so if each of its
tokens is the likeliest after the right ones before it, which one pass over question and answer
shows. Each image is read once and its cache shared by all questions about it.
"""

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for yopo where it is not installed

import yopo.patch  # noqa: F401, I001  first, so that LLaVA builds its models on yopo's classes

import easy_vqa
import torch
from checkpoint import CHECKPOINTS, HERE
from llava.constants import IMAGE_TOKEN_INDEX
from llava.mm_utils import get_model_name_from_path, process_images
from llava.model.builder import load_pretrained_model
from PIL import Image
from text import Prompts
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers.cache_utils import DynamicCache

ROOT = HERE.parents[1]


@torch.inference_mode()
def right_answers(
    model: torch.nn.Module,
    prompts: Prompts,
    pixels: torch.Tensor,
    turns: list[tuple[str, str]],
) -> int:
    """How many of the (question, answer) pairs about one image the model gets right."""
    shown = torch.tensor([[*prompts.system, IMAGE_TOKEN_INDEX]])
    cache = model(
        shown, images=pixels, past_key_values=DynamicCache(), use_cache=True
    ).past_key_values
    cache.reorder_cache(torch.zeros(len(turns), dtype=torch.long))  # one copy a question
    asked = [prompts.question(question) for question, _ in turns]
    answers = [prompts.answer(answer) for _, answer in turns]
    # Padding is on the right, where nothing read here attends to it. The end needs no place of its
    # own: nothing is predicted from it.
    rows = [torch.tensor(q + a[:-1]) for q, a in zip(asked, answers, strict=True)]
    guesses = model(
        pad_sequence(rows, batch_first=True), past_key_values=cache, use_cache=True
    ).logits.argmax(-1)
    right = 0
    for guess, q, a in zip(guesses.tolist(), asked, answers, strict=True):
        right += guess[len(q) - 1 : len(q) - 1 + len(a)] == a
    return right


def accuracy(path: str, limit: int | None) -> float:
    """Percent of right answers of the checkpoint folder `path`."""
    tokenizer, model, processor, _ = load_pretrained_model(
        path, None, get_model_name_from_path(path), device="cpu"
    )
    model.float()  # LLaVA loads in float16, in which a CPU is slow
    prompts = Prompts(tokenizer)
    questions, answers, image_ids = easy_vqa.get_test_questions()
    turns: dict[int, list[tuple[str, str]]] = {}
    triples = list(zip(questions, answers, image_ids, strict=True))[:limit]
    for question, answer, image_id in triples:
        turns.setdefault(image_id, []).append((question, answer))
    image_path = easy_vqa.get_test_image_paths()

    def right(image_id: int) -> int:
        image = Image.open(image_path[image_id]).convert("RGB")
        pixels = process_images([image], processor, model.config).float()
        return right_answers(model, prompts, pixels, turns[image_id])

    # An image for each core: shared among cores, the operations are too small to be worth it.
    torch.set_num_threads(1)
    one = {"initializer": torch.set_num_threads, "initargs": (1,)}
    with ThreadPoolExecutor(os.cpu_count(), **one) as workers:
        bar = tqdm(workers.map(right, turns), total=len(turns), mininterval=5)
        return 100 * sum(bar) / len(triples)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*", help="folders (default: the committed two)")
    parser.add_argument("--limit", type=int, help="only this many questions (default: all 9,673)")
    parser.add_argument("--json", action="store_true", help="print the percentages as json, last")
    arguments = parser.parse_args()
    folders = {path: str(Path(path).resolve()) for path in arguments.checkpoints}
    if not folders:
        folders = {kind: str(path.relative_to(ROOT)) for kind, path in CHECKPOINTS.items()}
    os.chdir(ROOT)  # the checkpoints name their vision tower relative to it
    result = {}
    for kind, path in folders.items():
        began = time.time()
        result[kind] = round(accuracy(path, arguments.limit), 2)
        print(f"{kind}: {result[kind]:.2f} % ({time.time() - began:.0f} s)")
    if arguments.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()

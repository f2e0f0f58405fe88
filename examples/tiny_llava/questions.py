"""Questions of easy-VQA's training split as JSON lines, which `python -m yopo calibrate` takes:
`python examples/tiny_llava/questions.py > questions.jsonl`. Other pictures than it is tested on,
which are those of --split test."""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import easy_vqa


def drawn(number: int, split: str = "train") -> Iterator[tuple[int, str, str, str]]:
    """So many: place among the split's questions, path of the image, question, answer."""
    questions, answers, image_ids = getattr(easy_vqa, f"get_{split}_questions")()
    path_of = getattr(easy_vqa, f"get_{split}_image_paths")()
    for i in random.Random(0).sample(range(len(questions)), number):
        yield i, str(Path(path_of[image_ids[i]]).resolve()), questions[i], answers[i]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=200, help="of questions (200)")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="(train)")
    told = parser.parse_args()
    for _, image, question, answer in drawn(told.number, told.split):
        print(json.dumps({"image": image, "question": question, "answer": answer}))


if __name__ == "__main__":
    main()

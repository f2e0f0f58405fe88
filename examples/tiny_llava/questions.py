"""Questions of easy-VQA's training split as JSON lines, which `python -m yopo calibrate` takes:
`python examples/tiny_llava/questions.py > questions.jsonl`. Other pictures than it is tested on."""

import argparse
import json
import random
from pathlib import Path

import easy_vqa


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=200, help="of questions (200)")
    number = parser.parse_args().number
    questions, answers, image_ids = easy_vqa.get_train_questions()
    path_of = easy_vqa.get_train_image_paths()
    for i in random.Random(0).sample(range(len(questions)), number):
        image = str(Path(path_of[image_ids[i]]).resolve())
        print(json.dumps({"image": image, "question": questions[i], "answer": answers[i]}))


if __name__ == "__main__":
    main()

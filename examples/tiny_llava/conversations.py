"""Questions of easy-VQA's training split as the conversations that LLaVA's train.py takes:
`python examples/tiny_llava/conversations.py > conversations.json`. Other pictures than the model is
tested on. One question each: train.py passes over conversations of several where "USER" behind the
end of an answer is not as many tokens as at the beginning, as with this small vocabulary."""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import easy_vqa


def conversations(number: int, seed: int = 0) -> list[dict[str, Any]]:
    """So many, of as many pictures as there are."""
    questions, answers, image_ids = easy_vqa.get_train_questions()
    path_of = easy_vqa.get_train_image_paths()
    made = []
    for i in random.Random(seed).sample(range(len(questions)), number):
        said = {"human": f"<image>\n{questions[i]}", "gpt": answers[i]}
        made.append(
            {
                "id": str(i),
                "image": str(Path(path_of[image_ids[i]]).resolve()),
                "conversations": [{"from": who, "value": what} for who, what in said.items()],
            }
        )
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=1600, help="of conversations (1600)")
    print(json.dumps(conversations(parser.parse_args().number), indent=1))


if __name__ == "__main__":
    main()

"""Questions of easy-VQA's training split as the conversations that LLaVA's train.py takes:
`python examples/tiny_llava/conversations.py > conversations.json`. Other pictures than the model is
tested on. One question each: train.py passes over conversations of several where "USER" behind the
end of an answer is not as many tokens as at the beginning, as with this small vocabulary."""

import argparse
import json
from typing import Any

from questions import drawn


def conversations(number: int) -> list[dict[str, Any]]:
    """So many, of as many questions."""
    made = []
    for i, image, question, answer in drawn(number):
        said = {"human": f"<image>\n{question}", "gpt": answer}
        turns = [{"from": who, "value": what} for who, what in said.items()]
        made.append({"id": str(i), "image": image, "conversations": turns})
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=1600, help="of conversations (1600)")
    print(json.dumps(conversations(parser.parse_args().number), indent=1))


if __name__ == "__main__":
    main()

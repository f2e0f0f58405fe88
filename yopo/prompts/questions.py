"""Questions about images, from a file: JSON lines, or LLaVA's conversations. Reads and checks
files; knows no model. What a model makes of a question is a Prompter's (prompter.py).

JSON lines, one object each: {"image": path, "question": text, "answer": text (optional)}.
LLaVA's conversations, one JSON list: [{"image": path, "conversations": [{"from": "human", "value":
"<image>\\nquestion"}, {"from": "gpt", "value": answer}, …]}, …]; the first turn counts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yopo.errors import BadInput

LONGEST = 200  # characters of a path in a message; a data: URI has megabytes


@dataclass(frozen=True)
class Question:
    """image: a file that was read once. answer: None where the file has none."""

    image: Path
    question: str
    answer: str | None


@dataclass(frozen=True)
class Samples(Sequence[dict[str, Any]]):
    """Questions as model inputs (sample.py), each made when it is asked for."""

    questions: Sequence[Question]
    inputs_of: Callable[[Question], dict[str, Any]]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Samples(self.questions[index], self.inputs_of)
        return self.inputs_of(self.questions[index])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(self.inputs_of, self.questions)


def read_questions(
    file: Path, limit: int | None = None, folder: Path | None = None, answered: bool = False
) -> tuple[list[Question], list[str]]:
    """The first `limit` usable questions, and what was passed over and why, for each a line.

    folder: what image paths are relative to; None: the file's own. Passed over: entries without an
    image, or (answered) without an answer, and images that cannot be read. Raises BadInput for
    anything else that is not as above, naming the line or entry, and where no question is left.
    """
    folder = file.parent if folder is None else folder
    found: list[Question] = []
    passed_over: list[str] = []
    for where, entry in _entries(file):
        if limit is not None and len(found) == limit:
            break
        question, answer = _texts(where, entry)
        image = entry.get("image")
        if not image or (answered and answer is None):
            passed_over.append(f"{where}: no {'answer' if image else 'image'}")
            continue
        if not isinstance(image, str):
            raise BadInput(f"{where}: image is {image!r}; it must be the path of one image")
        problem = _unreadable(folder / image)
        if problem:
            passed_over.append(f"{where}: {problem}")
            continue
        found.append(Question(folder / image, question, answer))
    if not found:
        first = f"; the first: {passed_over[0]}" if passed_over else ""
        raise BadInput(f"{file} has no usable question ({len(passed_over)} passed over{first})")
    return found, passed_over


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the object) of each entry."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise BadInput(f"--data: there is no file {str(file)!r} (from {Path.cwd()})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--data: {file} cannot be read: {error}") from error
    if text.lstrip().startswith("["):
        entries = [(f"{file}, entry {i}", e) for i, e in enumerate(_json(str(file), text))]
    else:
        lines = ((i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip())
        entries = ((f"{file}, line {i}", _json(f"{file}, line {i}", line)) for i, line in lines)
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise BadInput(f"{where}: a question is a JSON object, got {type(entry).__name__}")
        yield where, entry


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadInput(f"{where} is not JSON, perhaps cut off: {error}") from error


def _texts(where: str, entry: dict[str, Any]) -> tuple[str, str | None]:
    """Question and answer of an entry of either kind."""
    question, answer = entry.get("question"), entry.get("answer")
    turns = entry.get("conversations")
    if question is None and isinstance(turns, list) and all(isinstance(t, dict) for t in turns):
        values = [turn.get("value") for turn in turns]
        question = values[0] if values else None
        answer = values[1] if len(values) > 1 else None
    if isinstance(question, str):  # the image's place is the template's to choose
        question = question.replace("<image>", "").strip()
    if not isinstance(question, str) or not question:
        raise BadInput(
            f"{where}: it has no question; each line is "
            '{"image": path, "question": text, "answer": text (optional)}'
        )
    if answer is not None and not isinstance(answer, str):
        raise BadInput(f"{where}: answer is {answer!r}; it must be text")
    return question, answer or None


def _unreadable(image: Path) -> str | None:
    """What is wrong with an image file; None: nothing."""
    try:
        from PIL import Image
    except ImportError as error:
        raise BadInput("Pillow is missing, which reads images: pip install pillow") from error
    shown = str(image) if len(str(image)) <= LONGEST else f"{str(image)[:LONGEST]}…"
    try:
        if not image.is_file():
            return f"there is no image {shown!r}"
        with Image.open(image) as opened:
            opened.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else error
        return f"{shown!r} is not an image PIL can read: {why}"
    return None

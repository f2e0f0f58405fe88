"""Questions from files: both formats, what is passed over, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from yopo.errors import BadInput
from yopo.prompts.questions import Question, read_questions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 3)).save(tmp_path / name)
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def lines(folder: Path, *entries: Any) -> Path:
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return file


def test_lines_are_read_in_order_with_or_without_answers(folder: Path) -> None:
    file = lines(
        folder,
        {"image": "b.png", "question": "what?", "answer": "red"},
        {"image": str(folder / "a.png"), "question": "why?", "id": 3},
    )
    file.write_text(file.read_text() + "\n\n")
    found, passed_over = read_questions(file)
    assert passed_over == []
    assert found == [
        Question(folder / "b.png", "what?", "red"),
        Question(folder / "a.png", "why?", None),
    ]


def test_llava_s_conversations_give_their_first_turn(folder: Path) -> None:
    turns = [
        {"from": "human", "value": "<image>\nwhat?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "why?"},
        {"from": "gpt", "value": "so"},
    ]
    file = folder / "data.json"
    file.write_text(
        json.dumps(
            [
                {"id": "1", "image": "a.png", "conversations": turns},
                {"id": "2", "conversations": turns[2:]},
                {"id": "3", "image": "b.png", "conversations": [{"from": "human", "value": "hm?"}]},
            ]
        )
    )
    found, passed_over = read_questions(file)
    assert found == [
        Question(folder / "a.png", "what?", "red"),
        Question(folder / "b.png", "hm?", None),
    ]
    assert [line.split(", ", 1)[1] for line in passed_over] == ["entry 1: no image"]


def test_images_are_looked_for_where_told(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file = lines(elsewhere, {"image": "a.png", "question": "what?"})
    assert read_questions(file, folder=folder)[0][0].image == folder / "a.png"
    with pytest.raises(BadInput, match="no usable question"):
        read_questions(file)


def test_what_has_no_readable_image_is_named_and_passed_over(folder: Path) -> None:
    names = ["a.png", "cut.png", None, "text.png", "gone.png", "b.png", "a.png"]
    entries = [{"image": name, "question": "what?"} for name in names]
    found, passed_over = read_questions(lines(folder, *entries), limit=2)
    assert [question.image.name for question in found] == ["a.png", "b.png"]
    told = [line.split("data.jsonl, ")[1] for line in passed_over]
    assert [line.split(":")[0] for line in told] == ["line 2", "line 3", "line 4", "line 5"]
    assert "cut.png' is not an image PIL can read" in told[0] and "no image" in told[1]
    assert "text.png' is not an image" in told[2] and "there is no image" in told[3]


def test_where_nothing_is_left_it_says_so(folder: Path) -> None:
    file = lines(folder, {"question": "what?"}, {"image": "gone.png", "question": "what?"})
    with pytest.raises(BadInput, match=r"no usable question \(2 passed over; the first: .*line 1"):
        read_questions(file)
    with pytest.raises(BadInput, match=r"no usable question \(0 passed over\)"):
        read_questions(lines(folder))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image": "a.png", "question": "what?"}\n{"image": "a.png", "que', "line 2 is not JSON"),
        ('{"image": "a.png"}', "line 1: it has no question"),
        ('{"image": "a.png", "question": 3}', "line 1: it has no question"),
        ('{"image": "a.png", "question": ""}', "line 1: it has no question"),
        ('{"image": ["a.png", "b.png"], "question": "what?"}', "it must be the path of one image"),
        ('{"image": "a.png", "question": "what?", "answer": ["red"]}', "answer is"),
        ('"a.png"', "line 1: a question is a JSON object, got str"),
        ('[{"image": "a.png", "question": "what?"}', "is not JSON, perhaps cut off"),
        ('[{"image": "a.png", "conversations": []}]', "entry 0: it has no question"),
        ('[["a.png", "what?"]]', "entry 0: a question is a JSON object, got list"),
    ],
)
def test_what_is_no_question_is_refused_by_its_place(folder: Path, text: str, message: str) -> None:
    file = folder / "data.jsonl"
    file.write_text(text)
    with pytest.raises(BadInput, match=message):
        read_questions(file)


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    with pytest.raises(BadInput, match="there is no file .*nowhere.jsonl"):
        read_questions(folder / "nowhere.jsonl")
    with pytest.raises(BadInput, match="cannot be read"):
        read_questions(folder / "cut.png")


def test_a_path_that_no_file_system_takes_is_passed_over(folder: Path) -> None:
    long = "data:image/png;base64," + "A" * 5000
    file = lines(folder, *({"image": name, "question": "what?"} for name in (long, "a.png")))
    found, passed_over = read_questions(file)
    assert [question.image.name for question in found] == ["a.png"]
    assert len(passed_over) == 1 and "line 1" in passed_over[0] and len(passed_over[0]) < 1000


def test_only_newlines_end_a_line_and_a_byte_order_mark_is_no_text(folder: Path) -> None:
    entry = {"image": "a.png", "question": "<image>\none\u2028two\u0085three"}
    text = json.dumps(entry, ensure_ascii=False)
    (folder / "data.jsonl").write_text(f"{text}\r\n{text}", encoding="utf-8-sig")
    found, _ = read_questions(folder / "data.jsonl")
    assert [q.question for q in found] == ["one\u2028two\u0085three"] * 2

"""files.py: a file is the old one or the new one, and what is wrong with JSON names the file."""

from __future__ import annotations

import json
from pathlib import Path
from threading import Barrier, Thread

import pytest

from yopo.files import read_json, write_json, write_whole


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    value = {"a": [1, 2.5, None], "ü": "visual ▁ tokens"}
    write_json(tmp_path / "made" / "on the way" / "x.json", value)
    file = tmp_path / "made" / "on the way" / "x.json"
    assert read_json(file) == value
    assert "ü" in file.read_text(encoding="utf-8")  # to be read by people
    assert [path.name for path in file.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("text", ['{"a": 1', "", "not json", "[" * 100_000])
def test_json_that_is_cut_off_names_the_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="config.json is not JSON, perhaps cut off"):
        read_json(file)


def test_bytes_that_are_no_text_name_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(ValueError, match="config.json is not JSON"):
        read_json(file)


@pytest.mark.parametrize("text", ["[1, 2]", "3", "null"])
def test_json_that_is_no_object_names_the_file(text: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="config.json holds no JSON object"):
        read_json(file)


def test_a_file_that_is_not_there_is_said_by_python(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config.json"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_in_the_middle_leaves_the_old_file_and_no_other(
    error: type[BaseException], tmp_path: Path
) -> None:
    file = tmp_path / "x.txt"
    file.write_text("old", encoding="utf-8")
    with pytest.raises(error), write_whole(file) as partial:
        partial.write_text("half of the n", encoding="utf-8")
        assert file.read_text(encoding="utf-8") == "old"
        raise error
    assert file.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_failure_in_the_middle_leaves_no_file_where_there_was_none(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="disk"), write_whole(tmp_path / "x.txt") as partial:
        partial.write_text("half", encoding="utf-8")
        raise OSError("the disk is full")
    assert not list(tmp_path.iterdir())


def test_what_json_cannot_hold_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_json(file, {"a": 1})
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file) == {"a": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_two_threads_that_write_one_file_leave_one_of_the_two(tmp_path: Path) -> None:
    file, both = tmp_path / "x.json", Barrier(2)
    errors: list[BaseException] = []

    def write(value: int) -> None:
        try:
            with write_whole(file) as partial:
                partial.write_text(json.dumps({"by": [value] * 1000}), encoding="utf-8")
                both.wait()  # both have written, neither has given its file the name
        except BaseException as error:
            errors.append(error)
            both.abort()  # the other one must not wait for ever

    threads = [Thread(target=write, args=(value,)) for value in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert read_json(file) in ({"by": [1] * 1000}, {"by": [2] * 1000})
    assert list(tmp_path.iterdir()) == [file]

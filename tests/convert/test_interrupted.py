"""Weights from file to file: one shard in memory, nothing half-written, gone on with where it was
stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import transformers
from conversions import convert, resharded, sums
from packaging.version import Version
from safetensors.torch import save_file
from torch import Tensor

from yopo.checkpoint import shards
from yopo.commands.command_line import main
from yopo.convert import weight_stream

if Version(transformers.__version__) < Version("4.45"):
    pytest.skip("converted checkpoints are for transformers 4.45 on", allow_module_level=True)


def test_no_more_than_one_shard_is_held(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One source file open at a time, and never more tensors made than fit the size asked for."""
    limit, open_now, most_open, most_bytes = 20_000, [], 0, 0

    class Watched(shards.Shard):
        def __enter__(self) -> Any:
            nonlocal most_open
            if self.file.parent != partial:
                open_now.append(self)
            most_open = max(most_open, len(open_now))
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            if self in open_now:
                open_now.remove(self)
            super().__exit__(*error)

    def watched_save(made: dict[str, Tensor], *args: Any, **kwargs: Any) -> None:
        nonlocal most_bytes
        if len(made) > 1:
            most_bytes = max(most_bytes, sum(value.nbytes for value in made.values()))
        save_file(made, *args, **kwargs)

    partial = tmp_path / "new.partial"
    monkeypatch.setattr(weight_stream, "Shard", Watched)
    monkeypatch.setattr(weight_stream, "save_file", watched_save)
    convert(resharded(source, 4, "bin"), tmp_path / "new", "--shard-gb", str(limit / 1e9))
    assert most_open == 1
    assert 0 < most_bytes <= limit
    assert len(list((tmp_path / "new").glob("*.safetensors"))) > 5


class Stop(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_run_goes_on_and_ends_as_an_uninterrupted_one(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    resharded(source, 3, "bin")
    options = ("--shard-gb", "0.00002")
    whole = sums(convert(source, tmp_path / "whole", *options))
    calls = 0

    def failing(made: dict[str, Tensor], file: Path, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > after:
            file.write_bytes(b"half a file")
            raise Stop
        save_file(made, file, **kwargs)

    target, partial = tmp_path / "new", tmp_path / "new.partial"
    with monkeypatch.context() as patch:
        patch.setattr(weight_stream, "save_file", failing)
        with pytest.raises(Stop):
            main(["convert", str(source), str(target), *options])
    assert not target.exists() and partial.is_dir()

    written: list[str] = []

    def counting(made: dict[str, Tensor], file: Path, **kwargs: Any) -> None:
        written.append(file.name)
        save_file(made, file, **kwargs)

    monkeypatch.setattr(weight_stream, "save_file", counting)
    assert sums(convert(source, target, *options)) == whole
    assert not partial.exists()
    assert len(written) == len(list(target.glob("*.safetensors"))) - after


def test_stopped_by_ctrl_c_it_says_how_to_go_on(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    whole = sums(convert(source, tmp_path / "whole"))
    places = ("yopo.convert.tokenizer_files.write", "yopo.convert.conversion.stream")
    for place in (*places, "pathlib.Path.rename"):
        with monkeypatch.context() as patch:
            patch.setattr(place, stop)
            assert main(["convert", str(source), str(tmp_path / "new")]) == 130
        assert "goes on from" in capsys.readouterr().err and not (tmp_path / "new").exists()
    assert sums(convert(source, tmp_path / "new")) == whole


def test_a_target_that_cannot_be_written_is_one_line(source: Path, capsys: Any) -> None:
    assert main(["convert", str(source), "/proc/nowhere/new"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("yopo: error: /proc/nowhere")


def test_a_damaged_finished_shard_is_made_again(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--shard-gb", "0.00002")
    whole = sums(convert(source, tmp_path / "whole", *options))

    def failing(folder: Path, **_: Any) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(
            "yopo.convert.tokenizer_files.write", lambda *_: (_ for _ in ()).throw(Stop())
        )
        with pytest.raises(Stop):
            main(["convert", str(source), str(tmp_path / "new"), *options])
    shard = next((tmp_path / "new.partial").glob("model-00002-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert sums(convert(source, tmp_path / "new", *options)) == whole


def test_leftovers_of_another_conversion_are_not_mixed_in(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    target = tmp_path / "new"
    with monkeypatch.context() as patch:
        patch.setattr(
            "yopo.convert.tokenizer_files.write", lambda *_: (_ for _ in ()).throw(Stop())
        )
        with pytest.raises(Stop):
            main(["convert", str(source), str(target)])
    resharded(source, 2, "bin")
    assert main(["convert", str(source), str(target)]) == 2
    assert "unfinished conversion of something else" in capsys.readouterr().err
    assert not target.exists()


def test_a_conversion_stopped_at_its_checksums_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = tmp_path / "new.partial"
    weight_stream._resume(partial, "a job")
    (partial / "config.json").write_text("{}")

    def stop(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(weight_stream, "_checksum", stop)
        weight_stream.finish(partial, tmp_path / "new", {})
    assert weight_stream._resume(partial, "a job")["job"] == "a job"
    weight_stream.finish(partial, tmp_path / "new", {})
    assert (tmp_path / "new").is_dir() and not partial.exists()

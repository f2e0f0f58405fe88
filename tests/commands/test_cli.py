"""`python -m yopo`: the list of commands comes at once; run starts any program as python would."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from processes import run

from yopo.commands.command_line import main

PROGRAM = """
import json, sys
import torch, transformers, yopo
import beside
assert __name__ == "__main__" and sys.modules["__main__"].__dict__ is globals()
config = transformers.LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2
)
yopo.PruningPlan(torch.ones(1, 2), window=3).save_to(config)
pruned = yopo.plan_of(transformers.LlamaForCausalLM(config)) is not None
print(json.dumps([sys.argv, sys.path[0], pruned, beside.NAME]))
sys.exit(7)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    folder = tmp_path / "programs"
    folder.mkdir()
    (folder / "program.py").write_text(PROGRAM)
    (folder / "beside.py").write_text("NAME = 'beside'\n")
    return folder


def test_run_script(program: Path, tmp_path: Path) -> None:
    """argv, the path and the exit code are those of `python program.py`."""
    script = os.path.join("programs", "program.py")
    arguments = ["-m", "x", "--help", "run"]
    ours = run("-m", "yopo", "run", script, *arguments, cwd=tmp_path)
    plain = run(script, *arguments, cwd=tmp_path)
    assert ours.returncode == plain.returncode == 7, ours.stderr
    got, expected = json.loads(ours.stdout), json.loads(plain.stdout)
    assert got[:2] == expected[:2] == [[script, *arguments], str(program)]
    assert (got[2], expected[2]) == (True, False)
    assert got[3] == "beside"


def test_run_module(program: Path) -> None:
    ours = run("-m", "yopo", "run", "-m", "program", "-m", "x", cwd=program)
    plain = run("-m", "program", "-m", "x", cwd=program)
    assert ours.returncode == plain.returncode == 7, ours.stderr
    got, expected = json.loads(ours.stdout), json.loads(plain.stdout)
    assert got[0] == expected[0] == [str(program / "program.py"), "-m", "x"]
    assert got[1] == expected[1]
    assert (got[2], expected[2]) == (True, False)


@pytest.mark.slow
def test_run_under_accelerate_launch(program: Path) -> None:
    done = run(
        "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no",
        "-m", "yopo", "run", "-m", "program", "-m", "x", cwd=program,
    )  # fmt: skip
    told = json.loads(done.stdout.splitlines()[-1])
    assert told[0][1:] == ["-m", "x"] and told[2] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "run what?"),
        (["-m"], "run what?"),
        (["--model-path", "x"], "run what?"),
        (["missing.py"], "no such file: 'missing.py'"),
    ],
)
def test_run_without_a_target(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "-m MODULE" in error
    assert len(error.splitlines()) == 1


def test_run_missing_module() -> None:
    done = run("-m", "yopo", "run", "-m", "no_such.module")
    assert done.returncode == 2
    assert "yopo: error: run: no module named 'no_such.module'" in done.stderr.splitlines()[-1]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    assert "run [--plan PLAN] (-m MODULE | SCRIPT.py)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    out = capsys.readouterr().out
    assert "run" in out and "infer" in out


def test_the_list_of_commands_comes_without_torch() -> None:
    """Which takes seconds to import; so does transformers."""
    program = (
        "import sys\n"
        "from yopo.commands.command_line import main\n"
        "try:\n    main(['--help'])\n"
        "finally:\n    heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    print(sorted(heavy))"
    )
    done = run("-c", program)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"

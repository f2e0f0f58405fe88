"""The command line, `python -m yopo COMMAND …`: the list of commands, and `run`. Every other
command has a file of its own with `add_arguments(parser)`; what a command does is not done here.

Exit codes: 0; 2 for bad input, with one line on stderr; 130 for a command that was stopped and can
be gone on with; a program under `run` keeps its own.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from yopo.errors import BadInput

_COMMANDS = {  # modules of yopo, of which only the one asked for is imported
    "infer": "answer a question about an image",
    "bench": "time ours against stock SDPA on random weights",
    "calibrate": "make a pruned checkpoint of a model, from questions about images",
    "flops": "count FLOPs, KV and weight bytes of a preset or checkpoint, dense and pruned",
    "inspect": "say what a checkpoint's plan prunes and what it saves",
    "convert": "turn an original LLaVA-1.5 or InternVL2 checkpoint into transformers' own format",
}
_MODULES = {  # of yopo.commands, where the command's name is not its own
    "bench": "yopo.bench.measure",
    "calibrate": "yopo.commands.calibrate_model",
    "convert": "yopo.convert.conversion",
    "flops": "yopo.commands.count_flops",
    "infer": "yopo.commands.infer",
    "inspect": "yopo.commands.inspect_plan",
}

_RUN_USAGE = "python -m yopo run (-m MODULE | SCRIPT.py) [ARGUMENT …]"
_RUN_HELP = "run a module or script, unchanged, with yopo's models in place of transformers' Llama"


INTERRUPTED = 130  # the exit code that shells give to a program stopped by Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: sys.argv) and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["run"]:
            # Not through argparse: every argument after the target is the program's, `-m` too.
            return run(arguments[1:])
        args = _parser(arguments[:1]).parse_args(arguments)
        code = args.command(args) or 0
        sys.stdout.flush()
        return code
    except BadInput as error:
        print(f"yopo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if arguments[:1] == ["run"]:
            raise  # the program's own business
        print("yopo: stopped", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # … | head; what is left in the buffer must not be flushed at exit
        if arguments[:1] == ["run"]:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def run(arguments: Sequence[str]) -> int:
    """Runs `-m MODULE …` or `SCRIPT …` as python itself would, after `import yopo.patch`.

    Raises BadInput: no target, or none that exists.
    """
    as_module = arguments[:1] == ["-m"]
    words = list(arguments[as_module:])
    target = words[0] if words else ""
    if target in ("-h", "--help"):
        print(f"usage: {_RUN_USAGE}\n\n{_RUN_HELP}")
        return 0
    if not target or target.startswith("-"):
        raise BadInput(f"run what? usage: {_RUN_USAGE}")
    if not as_module and not Path(target).is_file():
        raise BadInput(f"run: no such file: {target!r} (a module needs -m: {_RUN_USAGE})")
    try:
        import_module("yopo.patch")
    except ImportError as error:
        raise BadInput(str(error)) from error
    sys.argv = words
    if as_module:
        if not _module_exists(target):
            raise BadInput(f"run: no module named {target!r} is installed for {sys.executable}")
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        # `python script.py` puts the script's folder first, `python -m yopo` put the working one.
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = str(Path(target).resolve().parent)
        runpy.run_path(target, run_name="__main__")
    return 0


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return False
        raise  # a module that exists misses another


def _parser(asked: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, complete for the command `asked` and with the names of the others."""
    parser = argparse.ArgumentParser(
        prog="python -m yopo",
        description="Pruned visual computation for LLaVA-style models (YOPO, arXiv 2410.06169).",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("run", help=_RUN_HELP, usage=_RUN_USAGE)
    for name, what in _COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if name in asked:
            import_module(_MODULES[name]).add_arguments(command)
    return parser

"""The command line, `python -m yopo COMMAND …`: the list of commands. Each has a file of its own
with `add_arguments(parser)`, `run` with `run(arguments)`; what a command does is not done here.
Imports nothing heavy: `--help` comes at once.

Exit codes: 0; 2 for bad input, with one line on stderr; 130 for a command that was stopped and can
be gone on with; a program under `run` keeps its own.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from yopo.commands import INTERRUPTED, run_program
from yopo.errors import BadInput

_COMMANDS = {  # each with its module of yopo.commands, of which only the one asked for is imported
    "infer": ("infer", "answer a question about an image"),
    "bench": ("run_bench", "time ours against stock SDPA on random weights"),
    "calibrate": (
        "calibrate_model",
        "make a pruned checkpoint of a model, from questions about images",
    ),
    "sinks": (
        "fit_sinks",
        "fit sinks to a pruned checkpoint: exact mass's answers at what drop costs",
    ),
    "flops": (
        "count_flops",
        "count FLOPs, KV and weight bytes of a preset or checkpoint, dense and pruned",
    ),
    "inspect": ("inspect_plan", "say what a checkpoint's plan prunes and what it saves"),
    "convert": (
        "convert_checkpoint",
        "turn an original LLaVA-1.5 or InternVL2 checkpoint into transformers' own format",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: sys.argv) and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["run"]:
            # Not through argparse: every argument after the target is the program's, `-m` too.
            return run_program.run(arguments[1:])
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


def _parser(asked: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, complete for the command `asked` and with the names of the others."""
    parser = argparse.ArgumentParser(
        prog="python -m yopo",
        description="Pruned visual computation for LLaVA-style models (YOPO, arXiv 2410.06169).",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    commands.add_parser("run", help=run_program.HELP, usage=run_program.USAGE)
    for name, (module, what) in _COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if name in asked:
            import_module(f"yopo.commands.{module}").add_arguments(command)
    return parser

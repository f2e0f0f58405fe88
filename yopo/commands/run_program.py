"""`python -m yopo run [--plan PLAN] (-m MODULE | SCRIPT.py) …`: runs any program as python itself
would, with the patch in, so that the models it loads are pruned as their configs say, or by PLAN.
Knows nothing of models.
"""

from __future__ import annotations

import importlib.util
import os
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from yopo.errors import BadInput

USAGE = "python -m yopo run [--plan PLAN] (-m MODULE | SCRIPT.py) [ARGUMENT …]"
HELP = (
    "run a module or script, unchanged; models whose configs have a plan are pruned by it, and by "
    "--plan (a plan's file, or a pruned checkpoint) all that it loads"
)


def run(arguments: Sequence[str]) -> int:
    """Runs `-m MODULE …` or `SCRIPT …` as python itself would, after `import yopo.patch`; what
    stands before it is ours.

    Raises BadInput: no target, or none that exists; a plan that is none.
    """
    plan, arguments = _plan_of(list(arguments))
    as_module = arguments[:1] == ["-m"]
    words = list(arguments[as_module:])
    target = words[0] if words else ""
    if target in ("-h", "--help"):
        print(f"usage: {USAGE}\n\n{HELP}")
        return 0
    if not target or target.startswith("-"):
        raise BadInput(f"run what? usage: {USAGE}")
    if not as_module and not Path(target).is_file():
        raise BadInput(f"run: no such file: {target!r} (a module needs -m: {USAGE})")
    try:
        import_module("yopo.patch")
    except ImportError as error:
        raise BadInput(str(error)) from error
    if plan is not None:
        _ask_for(plan)
    sys.argv = words
    if as_module:
        if not _module_exists(target):
            raise BadInput(f"run: no module named {target!r} is installed for {sys.executable}")
        _accommodate(target)
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        # `python script.py` puts the script's folder first, `python -m yopo` put the working one.
        if not getattr(sys.flags, "safe_path", False):
            sys.path[0] = str(Path(target).resolve().parent)
        _accommodate(target)
        runpy.run_path(target, run_name="__main__")
    if plan is not None and import_module("yopo.models.asked_plan").pruned() == 0:
        print(f"yopo: {target} loaded no model that {plan} was put on", file=sys.stderr)
    return 0


def _accommodate(target: str) -> None:
    script = import_module("yopo.training.llava_script")
    if script.is_llava_training(target):
        script.accommodate()


def _plan_of(arguments: list[str]) -> tuple[str | None, list[str]]:
    """What --plan names, and the arguments without it."""
    first, _, value = (arguments[0] if arguments else "").partition("=")
    if first != "--plan":
        return None, arguments
    rest = arguments[1:]
    if not value:
        value, rest = (rest[0] if rest else ""), rest[1:]
    if not value:
        raise BadInput(f"run: --plan names no file; usage: {USAGE}")
    return value, rest


def _ask_for(plan: str) -> None:
    """Has it put on what is loaded, in the processes that this one starts, too."""
    try:
        import_module("yopo.plan.pruning_plan").PruningPlan.load(plan)
    except (OSError, ValueError) as error:
        raise BadInput(f"run: --plan: {error}") from error
    os.environ[import_module("yopo.models.asked_plan").VARIABLE] = str(Path(plan).resolve())


def _module_exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if error.name and f"{name}.".startswith(f"{error.name}."):
            return False
        raise  # a module that exists misses another

"""`python -m yopo run (-m MODULE | SCRIPT.py) …`: runs any program as python itself would, with the
patch in, so that the models it loads are pruned as their configs say. Knows nothing of models.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from yopo.errors import BadInput

USAGE = "python -m yopo run (-m MODULE | SCRIPT.py) [ARGUMENT …]"
HELP = "run a module or script, unchanged; models whose configs have a plan are pruned by it"


def run(arguments: Sequence[str]) -> int:
    """Runs `-m MODULE …` or `SCRIPT …` as python itself would, after `import yopo.patch`.

    Raises BadInput: no target, or none that exists.
    """
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

"""The house: which wing may import which, no circles, files and functions that can be read at once,
names that mean one thing. Read from the source; nothing is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A wing imports those before it. docs/architecture.md has the same list.
ORDER = (
    "errors",
    "files",
    "versions",
    "plan",
    "engine",
    "models",
    "modeling_llama_prune",
    "patch",
    "counting",
    "checkpoint",
    "prompts",
    "calibration",
    "training",
    "convert",
    "bench",
    "commands",
    "__main__",
)
FILES = sorted(path for path in (ROOT / "yopo").rglob("*.py"))
NAMES = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}
MODULES = {name.removesuffix(".__init__"): path for path, name in NAMES.items()}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of yopo that a file imports anywhere in it but for type checkers, and the lines."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_checkers = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_checkers:
            continue
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found = [name if name in MODULES else node.module for name in inside]
        else:
            continue
        yield from ((name, node.lineno) for name in found if name and name.split(".")[0] == "yopo")


def wing(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_has_a_place_in_the_order() -> None:
    assert {wing(name) for name in MODULES} - {""} == set(ORDER)


def test_imports_go_one_way() -> None:
    wrong = []
    for path, name in NAMES.items():
        here = wing(name)
        if here == "__init__":  # the package itself hands out names, on first use
            continue
        for module, line in imports(path):
            there = wing(module)
            if there and ORDER.index(there) > ORDER.index(here):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {module}")
    assert not wrong, "\n".join(wrong)


def test_there_is_no_circle() -> None:
    graph = {
        name.removesuffix(".__init__"): {module for module, _ in imports(path)}
        for path, name in NAMES.items()
        if name != "yopo.__init__"
    }
    done: set[str] = set()

    def follow(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " → ".join([*way[way.index(module) :], module])
        if module not in done:
            for further in graph.get(module, ()):
                if not module.startswith(f"{further}."):  # a package's own __init__ comes first
                    follow(further, (*way, module))
            done.add(module)

    for module in graph:
        follow(module, ())


def test_files_and_functions_can_be_read_at_once() -> None:
    long = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if (lines := text.count("\n")) > 400:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > 60:
                    long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {lines}")
    assert not long, "\n".join(long)


def test_names_of_modules_mean_one_thing() -> None:
    stems = [path.stem for path in FILES if path.stem not in ("__init__", "__main__")]
    stems += [path.parent.name for path in FILES if path.stem == "__init__"]
    assert not set(stems) & set(sys.stdlib_module_names)
    assert sorted(stems) == sorted(set(stems)), [s for s in set(stems) if stems.count(s) > 1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: NAMES[path])
def test_a_file_says_first_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), "no docstring"


def test_what_tests_share_is_in_support() -> None:
    tests = {path.stem for path in (ROOT / "tests").rglob("test_*.py")}
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in tests, f"{path}:{node.lineno} imports {node.module}"

"""What pages say of the code, where the code can be asked: names, wings, variables, tools."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import yopo
from yopo import recipes

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_the_api_page_has_every_public_name() -> None:
    shown = set(re.findall(r"^::: yopo\.([\w.]+)$", page("api.md"), re.MULTILINE))
    assert set(yopo.__all__) - {"__version__"} - shown <= {"recipes"}
    assert "plan.recipes" in shown


def test_every_recipe_is_described() -> None:
    described = set(re.findall(r"`(\w+)`", page("plans-and-mass.md").partition("## Recipes")[2]))
    assert set(recipes.__all__) - {"named_plan"} <= described


def test_the_wings_are_in_the_order_that_is_tested() -> None:
    tree = ast.parse((ROOT / "tests" / "test_structure.py").read_text(encoding="utf-8"))
    order = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ORDER"
    )
    block = re.search(r"```text\n(.*?)```", page("architecture.md"), re.DOTALL)
    assert block is not None
    assert re.findall(r"\w+", block[1]) == [name for name in order if name != "__main__"]


def test_every_variable_that_the_code_reads_is_explained() -> None:
    read = set()
    for file in (ROOT / "yopo").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        read |= set(re.findall(r"environ(?:\.get)?[(\[]\"(YOPO_\w+)\"", text))
    assert {"YOPO_LAYOUT", "YOPO_MASS"} <= read
    explained = "".join(page(p.name) for p in DOCS.glob("*.md"))
    assert {name for name in read if name not in explained} == set()


def test_ruff_is_the_same_wherever_it_is_pinned() -> None:
    """Two versions of a formatter undo each other's work."""
    files = ("pyproject.toml", ".pre-commit-config.yaml")
    found = [re.findall(r"\bruff==([\d.]+)", (ROOT / file).read_text()) for file in files]
    assert all(found), found
    assert len({version for versions in found for version in versions}) == 1, found

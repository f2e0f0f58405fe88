"""Every link of the Markdown pages leads somewhere, wherever the pages are read: in the repository,
on the site, in an installed package."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
_WHERE = ("*.md", "docs/*.md", "benchmarks/*.md", "examples/*/README.md", "examples/*.ipynb")
_WHERE += ("tests/golden/*.md",)
PAGES = [page for pattern in _WHERE for page in sorted(ROOT.glob(pattern))]
_CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)")
MADE = "yopo/models/families/vipllava.py"  # a file that the page has its reader write
_ELSEWHERE = re.compile(r"[a-z]+:", re.IGNORECASE)  # https:, mailto:


def written(page: Path) -> str:
    """What a page says; of a notebook, what is written between the code."""
    text = page.read_text(encoding="utf-8")
    if page.suffix != ".ipynb":
        return text
    cells = json.loads(text)["cells"]
    return "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def links_of(page: Path) -> list[str]:
    text = _CODE.sub("", written(page))
    return [link for link in _LINK.findall(text) if not _ELSEWHERE.match(link)]


def anchors_of(page: Path) -> set[str]:
    """As GitHub makes them; mkdocs looks after its own (scripts/docs.sh)."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.M)
    seen: Counter[str] = Counter()
    anchors = set()
    for title in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        words = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        anchors.add(f"{words}-{seen[words]}" if seen[words] else words)
        seen[words] += 1
    return anchors


def broken(page: Path) -> list[str]:
    wrong = []
    for link in links_of(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists():
            wrong.append(f"{link}: no such file")
        elif anchor and (target.suffix != ".md" or anchor not in anchors_of(target)):
            wrong.append(f"{link}: no such heading")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    assert broken(page) == []


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# One, two: three\n[a](#one-two-three) [b](#four) [c](other.md)\n`[d](code.md)`\n"
        "```\n# no heading\n[e](code.md)\n```\n[f](https://example.org/x) [g](page.md#no-heading)\n"
    )
    found = [line.split(":")[0] for line in broken(page)]
    assert found == ["#four", "other.md", "page.md#no-heading"]


def test_pages_of_docs_link_to_each_other_only() -> None:
    """The site and the installed package have these pages and nothing around them."""
    for page in DOCS.glob("*.md"):
        for link in links_of(page):
            target = (page.parent / link.partition("#")[0]).resolve()
            assert target.is_relative_to(DOCS), (page.name, link)


def test_pages_that_the_code_names_are_there() -> None:
    """An error that names a page must not send its reader to one that is gone."""
    named = set()
    for file in (ROOT / "yopo").rglob("*.py"):
        named |= set(re.findall(r"docs/([\w-]+\.md)", file.read_text(encoding="utf-8")))
    assert "adding-a-family.md" in named
    assert {name for name in named if not (DOCS / name).is_file()} == set()


def test_files_that_pages_name_are_there() -> None:
    """Code spans such as `tests/golden` and commands such as `python examples/….py`."""
    roots = "benchmarks|docs|examples|scripts|tests|yopo"
    missing = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(rf"(?<![\w./-])((?:{roots})/[\w./*-]*[\w*])", text):
            name = name.rstrip(".")
            if name != MADE and not any(ROOT.glob(name)) and not any(page.parent.glob(name)):
                missing.add((str(page.relative_to(ROOT)), name))
    assert missing == set()


def test_the_readme_is_short_and_names_every_page() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    unnamed = {p.name for p in DOCS.glob("*.md") if f"docs/{p.name}" not in text}
    assert unnamed <= {"index.md"}

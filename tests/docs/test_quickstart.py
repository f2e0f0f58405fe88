"""The Python blocks of README and quickstart, run as they stand; see support/doc_pages.py."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from doc_pages import ROOT, furnish, needs_llava, run, scripts_of
from packaging.version import Version

# What each script of a page must print; the picture shows something red.
PRINTS = {
    "README.md": [["from layer 5 of 6 on", "ASSISTANT: red"], []],
    "docs/quickstart.md": [["dense:  red", "pruned: red", "True"], ["red"], ["[1, 46, 100]"]],
}
SCRIPTS = {f"{p}-{n}": s for p in PRINTS for n, s in enumerate(scripts_of(ROOT / p), 1)}
WITH_LLAVA = [name for name, script in SCRIPTS.items() if needs_llava(script)]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(transformers.__version__) < Version("4.57"),
        reason="the embedded model in transformers' format has a processor from 4.57 on",
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder with the models and the picture that the pages name."""
    made = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        furnish(made)
        yield made


def check(name: str, folder: Path) -> None:
    page, number = name.rsplit("-", 1)
    printed = run(SCRIPTS[name], folder)
    for words in PRINTS[page][int(number) - 1]:
        assert words in printed


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in WITH_LLAVA])
def test_a_block_does_what_its_page_says(name: str, folder: Path) -> None:
    check(name, folder)


@pytest.mark.llava
@pytest.mark.skipif(find_spec("llava") is None, reason="llava-torch is not installed")
@pytest.mark.parametrize("name", WITH_LLAVA)
def test_a_block_with_the_original_llava_does_what_its_page_says(name: str, folder: Path) -> None:
    check(name, folder)


def test_every_script_is_expected_to_print_something_known() -> None:
    for page, expected in PRINTS.items():
        assert len(scripts_of(ROOT / page)) == len(expected), page
    assert len(WITH_LLAVA) == 2

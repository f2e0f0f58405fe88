"""examples/prune_step_by_step.ipynb runs from top to bottom, without a network, and says what it
says in the repository."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import transformers
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "prune_step_by_step.ipynb"
NEEDS = ("nbclient", "ipykernel", "matplotlib", "easy_vqa")


def said(cells: list[dict]) -> str:
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    return "".join("".join(o["text"]) for o in outputs if o["output_type"] == "stream")


@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.57"),
    reason="the embedded model in transformers' format has a processor from 4.57 on",
)
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in NEEDS:
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # more wait for each other on a busy machine
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    place = {"metadata": {"path": str(NOTEBOOK.parent)}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=place).execute()
    printed = said(notebook.cells)
    assert printed.count("what color is the shape? red") == 3
    assert "the same plan: True" in printed


def test_the_notebook_is_kept_with_its_pictures_and_small() -> None:
    """`jupyter execute --inplace examples/prune_step_by_step.ipynb` writes it anew."""
    assert NOTEBOOK.stat().st_size < 200_000
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert said(cells).count("what color is the shape? red") == 3
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
    for place in ("/tmp/", "/home/", "/root/", "site-packages"):
        assert place not in said(cells)

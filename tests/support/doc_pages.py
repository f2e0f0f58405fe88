"""The Python of Markdown pages, run word for word in an empty folder, as a reader would run it.

Where a page names a model of the Hub, the folder holds one under that very name, which
from_pretrained prefers to a download: the embedded tiny LLaVA, in the format of the name's. The
picture that pages open is of the kind that this model knows. So nothing in the code is replaced.

Imports nothing of yopo: scripts/wheel.sh runs this file by an installed wheel's Python, outside of
the repository: `python …/tests/support/doc_pages.py PAGE…`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny_llava"
TRANSFORMERS_LLAVA = "llava-hf/llava-1.5-7b-hf"
ORIGINAL_LLAVA = "zwt123home123/llava-1.5-7b-prune-zp12"
PICTURE = "shape.png"  # of a red one

_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def scripts_of(page: Path) -> list[str]:
    """The Python blocks of a page. One that begins with an import is a script of its own; any other
    goes on from the block before it."""
    scripts: list[str] = []
    for block in _BLOCK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"(import|from) ", block):
            scripts.append(block)
        else:
            scripts[-1] += "\n" + block
    return scripts


def needs_llava(script: str) -> bool:
    """Whether a script imports the original LLaVA package."""
    return re.search(r"^(import|from) llava\b", script, re.MULTILINE) is not None


def furnish(folder: Path) -> None:
    """Puts the models and the picture that pages name into `folder`."""
    shutil.copy(TINY / "images" / "easy-vqa-test-0.png", folder / PICTURE)
    checkpoints = TINY / "checkpoints"
    pruned = folder / ORIGINAL_LLAVA
    shutil.copytree(checkpoints / "tiny-llava-v1-pruned", pruned)
    config = json.loads((pruned / "config.json").read_text(encoding="utf-8"))
    config["mm_vision_tower"] = str(TINY / "clip-tiny")  # there it is relative to the repository
    (pruned / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / TRANSFORMERS_LLAVA).parent.mkdir(parents=True)
    dense = str(checkpoints / "tiny-llava-v1-dense")
    tower = ["--vision-tower", str(TINY / "clip-tiny")]
    _python(folder, "-m", "yopo", "convert", dense, TRANSFORMERS_LLAVA, *tower)


def run(script: str, folder: Path) -> str:
    """What a script prints, run in `folder` by this Python. Raises RuntimeError where it fails."""
    return _python(folder, "-c", script)


def _python(folder: Path, *words: str) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")  # more wait for each other on a busy machine
    environment.pop("YOPO_MASS", None)
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def main(pages: list[str]) -> None:
    """Runs the pages' scripts in the working folder, which must be empty."""
    here = Path.cwd()
    if list(here.iterdir()):
        raise SystemExit(f"{here} is not empty: the pages run where nothing else can be found")
    furnish(here)
    for page in pages:
        for number, script in enumerate(scripts_of(Path(page)), 1):
            print(f"== {page}, script {number}", flush=True)
            print(run(script, here), end="", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

#!/usr/bin/env bash
# Builds the wheel, installs it into an empty environment, and there runs every Python block of README
# and quickstart from an empty folder: what a user gets who has nothing of this repository.
#
#   scripts/wheel.sh [FOLDER]      keeps the wheel in FOLDER (default: thrown away)
#
# torch, transformers and the original LLaVA are those of .venv, which is made if it is not there.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

use_venv "$ROOT/.venv"
install_llava
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
wheels="${1:-$work/wheels}"

# From a copy: setuptools leaves build/ where it builds, and takes into the wheel what it finds there.
mkdir "$work/source"
(cd "$ROOT" && cp -R LICENSE README.md docs pyproject.toml yopo "$work/source")
"$PY" -m pip wheel -q --disable-pip-version-check --no-deps -w "$wheels" "$work/source"

"$PY" -m venv "$work/venv"
installed="$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"
"$work/venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps "$wheels"/yopo-*.whl
# Behind the environment's own packages; a yopo installed in .venv is a .pth file there, unread here.
"$PY" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$installed/of_the_repository.pth"

mkdir "$work/empty"
cd "$work/empty"
"$work/venv/bin/python" - "$installed" <<'PYTHON_CODE'
import sys
from pathlib import Path

import yopo
from yopo.models.families import unknown

here = Path(yopo.__file__).resolve()
assert here.is_relative_to(Path(sys.argv[1]).resolve()), f"yopo comes from {here}"
pages = {page.name for page in (here.parent / "docs").iterdir()}
assert "adding-a-family.md" in str(unknown(object())) and "adding-a-family.md" in pages, pages
PYTHON_CODE
"$work/venv/bin/yopo" flops --preset llava-1.5-7b --plan 25 --json >/dev/null
"$work/venv/bin/python" "$ROOT/tests/support/doc_pages.py" "$ROOT/README.md" "$ROOT/docs/quickstart.md"

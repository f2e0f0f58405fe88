#!/usr/bin/env bash
# All that must hold: the code's form and types; the suite in .venv with the newest supported
# transformers; the drop-in tests with the oldest, families and golden files with two between
# (scripts/compat.sh); the documentation's links (docs.sh); the wheel in an empty environment
# (wheel.sh). Makes the environments that are missing. What CI runs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

use_venv "$ROOT/.venv"
install_llava "$TRANSFORMERS_VERSION" "$TORCH_VERSION"
install_missing "${TEST_NEEDS[@]}" "${NEWEST_NEEDS[@]}"
cd "$ROOT"
"$PY" -m ruff check .
"$PY" -m ruff format --check .
"$PY" -m mypy
"$PY" -m pytest -q "${TEST_PROCESSES[@]}" -m "not llava and not versions"
"$PY" -m pytest -q "${TEST_PROCESSES[@]}" -m "llava and not versions"
bash scripts/wheel.sh
bash scripts/docs.sh
bash scripts/compat.sh 4.36.2
YOPO_COMPAT_NEEDS="peft" YOPO_COMPAT_TESTS="tests/engine/test_golden.py tests/models/test_families.py \
tests/models/test_families_attach.py tests/models/test_families_generate.py" \
    bash scripts/compat.sh 4.45.2 4.57.6

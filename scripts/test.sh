#!/usr/bin/env bash
# The test suite: in .venv with the newest supported transformers, then the drop-in tests with the
# oldest (scripts/compat.sh). Makes the environments that are missing. What CI runs.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

use_venv "$ROOT/.venv"
install_llava "$TRANSFORMERS_VERSION" "$TORCH_VERSION"
install_missing "${TEST_NEEDS[@]}" ruff peft
cd "$ROOT"
"$PY" -m ruff check .
"$PY" -m pytest -q -m "not llava and not versions"
"$PY" -m pytest -q -m "llava and not versions"
exec bash scripts/compat.sh 4.36.2

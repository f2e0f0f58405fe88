#!/usr/bin/env bash
# Builds the documentation into build/site, in an environment of its own (.venvs/docs). Fails at a
# link or an anchor that leads nowhere, and at a page that the navigation forgot.
#
#   scripts/docs.sh            build/site/index.html is the first page
#   scripts/docs.sh serve      shows it on http://127.0.0.1:8000 and follows changes
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

use_venv "$ROOT/.venvs/docs"
install_missing mkdocs-material mkdocstrings-python
cd "$ROOT"
export NO_MKDOCS_2_WARNING=1 # its makers' advertisement of another tool
if [[ ${1:-} == serve ]]; then
    exec "$PY" -m mkdocs serve
fi
# Not --quiet, which would hide the warnings from --strict as well.
exec "$PY" -m mkdocs build --strict

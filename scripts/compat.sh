#!/usr/bin/env bash
# Runs the drop-in tests with other versions of transformers, each in an environment of its own
# under .venvs/, which is kept for the next run. Exits non-zero if a test failed in any.
#
#   scripts/compat.sh [--torch V] VERSION…        e.g. scripts/compat.sh 4.36.2 4.45.2
#
# PYTHON=python3.10 scripts/compat.sh --torch 2.1.2 4.37.2 is LLaVA's own environment (its torch is
# a large CUDA build). YOPO_COMPAT_TESTS replaces the arguments given to pytest; YOPO_COMPAT_NEEDS
# names packages to install besides: peft and scikit-learn, for all of tests/models/test_families*.py.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

torch=
if [[ ${1:-} == --torch ]]; then
    torch=${2:?--torch needs a version}
    shift 2
fi
[[ $# -gt 0 ]] || die "which versions of transformers? e.g. scripts/compat.sh 4.36.2 5.23.0"

tests=(-m "not versions and not slow")
if [[ -n ${YOPO_COMPAT_TESTS:-} ]]; then read -r -a tests <<<"$YOPO_COMPAT_TESTS"; fi
cd "$ROOT"
failed=()
for version in "$@"; do
    use_venv "$ROOT/.venvs/$version${torch:+-torch$torch}"
    install_llava "$version" "${torch:-$TORCH_VERSION}"
    install_missing "${TEST_NEEDS[@]}" ${YOPO_COMPAT_NEEDS:-}
    echo "== transformers $version, torch ${torch:-$TORCH_VERSION}"
    "$PY" -m pytest -q -p no:cacheprovider "${TEST_PROCESSES[@]}" "${tests[@]}" || failed+=("$version")
done
if [[ ${#failed[@]} -gt 0 ]]; then
    echo "compat.sh: tests failed with transformers ${failed[*]}" >&2
    exit 1
fi

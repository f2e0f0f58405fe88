#!/usr/bin/env bash
# Sanity check: answers a question about an image with a pruned LLaVA, through LLaVA's own command
# line. On a fresh machine it makes .venv and installs what is missing; later runs start at once.
#
#   scripts/infer.sh [--model-path P] [--image-file F] [--question Q] [--device auto|cpu|cuda]
#                    [--mass HEAD[/CUT]]
#
# Without arguments: the embedded pruned checkpoint, and an image and a question of its kind.
# P is a folder or a Hub id, such as zwt123home123/llava-1.5-13b-prune-zp25.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

if [[ -n ${VIRTUAL_ENV:-} ]]; then
    PY="$VIRTUAL_ENV/bin/python"
elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-base} != base ]]; then
    PY="$CONDA_PREFIX/bin/python"
else
    use_venv "$ROOT/.venv"
fi
install_llava
if ! has_module yopo; then
    echo "Installing yopo (editable)" >&2
    "$PY" -m pip install -qq --disable-pip-version-check --no-deps -e "$ROOT"
fi

# The embedded checkpoint names its vision tower relative to the repository, so the command runs
# there; what the user names is meant from where the user is.
arguments=()
option=
for word in "$@"; do
    value=$word
    prefix=
    if [[ $word == --model-path=* || $word == --image-file=* ]]; then
        prefix="${word%%=*}="
        option="${word%%=*}"
        value="${word#*=}"
    fi
    if [[ $option == --image-file && $value != http://* && $value != https://* && $value != /* ]] ||
        [[ $option == --model-path && $value != /* && (-e $value || $value == .*) ]]; then
        value="$PWD/$value"
    fi
    arguments+=("$prefix$value")
    option=$word
done
cd "$ROOT"
exec "$PY" -m yopo infer ${arguments[@]+"${arguments[@]}"}

# Sourced by the other scripts: makes Python environments, and installs only what is missing.
# Does nothing by itself. PYTHON chooses the interpreter that new environments are made with.
#
# On a CPU-only machine, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu spares the
# download of torch's CUDA libraries.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TORCH_VERSION=2.13.0
TRANSFORMERS_VERSION=5.24.0
LLAVA_REQUIREMENT=llava-torch==1.2.2.post1 # the original LLaVA package
LLAVA_NEEDS=(pillow accelerate sentencepiece requests protobuf)
TEST_PROCESSES=(-n "${YOPO_TEST_PROCESSES:-2}") # pytest-xdist's; a test takes one core
TEST_NEEDS=(pytest pytest-xdist hypothesis tabulate matplotlib easy-vqa scikit-learn tqdm)
NEWEST_NEEDS=(ruff==0.17.6 mypy peft bitsandbytes trl torchao deepspeed nbclient ipykernel) # with the newest transformers alone

die() {
    echo "${0##*/}: $*" >&2
    exit 2
}

# Prints the first Python from 3.10 on: $PYTHON alone if set, else the usual names.
find_python() {
    local name
    for name in ${PYTHON:-python3 python3.12 python3.11 python3.10 python3.13 python}; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    die "needs Python 3.10 or newer and found none (tried: ${PYTHON:-python3 …}); set PYTHON=…"
}

# use_venv DIR: sets PY to the Python of the environment DIR, made if it is not there.
use_venv() {
    PY="$1/bin/python"
    if ! "$PY" -m pip --version >/dev/null 2>&1; then
        local python
        python="$(find_python)" || exit 2
        echo "Making $1 ($("$python" --version))" >&2
        "$python" -m venv --clear "$1" || die "no venv could be made (Debian: apt install python3-venv)"
    fi
}

# missing REQUIREMENT…: prints those (NAME or NAME==VERSION) that $PY does not have.
missing() {
    "$PY" - "$@" <<'PYTHON_CODE'
import sys
from importlib.metadata import PackageNotFoundError, version

for requirement in sys.argv[1:]:
    name, _, pin = requirement.partition("==")
    try:
        found = version(name).split("+")[0]
    except PackageNotFoundError:
        found = None
    if found is None or (pin and found != pin):
        print(requirement)
PYTHON_CODE
}

# has_module NAME: whether $PY can import it from anywhere.
has_module() {
    (cd / && "$PY" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)")
}

# install_missing [PIP OPTION… --] REQUIREMENT…: installs those that $PY does not have.
install_missing() {
    local options=() absent
    if [[ " $* " == *" -- "* ]]; then
        while [[ $1 != -- ]]; do
            options+=("$1")
            shift
        done
        shift
    fi
    mapfile -t absent < <(missing "$@")
    [[ ${#absent[@]} -eq 0 ]] && return
    echo "Installing ${absent[*]}" >&2
    # No warnings about conflicts: llava-torch's pins belong to 2023 and are passed over knowingly.
    "$PY" -m pip install -qq --disable-pip-version-check --no-warn-conflicts \
        ${options[@]+"${options[@]}"} "${absent[@]}" || die "pip could not install ${absent[*]}"
}

# install_llava [TRANSFORMERS [TORCH]]: torch first, so that nothing else pulls another build of it.
# Without versions, whatever version of torch, transformers and LLaVA is there already is left alone.
install_llava() {
    local transformers=${1:+transformers==$1} torch=${2:+torch==$2} extra=()
    if [[ -z $torch && -n $(missing torch) ]]; then torch=torch==$TORCH_VERSION; fi
    if [[ -z $transformers && -n $(missing transformers) ]]; then
        transformers=transformers==$TRANSFORMERS_VERSION
    fi
    # Wheels of torch up to 2.2 were built against numpy 1.
    if [[ ${2:-} == 2.[012].* ]]; then extra=("numpy<2"); fi
    install_missing ${torch:+"$torch"}
    if [[ -n ${1:-} ]] || ! has_module llava; then
        install_missing --no-deps -- "$LLAVA_REQUIREMENT"
    fi
    if [[ -n ${extra[*]-} && -n $(missing numpy) ]]; then
        "$PY" -m pip install -qq --disable-pip-version-check "${extra[@]}" || die "no numpy<2"
    fi
    install_missing ${transformers:+"$transformers"} "${LLAVA_NEEDS[@]}"
}

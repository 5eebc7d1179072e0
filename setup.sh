#!/bin/sh
# Makes .venv with what this machine needs: vLLM for CUDA where an NVIDIA GPU is seen, vLLM for the CPU elsewhere.
#   setup.sh        install, unless that is done; HARDWARE=gpu or cpu: do not look for the GPU, as where an image is built
#   setup.sh lock   write requirements.txt and requirements-cpu.txt anew from pyproject.toml
set -eu
cd "$(dirname "$0")"
UV_VERSION=0.13.8
: "${PYTHON:=$(command -v python3.11 || command -v python3 || true)}"
fail() { echo "setup: $*" >&2; exit 1; }

"$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' ||
    fail "Python 3.11 or 3.12 is needed: name one, as in  make chat PYTHON=/usr/bin/python3.11"
uv=$(command -v uv || true)
if [ -z "$uv" ] || [ "$("$uv" --version | cut -d' ' -f2)" != "$UV_VERSION" ]; then
    uv=.tools/bin/uv
    if [ ! -x $uv ]; then
        "$PYTHON" -m venv .tools || fail "python3 -m venv failed: on Debian, apt install python3-venv"
        .tools/bin/pip install -q --disable-pip-version-check "uv==$UV_VERSION"
    fi
fi
# uv does not read pip's settings: a folder of wheels that is configured for pip may hold the CPU build of torch.
wheels=${PIP_FIND_LINKS:+--find-links $PIP_FIND_LINKS}
case ${PIP_FIND_LINKS:-} in
    "") torch="--torch-backend cpu" ;;
    *) ls "$PIP_FIND_LINKS"/torch-*+cpu*.whl >/dev/null 2>&1 && torch="" || torch="--torch-backend cpu" ;;
esac

if [ "${1:-}" = lock ]; then
    common="--python-version 3.11 --no-annotate --no-header --quiet"
    $uv pip compile pyproject.toml --extra gpu --extra dev $common -o requirements.txt
    # These come as CUDA builds only, and break or bloat the CPU environment.
    printf 'torchaudio\ntorchcodec\ntriton\n' >.excludes
    $uv pip compile pyproject.toml --extra cpu --extra dev $common $wheels $torch --excludes .excludes -o requirements-cpu.txt
    rm .excludes
    exit
fi

if [ -z "${HARDWARE:-}" ]; then
    nvidia-smi -L >/dev/null 2>&1 && HARDWARE=gpu || HARDWARE=cpu
fi
case $HARDWARE in
    gpu) requirements=requirements.txt torch= ;;
    cpu)
        requirements=requirements-cpu.txt
        # Beside a torch that is a file, PyPI's torchvision would be taken: a CUDA build, with which vLLM cannot be imported.
        [ -n "$torch" ] || ls "$PIP_FIND_LINKS"/torchvision-*+cpu*.whl >/dev/null 2>&1 || left_out=torchvision
        ;;
    *) fail "HARDWARE is gpu or cpu, not $HARDWARE" ;;
esac
stamp=.venv/$( { cat $requirements pyproject.toml setup.sh; echo "$PYTHON"; } | cksum | cut -d' ' -f1)
[ -e "$stamp" ] && exit
echo "Installing $requirements into .venv (once; 1 to 5 minutes) …" >&2
$uv venv --quiet --clear --python "$PYTHON" --no-python-downloads .venv
export VIRTUAL_ENV=.venv
# shellcheck disable=SC2086
grep -v "^${left_out:-nothing}==" $requirements | $uv pip install --quiet --no-deps --compile-bytecode $wheels $torch -r -
$uv pip install --quiet --no-deps --no-build-isolation --editable .
touch "$stamp"

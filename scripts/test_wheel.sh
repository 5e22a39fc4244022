#!/usr/bin/env bash
# Installs a wheel beside the torch of an environment, and runs each operator's main tests against what was installed:
#
#   scripts/test_wheel.sh PYTHON WHEEL
#
# PYTHON is the interpreter of an environment that has torch. Works from a copy, out of reach of the repository, so that
# what is imported is what was installed.
set -euo pipefail
python=$(realpath -s "$(command -v "$1")") wheel=$(realpath "$2") # -s: an environment knows itself by its link
cd "$(dirname "$0")/.."
work=$(mktemp -d "${TMPDIR:-/tmp}/fga_fast_wheel.XXXXXX")
trap 'rm -rf "$work"' EXIT

"$python" -m pip install --quiet "numpy<2.4" pytest pytest-xdist hypothesis "$wheel"
tests=(tests/ops/test_{attention,gate,score,score_bounded}.py)
cp tests/conftest.py tests/conformance.py tests/explicit_*.py "${tests[@]}" "$work/"
cd "$work"
"$python" -c "import torch, fga_fast; print('torch', torch.__version__, fga_fast.__file__)"
# Not as in CI, where no test may be skipped for a missing library: timm is missing.
env -u CI OMP_NUM_THREADS=2 "$python" -m pytest -q -k "not hundred_million" --numprocesses auto --rootdir "$work" "$work"

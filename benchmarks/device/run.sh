#!/usr/bin/env bash
# Proves and measures this project on a machine with an NVIDIA GPU and no network, in under 10 minutes.
#
# STATUS: this script has never run on a device. Its build and its CPU steps have run on a machine without one.
#
# Needs: nvcc, and a Python with torch (CUDA), timm (with safetensors), numpy, pytest, ninja, pip, setuptools. Nothing else.
# Installs this tree, editable, into that Python.
# Optional: hypothesis (for some op tests), compute-sanitizer, cmake (for the C++ session) and pybind11 (for its rows),
# conformance numbers in $FGA_FAST_CONFORMANCE, a built C++ project in $FGA_FAST_CMAKE_BUILD.
# Use: benchmarks/device/run.sh [OUT]    writes rows and run.log to OUT; by default rows to benchmarks/results and the log
# to a temporary folder
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1

python=${PYTHON:-python3}
out=${1:-benchmarks/results}
mkdir -p "$out" || exit 1
log=${1:-$(mktemp -d "${TMPDIR:-/tmp}/fga_fast_device.XXXXXX")}/run.log # one file, because some machines return few
: >"$log"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 MAX_JOBS=${MAX_JOBS:-$(nproc)}
summary=()
failed=0

# step NAME UNTIL COMMAND...: runs the command, at most until second UNTIL of the script, logs it and notes its result. A
# fast step leaves its time to the next one; a slow step cannot take the time reserved for the rows.
step() {
  local name=$1 limit=$(($2 > SECONDS + 5 ? $2 - SECONDS : 5)) status
  shift 2
  printf '\n=== %4d s  %s\n' "$SECONDS" "$name" | tee -a "$log"
  begin=$(($(wc -c <"$log") + 1))
  timeout "$limit" "$@" >>"$log" 2>&1
  status=$?
  said | tail -n 15
  if [[ $status -eq 0 ]]; then
    summary+=("$(printf '%-12s passed   %s' "$name" "$(said | tail -n 1 | cut -c1-90)")")
  else
    summary+=("$(printf '%-12s FAILED with status %d, log %s' "$name" "$status" "$log")")
    failed=1
  fi
  return "$status"
}

# Prints the output of the last step.
said() { tail -c "+$begin" "$log"; }

skip() { summary+=("$(printf '%-12s skipped  %s' "$1" "$2")"); }

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || true

# Machine code for this device only: CI compiles the others.
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1)
[[ -n $arch ]] && export TORCH_CUDA_ARCH_LIST=${arch/9.0/9.0a}
if ! FGA_FAST_CUDA=1 step build 200 "$python" -m pip install --no-index --no-deps --no-build-isolation -e .; then
  printf '\n'
  printf '%s\n' "${summary[@]}"
  exit 1
fi

export FGA_FAST_REQUIRE_CUDA=1

# Operators and whole explanations on the device, against the reference in float64 on the CPU.
step cuda-tests 300 "$python" -m pytest -q -p no:cacheprovider tests/ops/test_gate_cuda.py tests/ops/test_attention_cuda.py \
  tests/kernels/test_kernels_cuda.py tests/test_explainer_cuda.py tests/graph/test_compiled_cuda.py

if [[ -n ${FGA_FAST_CONFORMANCE:-} ]]; then
  step conformance 350 "$python" -m pytest -q -p no:cacheprovider tests/test_conformance_cuda.py
else
  skip conformance "FGA_FAST_CONFORMANCE is not set"
fi

if command -v compute-sanitizer >/dev/null; then
  declare -A until=([memcheck]=380 [racecheck]=410)
  for tool in memcheck racecheck; do
    step "$tool" "${until[$tool]}" compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" -m pytest -q -p no:cacheprovider tests/ops/test_gate_cuda.py tests/ops/test_attention_cuda.py -k small
  done
else
  skip sanitizer "compute-sanitizer is not on PATH"
fi

# Build the C++ session once, for its test and its rows. If it does not build, both are skipped.
command -v cmake >/dev/null || PATH=$PATH:$(dirname "$(command -v "$python")") # pip puts it there
if [[ -n ${FGA_FAST_CMAKE_BUILD:-} ]]; then
  skip cmake "FGA_FAST_CMAKE_BUILD is set"
elif command -v cmake >/dev/null; then
  built=$(mktemp -d "${TMPDIR:-/tmp}/fga_fast_cmake.XXXXXX")
  trap 'rm -rf "$built"' EXIT
  step cmake 430 benchmarks/device/build_session.sh "$built" "$python" && export FGA_FAST_CMAKE_BUILD=$built
else
  skip cmake "cmake is not on PATH"
fi
if [[ -n ${FGA_FAST_CMAKE_BUILD:-} ]]; then
  # This compiles packages and may take a minute.
  step session 480 "$python" -m pytest -q -rs -p no:cacheprovider tests/runtime/test_runtime_cuda.py
else
  skip session "the C++ project is not built"
fi

step rows 590 "$python" benchmarks/device/rows_cuda.py "$out" --seconds $((SECONDS < 550 ? 560 - SECONDS : 10))
said

printf '\n'
printf '%s\n' "${summary[@]}"
exit "$failed"

#!/usr/bin/env bash
# Builds the C++ session with CMake: build_session.sh FOLDER PYTHON
# Includes the Python module if PYTHON has pybind11. Leaves out tests and examples, which no device step needs.
set -euo pipefail
cd "$(dirname "$0")/../.."

program=$("$2" -c "import sys; print(sys.executable)")
torch=$("$2" -c "import os, torch; print(os.path.dirname(torch.__file__))")
pybind=OFF
if "$2" -c "import pybind11"; then pybind=ON; fi
cmake -S . -B "$1" -DFGA_FAST_TORCH="$torch" -DFGA_FAST_PYBIND=$pybind -DPython3_EXECUTABLE="$program" \
  -DBUILD_TESTING=OFF -DFGA_FAST_EXAMPLES=OFF
cmake --build "$1" --parallel "${MAX_JOBS:-$(nproc)}"

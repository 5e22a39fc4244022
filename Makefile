# Two commands do everything, on a machine with Python 3.10 or newer and a C++ compiler:
#   make demo    set up, build, explain scenes of garments, write the pictures to demo/
#   make test    set up, build, run all tests and linters
# Others: make lint, format, bench, sanitize, wheel, clean.
#
# TORCH=system      use the torch that $(PYTHON) already has, instead of installing the pinned one (make demo)
# PYTHON=python3.12 the interpreter to start from        VENV=folder  where the environment goes
# OUT=folder        where `make demo` writes             FGA_FAST_CUDA=0|1|auto, MAX_JOBS  as in setup.py
# JOBS=4            how many tests run at once (default: as many as there are cores)

PYTHON ?= python3
TORCH ?= pinned
OUT ?= demo
JOBS ?= auto
ifeq ($(TORCH),system)
VENV ?= .venv-system
else
VENV ?= .venv
endif

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
NATIVE := $(wildcard csrc/*.cpp csrc/*.c csrc/*.h csrc/*.txt csrc/cpu/* csrc/cuda/*)
SANITIZED := build/sanitize/libfga_ops.so
OP_TESTS := $(filter-out %/test_isa.py %_cuda.py,$(wildcard tests/ops/test_*.py))
CPP_FILES := $(wildcard csrc/*.cpp csrc/*.c csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*.cu csrc/cuda/*.h tests/csrc/native/*.cpp \
	csrc/runtime/*.cpp csrc/runtime/*.h csrc/runtime/fga_fast/*.h examples/cpp/*.cpp examples/cpp/*.h \
	tests/runtime/*.cpp tests/runtime/*.h tests/runtime/consumer/*.cpp tests/runtime/consumer/*.h)

.PHONY: help demo test check lint format bench sanitize wheel clean
.DELETE_ON_ERROR:

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

$(INSTALLED): constraints.txt pyproject.toml setup.py scripts/make_venv.py $(NATIVE)
	$(PYTHON) scripts/make_venv.py $(VENV) --torch $(TORCH)
	@touch $@

demo: $(INSTALLED)
	$(VENV)/bin/fga-fast explain --out $(OUT)
	@echo "The pictures are:"; for picture in $(abspath $(OUT))/*.png; do echo "  $$picture"; done

test: lint check

# One process a core, each with one thread: the tests' tensors are too small for more.
check: $(INSTALLED)
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder --durations 40

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-cache
	$(VENV)/bin/clang-format --dry-run -Werror $(CPP_FILES)

format: $(INSTALLED)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP_FILES)

# Writes benchmarks/results/cpu-<model>.csv unless BENCH says otherwise, such as BENCH=--quick or BENCH=bench_gate.py
bench: $(INSTALLED)
	$(PY) benchmarks/run.py $(BENCH)

# The operators' tests against a build with AddressSanitizer and UBSan. Python itself leaks at exit, so leaks are off;
# pytest must not capture the file descriptor that the sanitizers write their report to.
sanitize: $(INSTALLED)
	CXX=g++ $(PY) scripts/build_library.py --sanitize $(SANITIZED)
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	FGA_FAST_LIBRARY=$(abspath $(SANITIZED)) OMP_NUM_THREADS=2 \
	$(PY) -m pytest -p no:cacheprovider --capture=sys -k "not hundred_million" --durations 10 --numprocesses $(JOBS) $(OP_TESTS)

# What was built before for other settings must not get into it.
wheel: $(INSTALLED)
	rm -rf build/lib.*
	$(PY) -m pip --disable-pip-version-check wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf build dist demo .venv .venv-system *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .benchmarks
	rm -f fga_fast/*.so
	find fga_fast tests scripts examples benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true

# Polder: a thin layer over CMake. The two commands of the README are `make demo` and `make test`.
BUILD ?= build
STATE ?= $(BUILD)/state
JOBS  ?= $(shell nproc)
CMAKE_FLAGS ?=
MAKEFLAGS += --no-print-directory

.PHONY: all deps build cuda demo test check strict asan fuzz format clean

all: build

# Installs the Debian packages that are missing; says so.
deps:
	@tools/deps.sh

build: deps
	@cmake -S . -B $(BUILD) $(CMAKE_FLAGS) > $(BUILD).log 2>&1 || { cat $(BUILD).log; exit 1; }
	@cmake --build $(BUILD) --parallel $(JOBS)

# The same with the CUDA backend (sm_90a), into build-cuda; needs nvcc, cuBLAS, cuSPARSE and NCCL.
cuda: deps
	@command -v nvcc > /dev/null || { echo "make cuda: nvcc is not on the PATH: install the CUDA Toolkit (12.8 or newer)"; exit 1; }
	@cmake -S . -B $(BUILD)-cuda -DPOLDER_CUDA=ON $(CMAKE_FLAGS) > $(BUILD)-cuda.log 2>&1 || { cat $(BUILD)-cuda.log; exit 1; }
	@cmake --build $(BUILD)-cuda --parallel $(JOBS)

# Starts the server on the bundled model; four tenants ask at once; prints a table; exit 0.
demo: build
	@tools/demo.sh $(BUILD)

# Every test, through ctest.
test: build
	@tools/deps.sh --test
	@cd $(BUILD) && ctest --output-on-failure --timeout 600

# The fast part: under 60 s after a build, no root, no network.
check:
	@cmake -S . -B $(BUILD) $(CMAKE_FLAGS) > $(BUILD).log 2>&1 || { cat $(BUILD).log; exit 1; }
	@cmake --build $(BUILD) --parallel $(JOBS)
	@cd $(BUILD) && ctest --output-on-failure -L fast --timeout 60 --parallel $(JOBS)

# gcc with every warning as an error, optimised; then clang likewise.
strict:
	@tools/deps.sh --ci
	@cmake -S . -B $(BUILD)-strict -DPOLDER_WERROR=ON -DCMAKE_BUILD_TYPE=Release -DCMAKE_C_COMPILER=clang > $(BUILD)-strict.log 2>&1 \
	    || { cat $(BUILD)-strict.log; exit 1; }
	@cmake --build $(BUILD)-strict --parallel $(JOBS)

asan: deps
	@cmake -S . -B $(BUILD)-asan -DPOLDER_ASAN=ON > $(BUILD)-asan.log 2>&1 || { cat $(BUILD)-asan.log; exit 1; }
	@cmake --build $(BUILD)-asan --parallel $(JOBS)
	@cd $(BUILD)-asan && ctest --output-on-failure -LE "slow|timing" --timeout 600

# A short run of each fuzzer (FUZZ_SECONDS each).
fuzz:
	@tools/deps.sh --ci
	@tools/fuzz.sh $(BUILD)-fuzz

format:
	@clang-format -i $$(git ls-files '*.c' '*.h')

clean:
	@rm -rf $(BUILD) $(BUILD)-cuda $(BUILD)-strict $(BUILD)-asan $(BUILD)-fuzz $(BUILD)*.log

# Two commands do everything, set-up included, on Linux with Python 3.11 or later:
#   make demo    trains a network on real images that come with the package, until it has shrunk, and draws a report
#   make check   lint, types of what is changed and the quick tests (tests/quick.txt): a minute, for the inner loop
#   make test    lint, format, types, and the tests but those that tests/long.txt names: a quarter of an hour
#   make test-all  every test, the zoo's too: an hour, before a release and each night
#   make test TORCH=2.14.1  the tests with another PyTorch, in an environment of its own (.venv-2.14.1)
#   make bench   all benchmark suites, tiny, on the GPU or CPU that is there (bench/README.md has the real ones)
#   make sanitize  the native library's tests with AddressSanitizer and UndefinedBehaviorSanitizer
#   make headers   fetches PyTorch 2.11's headers (80 MB), against which tests/test_headers.py then compiles
#   make torture  breaks checkpoints, reconfigurations and runs on purpose, hundreds of times (tests/torture)
#   make zoo     slow tests: more networks, thousands of random ones, a signal to torchrun; writes docs/architectures.md
#   make docs    the documentation as a site, with the Python interface, in build/site
#   make plots   all figures from the committed results, and docs/results.md; once per release
#   make lint    format, lint and types alone
#   make clean   removes the environment, what was built and the tools' caches
#   make help    this list

PYTHON ?= python3
# Empty: PyTorch as constraints.txt pins it. Else that version, with the Triton and torchvision that belong to it.
TORCH :=
VENV := .venv$(TORCH:%=-%)
BIN := $(VENV)/bin
CONSTRAINTS := $(if $(TORCH),$(VENV)/constraints.txt,constraints.txt)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)
DEMO := runs/demo
# Images of 24 x 24 and a network of a few wide layers, because a step of many small ones is mostly overhead, which pruning
# does not shorten. There are 1,260 steps where the paper has 71,000: so the target is to be met early, the lasso begins
# strongly, and it acts by its proximal step.
DEMO_OPTIONS := --model vgg7 --data digits --image-size 24 --epochs 28 --batch 32 --decay-at 0.5,0.8 \
  --channels-last --threads 1 --overwrite
DEMO_PRUNING := --target-flops 0.35 --target-by 0.15 --penalty-ratio 0.6 --proximal

.DEFAULT_GOAL := help
.PHONY: help check demo docs test test-all lint bench sanitize headers torture zoo plots clean

help:
	@sed -n 's/^#   //p' Makefile

ifneq ($(TORCH),)
$(CONSTRAINTS): constraints.txt
	@mkdir -p $(@D)
	sed -e 's/^torch==.*/torch==$(TORCH)/' -e '/^triton==/d' -e '/^torchvision==/d' $< > $@
endif

# PyTorch before the package, whose native library is then built against it; pip would fetch the newest PyTorch for that.
$(VENV)/installed-%: pyproject.toml $(CONSTRAINTS) setup.py $(wildcard csrc/*.py csrc/cpu/*)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch $(if $(TORCH),torchvision)
	$(PIP_INSTALL) -e '.[$*]'
	@touch $@

# Networks that tests prune, and Torch-Pruning beside ours. What they ask for (CUDA's torch, downloads) is not needed.
$(VENV)/installed-zoo: $(VENV)/installed-dev
	$(PIP_INSTALL) --no-deps torchvision timm torch-pruning
	@touch $@

demo: $(VENV)/installed-demo
	@mkdir -p $(DEMO)
	@echo "Two trainings side by side, one core each: dense, for comparison (in $(DEMO)/dense.log), and PruneTrain."
	@$(BIN)/prunetrain train $(DEMO_OPTIONS) --dense --out $(DEMO)/dense > $(DEMO)/dense.log 2>&1 & dense=$$!; \
	  $(BIN)/prunetrain train $(DEMO_OPTIONS) $(DEMO_PRUNING) --out $(DEMO)/pruned || { kill $$dense; exit 1; }; \
	  wait $$dense || { cat $(DEMO)/dense.log; exit 1; }
	@$(BIN)/prunetrain report $(DEMO)/dense $(DEMO)/pruned --out $(DEMO)/report

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Files that differ from the last commit, new ones included; mypy reads what they import, but reports on them alone.
CHANGED = $(shell git diff --name-only --diff-filter=d HEAD -- '*.py' 2>/dev/null; \
  git ls-files --others --exclude-standard -- '*.py' 2>/dev/null)
CHANGED_TYPED = $(filter prunetrain_kernels/% bench/% plots/%,$(CHANGED))
check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CHANGED_TYPED),$(BIN)/mypy $(CHANGED_TYPED))
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q $$(grep -v '^#' tests/quick.txt)

# Types are checked against the pinned PyTorch alone: its stubs change from release to release.
test: $(VENV)/installed-zoo $(if $(TORCH),,lint)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q
	$(MAKE) sanitize

# Times go to build/test-times.txt, from which `python -m tests.times` makes the list of what is too long for `make test`.
test-all: $(VENV)/installed-zoo $(if $(TORCH),,lint)
	rm -f build/test-times.txt
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=more $(BIN)/python -m pytest -p tests.times -n 2 -q -m ""
	$(MAKE) sanitize

# The oldest PyTorch's headers, from its smallest wheel (80 MB; headers are the same for every system).
OLDEST := build/torch-2.11
headers: $(OLDEST)/torch/include
$(OLDEST)/torch/include: | $(VENV)/installed-dev
	$(BIN)/python -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
	  --platform macosx_11_0_arm64 --platform macosx_14_0_arm64 --dest $(OLDEST) torch==2.11.0
	$(BIN)/python -c 'import sys, zipfile; z = zipfile.ZipFile(sys.argv[1]); \
	  z.extractall(sys.argv[2], [n for n in z.namelist() if n.startswith("torch/include/")])' $(OLDEST)/*.whl $(OLDEST)
	rm $(OLDEST)/*.whl

# 200 bit flips, 500 wrong contents, 1,000 injections, 200 kills, a soak of 300 reconfigurations in each way: the parts'
# own counts (tests/torture/__main__.py).
torture: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.torture

zoo: $(VENV)/installed-zoo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q -m slow tests/zoo tests/train
	OMP_NUM_THREADS=1 HYPOTHESIS_PROFILE=long $(BIN)/python -m pytest -q tests/zoo/test_properties.py
	$(BIN)/python -m bench architectures

docs: $(VENV)/installed-docs
	rm -rf build/site-source build/site
	mkdir -p build/site-source
	git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t build/site-source
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "documentation: build/site/index.html"

bench: $(VENV)/installed-demo
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-2} $(BIN)/python -m bench all --quick --out runs/bench

# The interpreter itself is not built with the sanitizers, so their runtime comes first; PyTorch leaks on purpose.
SANITIZED := build/sanitized
sanitize: $(VENV)/installed-dev
	PRUNETRAIN_SANITIZE=1 PRUNETRAIN_NATIVE=1 $(BIN)/python setup.py -q build_ext \
	  --build-temp $(SANITIZED)/objects --build-lib $(SANITIZED)
	PRUNETRAIN_CPU_LIBRARY=$$(echo $(SANITIZED)/prunetrain_kernels/_cpu*.so) OMP_NUM_THREADS=2 \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($${CXX:-c++} -print-file-name=libasan.so) $$($${CXX:-c++} -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest -q -p no:cacheprovider tests/ops -m t0 -k native

plots: $(VENV)/installed-demo
	$(BIN)/python -m plots
	$(BIN)/python -m bench results

clean:
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .mypy_cache .ruff_cache

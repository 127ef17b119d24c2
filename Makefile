# Two commands do all the set-up on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Test processes: one per core and one more, because some tests wait for others' time-outs, with 2 GB for each (a process
# with torch, and a compiler). More than 14 would only wait for the GPU that they share.
WORKERS ?= $(shell $(BIN)/python -c 'import os; print(max(1, min(14, len(os.sched_getaffinity(0)) + 1, \
  os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 31)))')
# Container images set it; then every process compiles the thousand modules of torch again.
unexport PYTHONDONTWRITEBYTECODE
TRACES := tests/data/azure_2023_conversation.csv tests/data/mooncake_conversation.csv

# An engine with the version of its pinned packages: tests/engines/requirements-$(ENGINE).txt. They are installed into a
# folder of their own, which is put before the environment's packages when the tests run.
ENGINE ?= sglang-0.5.23
override ENGINE := $(patsubst vllm,vllm-0.33.0,$(patsubst flashinfer,flashinfer-0.7.2.post1,$(ENGINE)))
ENGINES := build/engines/$(ENGINE)

.PHONY: demo test test-long matrix engines engines-gpu check gpu generate wheel clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "onelaunch needs Python 3.11 or later; name one with PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	# Few of the installed modules are ever imported, and Python compiles those on import.
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## build what the demo needs, then replay two real serving traces; on a GPU, a short bench
	$(BIN)/onelaunch build nsa-decode-3 --target cpu
	@if $(BIN)/python -c 'from onelaunch.build import toolchain; toolchain.preflight_cuda()' 2>/dev/null; \
	then $(BIN)/onelaunch build nsa-decode-3 --target cuda; \
	else echo 'no CUDA toolkit: the CUDA target is not compiled'; fi
	@for trace in $(TRACES); do $(BIN)/onelaunch replay $$trace --step-ms 200 || exit 1; done
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; \
	then $(BIN)/onelaunch bench --quick; else echo 'no GPU: nothing is timed'; fi

test: $(VENV)/.installed  ## run the tests; with nvcc the CUDA target is compiled too, with a GPU also run
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --cov --cov-report=term

test-long: $(VENV)/.installed  ## run the tests that take long and rarely find anything
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m long

# An environment with torch has 5 GB. TESTS='tests/test_binding.py' chooses tests, PYTHONS='3.11 3.13' interpreters.
matrix:  ## run the tests on the oldest and the newest Python and torch; says which interpreters there aren't
	WORKERS=$(or $(WORKERS),2) $(PYTHON) tests/matrix.py $(PYTHONS:%=--python %) $(TESTS)

$(ENGINES)/.installed: tests/engines/requirements-$(ENGINE).txt $(wildcard tests/engines/*-imports.txt) | $(VENV)/.installed
	rm -rf $(ENGINES)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --no-deps --require-hashes \
	  --target $(ENGINES) -r $<
	touch $@

engines: $(ENGINES)/.installed  ## run the integrations on an engine's own classes, on a CPU; WRITE=1 for README and results
	rm -f $(ENGINES).jsonl
	PYTHONPATH=$(ENGINES) TRITON_INTERPRET=1 ONELAUNCH_TEST_CACHE=build/engines/cache \
	  ONELAUNCH_ENGINE_RESULTS=$(CURDIR)/$(ENGINES).jsonl \
	  $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests/engines
	ONELAUNCH_ENGINE_RESULTS=$(ENGINES).jsonl $(BIN)/python tests/engines/results.py $(ENGINE) $(if $(WRITE),--write)

# A machine without a network gets what it lacks from BUNDLE, which tests/engines/gpu/bundle.py makes.
engines-gpu:  ## SGLang 0.5.17 end to end on a GPU, with and without onelaunch, in $(PYTHON)'s own environment
	$(PYTHON) tests/engines/gpu/run.py tokens times seams $(if $(BUNDLE),--bundle $(BUNDLE))

check: $(VENV)/.installed  ## static checks, of the wheel too, and an audit of the dependencies
	$(BIN)/ruff check generator cli tests templates
	$(BIN)/ruff format --check generator cli tests templates
	# mypy doesn't follow an editable install's mapping of folders, so it reads the package in its installed layout.
	rm -rf build/typing && mkdir -p build/typing/onelaunch
	ln -s $(CURDIR)/generator/* $(CURDIR)/cli $(CURDIR)/templates build/typing/onelaunch/
	MYPYPATH=build/typing $(BIN)/mypy -p onelaunch
	# Likewise. The contracts are in pyproject.toml.
	cd build/typing && PYTHONPATH=. $(abspath $(BIN))/lint-imports --no-cache --no-logo $(CURDIR)/pyproject.toml
	$(BIN)/clang-format --dry-run --Werror generated/*.cu $(wildcard templates/device/*.cuh templates/*.cpp templates/binding/*.h)
	$(BIN)/onelaunch generate --check
	rm -rf build/wheel
	# Without isolation, which is quicker. make wheel and CI build in isolation, which shows that nothing else is needed.
	$(BIN)/python -m build --no-isolation --outdir build/wheel >build/wheel.log 2>&1 || { cat build/wheel.log; exit 1; }
	$(BIN)/check-wheel-contents build/wheel/*.whl
	# A finding fails the check. If the advisories can't be downloaded, the last line says so.
	$(BIN)/pip-audit --progress-spinner off --skip-editable >build/audit.log 2>&1 || { tail -n 20 build/audit.log; \
	  ! grep -q '^Found ' build/audit.log && echo 'The dependencies were not audited: pip-audit has no advisories here.'; }

gpu: $(VENV)/.installed  ## everything that needs a GPU; writes tests/gpu/evidence.json
	$(BIN)/python tests/gpu/run.py
	$(BIN)/onelaunch bench --series --json tests/gpu/bench.json --plot tests/gpu/bench.png
	$(BIN)/python tests/gpu/table.py

generate: $(VENV)/.installed  ## write what is generated: the emitted CUDA of every preset, and REFERENCE.md
	$(BIN)/onelaunch generate
	$(BIN)/python tests/manual.py

wheel: $(VENV)/.installed  ## build sdist and wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/check-wheel-contents dist/*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info

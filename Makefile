# Two commands do all the set-up on a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TRACES := tests/data/azure_2023_conversation.csv tests/data/mooncake_conversation.csv

.PHONY: demo test check gpu generate wheel clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "onelaunch needs Python 3.11 or later; name one with PYTHON=..."'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

demo: $(VENV)/.installed  ## build what the demo needs, then replay two real serving traces
	$(BIN)/onelaunch build nsa-decode-3 --target cpu
	@if $(BIN)/python -c 'from onelaunch import toolchain; toolchain.preflight_cuda()' 2>/dev/null; \
	then $(BIN)/onelaunch build nsa-decode-3 --target cuda; \
	else echo 'no CUDA toolkit: the CUDA target is not compiled'; fi
	@for trace in $(TRACES); do $(BIN)/onelaunch replay $$trace --step-ms 200 || exit 1; done

test: $(VENV)/.installed  ## run the tests; with nvcc the CUDA target is compiled too, with a GPU also run
	$(BIN)/python -m pytest -n 2 --dist worksteal

check: $(VENV)/.installed  ## static checks
	$(BIN)/ruff check generator cli tests templates
	$(BIN)/ruff format --check generator cli tests templates
	# mypy doesn't follow an editable install's mapping of folders, so it gets the package as it is installed.
	rm -rf build/typing && mkdir -p build/typing/onelaunch
	ln -s $(CURDIR)/generator/* $(CURDIR)/cli $(CURDIR)/templates build/typing/onelaunch/
	MYPYPATH=build/typing $(BIN)/mypy -p onelaunch
	$(BIN)/clang-format --dry-run --Werror generated/*.cu
	$(BIN)/onelaunch generate --check

gpu: $(VENV)/.installed  ## everything that needs a GPU; writes tests/gpu/evidence.json
	$(BIN)/python tests/gpu/run.py
	$(BIN)/python tests/gpu/table.py

generate: $(VENV)/.installed  ## write the emitted CUDA of every preset
	$(BIN)/onelaunch generate

wheel: $(VENV)/.installed  ## build sdist and wheel into dist/
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/check-wheel-contents dist/*.whl

clean:
	rm -rf $(VENV) build dist *.egg-info

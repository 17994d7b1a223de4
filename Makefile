# Two commands: `make demo` and `make test`. Only Python (3.11 or newer) and make are needed.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test lint docs clean

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "secateur needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	@rm -rf demo
	$(BIN)/secateur prune smollm2 --method taylor --target 90% --round-to 8 --seqlen 128 --recover lora --steps 8 \
	    --tasks english --limit 64 --latency --out demo/smollm2-90 --report demo/report.html
	@echo; echo "The smaller model, loaded by plain transformers:"
	@$(BIN)/python benchmarks/generate.py demo/smollm2-90 "The capital of France is"

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python -m secateur.report.pages docs/methods

clean:
	rm -rf $(VENV) demo build *.egg-info

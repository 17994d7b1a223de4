# Two commands: `make demo` and `make test`. Only Python (3.11 or newer) and make are needed.
# What they install is constraints.txt, that is what was tested. `make demo CONSTRAINTS=` takes the newest that pyproject.toml
# allows instead.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# What reaches into other libraries, or compares with them.
VERSIONED := tests/utils tests/doctor tests/tokens tests/io tests/measure $(wildcard tests/methods/test_tokens_*.py) tests/cli tests/report \
    tests/saliency tests/training/test_recover.py tests/tasks/test_gguf.py tests/test_hostile.py

.PHONY: demo test test-versions update lint docs docs-site gallery release-check clean

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "secateur needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check $(CONSTRAINTS:%=-c %) -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed
	@rm -rf demo
	$(BIN)/secateur demo --out demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup tests

test-versions: $(VENV)/.installed
	$(BIN)/python tools/versions.py show
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadgroup $(VERSIONED)

# In an environment of its own, so that nothing but what pyproject.toml asks for is written down.
update:
	rm -rf .update
	$(MAKE) .update/.installed VENV=.update CONSTRAINTS=
	for step in newest oldest tested; do .update/bin/python tools/versions.py $$step || exit; done
	.update/bin/pip list --outdated  # among them what the bounds keep out
	$(MAKE) test VENV=.update CONSTRAINTS=
	rm -rf .update

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.installed
	$(BIN)/python -m secateur.report.pages docs/methods
	$(BIN)/python benchmarks/truth.py

# The site, in site/; a link that leads nowhere stops it.
docs-site: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --site-dir site
	@echo "site/index.html"

gallery: $(VENV)/.installed
	$(BIN)/python benchmarks/gallery.py docs/gallery

release-check: $(VENV)/.installed
	$(BIN)/python tools/release.py

clean:
	rm -rf $(VENV) .update demo build site *.egg-info

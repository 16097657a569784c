# Python 3.10 or newer, make and git are all that has to be there; everything else goes into .venv.
#   make book [PRESET=tiny]   run the notebooks, build the book, print the address of its first page; JOBS=1 runs one page
#                             at a time with all cores (as where they share a GPU), else two do, with half of them each
#   make check                    style, unit and property tests: about three minutes on two cores
#   make test [ARGS="-k house"]   style, all tests, browser, book, every notebook with its default parameters
#                                 THREADS=2 gives each of its two processes, and those of `check`, two threads
#   make lab [ARGS=--no-browser]  JupyterLab on the notebook sources
#   make world                the Picture World datasets alone

PYTHON ?= $(shell command -v python3 || command -v python)
PRESET ?= tiny
JOBS ?= 2
THREADS ?= 1
BIN := .venv/bin
READY := .venv/ready
LAB := build/lab
DOIT := $(BIN)/doit

# A thread that waits leaves its core to others: beside other work, two threads were three times slower without this.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := book
.PHONY: book style check test lab world clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=/path/to/python3")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[book,tests]'
	@touch $@

book: $(READY)
	@OMP_NUM_THREADS=$$($(BIN)/python -c 'import os; print(max(1, os.cpu_count() // $(JOBS)))') \
		$(DOIT) -n $(JOBS) -P thread preset=$(PRESET)
	@echo "The book: file://$(CURDIR)/book/_build/html/index.html"

style: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: style
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --timeout=120 \
		-m "not slow and not book" tests $(ARGS)

# Seconds that a test may take; one of them builds the book. What hangs, but for native code, fails and tells where it stood.
test: LIMIT ?= 4500
test: style
	@$(DOIT) ipynb
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder \
		--timeout=$(LIMIT) --nbmake --nbmake-timeout=1800 tests build/ipynb $(ARGS)

world: $(READY)
	@$(DOIT) world

# A settings folder of its own, in which a click on a .py notebook opens it as a notebook.
lab: export JUPYTER_CONFIG_DIR = $(CURDIR)/$(LAB)/config
lab: export JUPYTER_RUNTIME_DIR = $(CURDIR)/$(LAB)/runtime
lab: export JUPYTERLAB_SETTINGS_DIR = $(CURDIR)/$(LAB)/settings
lab: export JUPYTERLAB_WORKSPACES_DIR = $(CURDIR)/$(LAB)/workspaces
lab: export IPYTHONDIR = $(CURDIR)/build/ipython
lab: $(READY)
	@$(DOIT) world
	@mkdir -p $(JUPYTER_CONFIG_DIR)/labconfig
	@cp notebooks/lab.json $(JUPYTER_CONFIG_DIR)/labconfig/default_setting_overrides.json
	$(BIN)/jupyter lab --LabApp.default_url=/lab/tree/notebooks --LabApp.news_url=None \
		--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate $(ARGS)

clean:
	rm -rf build book/_build book/notebooks book/results.md book/features.md book/api.md book/reference book/_static/features

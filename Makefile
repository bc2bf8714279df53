# make pipeline   everything: .venv, then the Prefect flow over all stages of dvc.yaml, then the version
# make compare    recipes on equal terms, then reports/comparison/;  make ablations  single switches
# make test       the fast tests;  make test-slow  drills that take minutes
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
EXTRAS := train,data,pipeline,report,test
# HAPLOVL_COMPUTE or COMPUTE=NAME picks a profile of infra/compute/.
COMPUTE ?= $(or $(HAPLOVL_COMPUTE),laptop)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: pipeline compare ablations test test-slow lint venv clean
.DEFAULT_GOAL := pipeline

pipeline: $(READY)
	@$(BIN)/python -m flows.pipeline --compute $(COMPUTE)

# Both go on where they were interrupted; JOBS=1 trains one recipe at a time.
compare ablations: $(READY)
	@$(BIN)/python -m flows.compare $@ $(if $(JOBS),--jobs $(JOBS))

test: $(READY)
	@$(BIN)/python -m pytest -m "not slow"
	@echo "make test: all fast tests passed"

test-slow: $(READY)
	@$(BIN)/python -m pytest -m slow
	@echo "make test-slow: all slow tests passed"

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --line-length 120 .

venv: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"error: Python 3.11 or newer is needed; $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.11")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: this Python cannot make virtual environments; on Debian or Ubuntu: apt-get install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

# Removes what can be made again by anyone: not the data, the models or the training state.
clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# make pipeline   everything: .venv, then the Prefect flow over all stages of dvc.yaml, then the version
# make compare    recipes on equal terms, then reports/comparison/;  make ablations  single switches
# make drill      kills, fills and cuts what the pipeline runs on, and checks that the outs stay the same
# make serve      a Prefect server and worker for this checkout; make retrain  make pipeline, then promotion
# make test       the fast tests;  make test-slow  drills that take minutes;  make test-harness  through lmms-eval
# make audit      known vulnerabilities of the pinned packages;  make sbom  what is installed, as CycloneDX JSON
# make infra-env  .venv-infra: SkyPilot, ParallelCluster and what checks infra/;  make test-infra  checks it
# make eval-env   .venv-eval: lmms-eval, for published benchmarks; docs/benchmarks.md says how for GPUs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SECURITY_READY := $(VENV)/.security
EVAL_VENV := .venv-eval
EVAL_BIN := $(EVAL_VENV)/bin
EVAL_READY := $(EVAL_VENV)/.ready
INFRA_VENV := .venv-infra
INFRA_READY := $(INFRA_VENV)/.ready
EVAL_TORCH ?= torch==2.13.0
EXTRAS := train,data,pipeline,report,test
# HAPLOVL_COMPUTE or COMPUTE=NAME picks a profile of infra/compute/.
COMPUTE ?= $(or $(HAPLOVL_COMPUTE),laptop)

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: pipeline retrain serve drill compare ablations test test-slow test-harness test-infra lint audit sbom venv \
	eval-env infra-env clean
.DEFAULT_GOAL := pipeline

pipeline: $(READY)
	@$(BIN)/python -m flows.pipeline --compute $(COMPUTE)

# The pipeline, then the new version takes the production model's place unless it is worse.
retrain: $(READY)
	@$(BIN)/python -m flows.pipeline --promote --compute $(COMPUTE)

serve: $(READY)
	@$(BIN)/python -m flows.serve $(if $(PORT),--port $(PORT))

drill: $(READY)
	@$(BIN)/python benchmarks/drill.py

# Both go on where they were interrupted; JOBS=1 trains one recipe at a time. Unless COMPUTE or HAPLOVL_COMPUTE says
# otherwise, a run has one core.
compare ablations: $(READY)
	@$(BIN)/python -m flows.compare $@ $(if $(JOBS),--jobs $(JOBS)) \
		$(if $(filter command environment,$(firstword $(origin COMPUTE))),--compute $(COMPUTE))

test: $(READY)
	@$(BIN)/python -m pytest -m "not slow and not harness and not infra"
	@echo "make test: all fast tests passed"

test-slow: $(READY)
	@$(BIN)/python -m pytest -m slow
	@echo "make test-slow: all slow tests passed"

test-harness: $(READY) $(EVAL_READY)
	@$(BIN)/python -m pytest -m harness
	@echo "make test-harness: lmms-eval ran all eleven benchmarks"

test-infra: $(READY) $(INFRA_READY)
	@$(BIN)/python -m pytest -m infra
	@echo "make test-infra: every file of infra/ fits its own tool's schema"

lint: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --line-length 120 .

# Strict: a package that the service does not know would otherwise count as one without vulnerabilities.
audit: $(SECURITY_READY)
	@$(BIN)/python -c 'from urllib.request import urlopen; urlopen("https://pypi.org/pypi/pip/26.0/json", timeout=30)' 2>/dev/null || { echo "error: make audit asks https://pypi.org about known vulnerabilities, and it gives no answer here; run it where the internet can be reached"; exit 1; }
	@$(BIN)/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

sbom: $(SECURITY_READY)
	@mkdir -p reports
	@$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible -o reports/sbom.json $(BIN)/python
	@echo "make sbom: reports/sbom.json"

venv: $(READY)

$(SECURITY_READY): $(READY)
	@echo "installing pip-audit and cyclonedx-bom into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[security]'
	@touch $@

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"error: Python 3.11 or newer is needed; $(PYTHON) is {v[0]}.{v[1]}. Try: make PYTHON=python3.11")'
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || { echo "error: this Python cannot make virtual environments; on Debian or Ubuntu: apt-get install $$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

eval-env: $(EVAL_READY)

$(EVAL_READY): pyproject.toml constraints-eval.txt
	@test -x $(EVAL_BIN)/python || $(PYTHON) -m venv $(EVAL_VENV)
	@echo "installing lmms-eval into $(EVAL_VENV) (minutes the first time) ..."
	@$(EVAL_BIN)/python -m pip install --quiet -c constraints-eval.txt $(EVAL_TORCH)
	@$(EVAL_BIN)/python -m pip install --quiet --no-deps -r constraints-eval.txt
	@$(EVAL_BIN)/python -m pip install --quiet --no-deps -e .
	@touch $@

infra-env: $(INFRA_READY)

$(INFRA_READY): constraints-infra.txt
	@test -x $(INFRA_VENV)/bin/python || $(PYTHON) -m venv $(INFRA_VENV)
	@echo "installing SkyPilot and ParallelCluster into $(INFRA_VENV) (minutes the first time) ..."
	@$(INFRA_VENV)/bin/python -m pip install --quiet -r constraints-infra.txt
	@touch $@

# Removes what can be made again by anyone: not the data, the models or the training state.
clean:
	rm -rf $(VENV) $(EVAL_VENV) $(INFRA_VENV) *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

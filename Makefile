# make demo   dynamic -> export -> static on the demo checkpoint; shows that the tokens agree
# make test   the whole suite
# make lint   ruff, mypy, clang-format
# make bench-peers   this and other engines side by side; PEERS holds flags (tests/benchmarks/peers/README.md)
# make bench-serving   the engine under a server's load; SERVING holds flags (tests/benchmarks/serving/README.md)
# make test-gpu   the CUDA kernels on this machine's GPU; $(PYTHON) needs NumPy and PyTorch alone. GPU holds flags (--help)
# make bench-gpu   their times against what the GPU does at best; the same. With Paddle, too: the whole model, see README.md
# The others make the virtual environment $(VENV) first where it is missing. PYTHON chooses the interpreter.

VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/ready
SOURCES := $(wildcard ops/csrc/*/*.cc ops/csrc/*/*.h $(foreach kind,cc h cu cuh,ops/csrc/kernels/*/*.$(kind)))
DEMO := build/demo

.PHONY: demo test lint bench-peers bench-serving test-gpu bench-gpu setup clean
.DEFAULT_GOAL := demo

setup: $(READY)

$(BIN)/python:
	@command -v g++ >/dev/null || { echo "g++ is missing; install it (Debian, Ubuntu: apt-get install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Built in isolation, as the README says: some dependencies of paddlenlp can only be built so.
$(READY): $(BIN)/python pyproject.toml setup.py ops/csrc/nvcc.py $(SOURCES)
	PADDLE_MIXTRAL_WERROR=1 $(BIN)/pip install -q -e ".[test,lint]"
	@touch $@

demo: $(READY)
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	@echo "== dynamic graph"
	$(BIN)/python predict/predictor.py --prompt "This module provides" --max_length 48
	$(BIN)/python predict/predictor.py --data_file configs/demo/prompts.jsonl --batch_size 4 --output_file $(DEMO)/dynamic.jsonl
	@echo "== export"
	$(BIN)/python predict/export_model.py --output_path $(DEMO)/inference
	@echo "== static program"
	$(BIN)/python predict/predictor.py --model_name_or_path $(DEMO)/inference --mode static --prompt "This module provides" --max_length 48
	$(BIN)/python predict/predictor.py --model_name_or_path $(DEMO)/inference --mode static \
	    --data_file configs/demo/prompts.jsonl --batch_size 4 --output_file $(DEMO)/static.jsonl
	@cmp $(DEMO)/dynamic.jsonl $(DEMO)/static.jsonl
	@echo "== the static program gave the same tokens as the dynamic graph on all $$(wc -l < $(DEMO)/static.jsonl) prompts"

test: $(READY)
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(SOURCES) tests/ops/*.cc tests/ops/*_emulation/*.[hc]*

bench-peers: $(READY)
	$(BIN)/python -m tests.benchmarks.peers $(PEERS)

bench-serving: $(READY)
	$(BIN)/python -m tests.benchmarks.serving $(SERVING)

test-gpu:
	$(PYTHON) -m tests.gpu $(GPU)

bench-gpu:
	$(PYTHON) -m tests.gpu.bench $(GPU)

clean:
	rm -rf build log .venv ops/*.so ops/plugins *.egg-info

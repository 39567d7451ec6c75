# make demo: the whole path on any machine, in minutes.  make test: the suite.  make test-long: the long ones.
# PYTHON=python3.12 chooses the interpreter, JOBS=8 the processes of the tests.
PYTHON ?= python3
JOBS ?= 2
RUN := .venv/bin/python
LAUNCH := $(RUN) -m accelerate.commands.launch
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PYTHONWARNINGS := ignore

.PHONY: demo test test-long lint clean

demo: export OMP_NUM_THREADS ?= 2
demo: .venv/installed
	rm -rf runs/demo
	$(RUN) -m data_prep.demo_rows --out runs/demo/rows
	$(RUN) -m data_prep.demo_model --rows runs/demo/rows --out runs/demo/init
	$(LAUNCH) --config_file accelerate_configs/cpu.yaml recipes/qwen3_full.py --config recipes/configs/demo_base.yaml
	$(LAUNCH) --config_file accelerate_configs/cpu.yaml recipes/qwen3_qlora.py --config recipes/configs/demo_qlora.yaml
	$(RUN) -m eval.compare --base runs/demo/base --tuned runs/demo/qlora --data runs/demo/rows/chat

test: .venv/installed lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile

test-long: .venv/installed lint
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(JOBS) --dist loadfile -m "long and not hub and not serving"

lint: .venv/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check --quiet .

clean:
	rm -rf .venv runs

# .venv/installed is newer than every requirement and names the interpreter: then nothing is installed again
.venv/installed: requirements.txt requirements-dev.txt requirements-eval.txt .venv/python
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps bfcl-eval==2026.3.23
	touch .venv/installed

.venv/python: FORCE
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed (transformers, trl), this is %s: make PYTHON=python3.12" % sys.version.split()[0])'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { echo "$(PYTHON) has no venv module: on Debian and Ubuntu, apt install python3-venv" >&2; exit 1; }
	@id="$$($(PYTHON) -c 'import sys; print(sys.version, sys.base_prefix)')"; \
	if [ "$$(cat .venv/python 2>/dev/null)" != "$$id" ]; then \
		$(PYTHON) -m venv --clear .venv && printf '%s\n' "$$id" > .venv/python; fi

FORCE:

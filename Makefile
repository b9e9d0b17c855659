# make sample PROMPT="How do I draw a house?"     an answer in text and pictures, on any machine
# make test                                       the whole test suite, on the CPU
# make demo                                       a page to talk to it, at http://127.0.0.1:8000
# make bench                                      how fast it is on this machine, into docs/bench and README.md
# make tiny                                       train the bundled miniature from nothing: hours on two cores, resumable
#
# Each of them makes .venv first, and again when the requirements change. PYTHON=python3.12 chooses another interpreter.

PYTHON ?= python3
PY := .venv/bin/python
GLUON := .venv-aot .venv-aot-3.7.1 .venv-aot-3.8.0 .venv-aot-3.9.0

# The prompt reaches the program through the environment: neither make nor the shell may read its quotes and dollar signs.
override PROMPT := $(value PROMPT)
export PROMPT

.PHONY: sample demo test bench lint tiny aot clean

sample: .venv/runtime
	@$(PY) sample.py $${PROMPT:+--prompt="$$PROMPT"}

demo: .venv/serve
	@$(PY) -m serve

# One thread computes in most tests: two files at a time, in the order of tests/conftest.py. A file's tests share what it builds.
test: .venv/dev .venv-aot/triton
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# On a GPU at most 8 minutes, on a CPU about 3. What it has written is what there is to commit.
bench: .venv/dev
	$(PY) -m bench
	$(PY) -m bench --readme

lint: .venv/dev
	$(PY) -m ruff check .

# What the attention kernels compile to on Hopper, no GPU needed. A change of the table is a change of speed: read its diff.
# hopper.py has a second table, with a line for every Triton that it is written for.
aot: .venv/dev $(GLUON:=/triton)
	env -u TRITON_INTERPRET PYTHONPATH=.venv-aot TRITON_CACHE_DIR=.venv-aot/cache $(PY) tests/aot.py > tests/aot_sm90.json.new
	mv tests/aot_sm90.json.new tests/aot_sm90.json
	for folder in $(GLUON); do \
		env -u TRITON_INTERPRET PYTHONPATH=$$folder TRITON_CACHE_DIR=.venv-aot/cache $(PY) tests/aot_hopper.py || exit; \
	done > tests/aot_hopper.jsonl.new
	mv tests/aot_hopper.jsonl.new tests/aot_hopper.jsonl

# The recipe of checkpoints/tiny. Every line resumes where it stopped, and costs nothing once it is done.
tiny: .venv/runtime
	$(PY) -m sketchbook.pretrain vae
	$(PY) -m sketchbook.pretrain mllm
	$(PY) -m sketchbook.pretrain eye
	$(PY) -m sketchbook.pretrain dit
	$(PY) train_stage1.py --mllm runs/tiny/mllm --tower runs/tiny/eye --data sketchbook=0.6,sketchbook.looking=0.4 --lr 1e-3 --out runs/tiny/stage1
	$(PY) train_stage2.py --mllm runs/tiny/stage1 --dit runs/tiny/dit --vae runs/tiny/vae --lr 1e-3 --out runs/tiny/stage2
	$(PY) -m sketchbook.pretrain bundle

# Only what make and the tests left; answers in out/ and training in runs/ stay.
clean:
	rm -rf .venv .venv-aot* .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is missing or older than 3.11: try make PYTHON=python3.12 (or another one you have)" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "error: no venv: on Debian and Ubuntu, install python3-venv" >&2; exit 2; }

# A stamp is younger than the requirements that were installed last. The test tools come on top of the runtime, not instead.
.venv/runtime: requirements.txt | .venv/bin/python
	$(PY) -m pip install --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/serve: serve/requirements.txt .venv/runtime
	$(PY) -m pip install --disable-pip-version-check -r serve/requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt requirements.txt evaluate/requirements.txt curate/requirements.txt serve/requirements.txt | .venv/bin/python
	$(PY) -m pip install --disable-pip-version-check -r requirements-dev.txt
	@touch $@ .venv/runtime

# The table holds for this compiler alone; the one that runs is whichever torch wants. A folder before it on the path is enough.
.venv-aot/triton: | .venv/bin/python
	@test "$$(uname -s)" != Linux || \
		$(PY) -m pip install --disable-pip-version-check -q --no-deps --target .venv-aot triton==3.6.0

# Others that hopper.py is compiled with: 0.7 to 0.9 GB each, for `make aot` alone.
.venv-aot-%/triton: | .venv/bin/python
	$(PY) -m pip install --disable-pip-version-check -q --no-deps --target .venv-aot-$* triton==$*

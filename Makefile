# The two commands of the README, and the checks of CI. Everything happens in .venv, nothing outside this folder.
PYTHON ?= python3
PY := .venv/bin/python
RUN := runs/ddpm_digits
# One thread: for a network this small a second one gains a third on an idle machine, and beside any busy process the
# two wait for each other ten times as long.
export OMP_NUM_THREADS ?= 1
# Features of the real digits, which scores are computed with.
export LITGEN_CACHE ?= runs/.cache

.PHONY: quickstart test whole check clean

# A killed installation leaves no stamp, and an installation without one is made anew.
.venv/.installed: pyproject.toml constraints.txt
	@test -e $@ || rm -rf .venv
	@rm -f $@
	@test -x $(PY) || $(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

# Resumes where a killed run stopped, and trains no more once it is done.
quickstart: .venv/.installed
	@start=$$(date +%s); \
	$(PY) -m lit_generative fit --config configs/diffusion/ddpm_digits.yaml --ckpt_path last && \
	$(PY) -m lit_generative sample --ckpt_path $(RUN) --out $(RUN) --format grid gif \
	    --num 100 --columns 10 --label 0 1 2 3 4 5 6 7 8 9 && \
	echo "training and sampling took $$(($$(date +%s) - start)) s"

test: .venv/.installed
	$(PY) -m pytest

# What `make test` runs in a smaller form.
whole: .venv/.installed
	$(PY) -m pytest -m whole

check: .venv/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	.venv/bin/lint-imports --no-cache

clean:
	rm -rf .venv runs datasets

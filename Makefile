# make demo    fresh clone to a trained, plotted comparison on real images; needs Python 3.11+ and the package registry
# make test    fresh clone to the passed test suite, 8 to 20 minutes on two cores: ruff, mypy, pytest, what the kernels compile
#              to for three GPUs, and a launch of each with the oldest Triton that is supported. FFCV, which the files of
#              `fastil convert` are tested against, is built where Debian's libraries for it are there or can be installed
#              (as root, by apt-get); where not, one line says so and its tests skip. The same goes for DALI, by pip
# make soak    the same, hours long (FASTIL_SOAK=1): full counts of kills, damaged files and drawn examples, and all
#              tests and GPUs with the oldest Triton, too
# make docs    the site of docs/, with the API, into build/site/index.html; it can be read without a network
# make wheels  on a machine with a package registry: what a GPU machine without it lacks, into build/wheels (5 MB; with
#              ARGS=--all, for a Python that has torch, Triton and numpy alone, 80 MB)
# make gpu     on a machine with an NVIDIA GPU, in ten minutes and without network: tests of kernels and training, the step's
#              rate and launches, loaders, a short row of CIFAR-100, compute-sanitizer; results in bench/results/gpu_NAME

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-oldest-triton soak docs gpu wheels clean

demo: .venv/run
	@rm -rf runs/demo
	@mkdir -p runs/demo/logs
	@echo "Training 3 seeds with each loss on scikit-learn's digits, two runs at a time; logs in runs/demo/logs"
	@for seed in 0 1 2; do for loss in softmax balanced; do echo $$loss $$seed; done; done \
	| OMP_NUM_THREADS=1 xargs -P 2 -L 1 sh -c \
	'$(BIN)/fastil run digits loss=$$0 seed=$$1 --out runs/demo/$$0-s$$1 > runs/demo/logs/$$0-s$$1 2>&1 \
	&& grep "^average incremental accuracy" runs/demo/logs/$$0-s$$1 | sed "s/^/$$0 seed $$1: /" || { cat runs/demo/logs/$$0-s$$1; exit 255; }'
	@$(BIN)/fastil report runs/demo/softmax-s* runs/demo/balanced-s* --out runs/demo/report

test: .venv/dev .venv/ffcv .venv/dali
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	OMP_NUM_THREADS=1 $(BIN)/pytest -n auto --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)
	$(BIN)/python -m fastil.kernels.aot --check
	$(MAKE) --no-print-directory test-oldest-triton

# The kernels once more, with the oldest Triton that they support and the numpy it needs, which lie in a folder in front of
# the environment: every kernel is launched and compiled for one GPU. `make soak` runs all tests and compiles for all GPUs.
OLDEST := build/triton-3.6.0
LAUNCHES := tests/kernels/test_sanitized.py tests/kernels/test_registration.py
test-oldest-triton: .venv/dev $(OLDEST)/done
	OMP_NUM_THREADS=1 PYTHONPATH=$(OLDEST) $(BIN)/pytest $(if $(FASTIL_SOAK),-n auto --dist loadfile tests/kernels,$(LAUNCHES))
	PYTHONPATH=$(OLDEST) $(BIN)/python -m fastil.kernels.aot --check $(if $(FASTIL_SOAK),,--arch 90)

$(OLDEST)/done:
	$(BIN)/pip install --quiet --disable-pip-version-check --target $(OLDEST) triton==3.6.0 'numpy<2.4'
	@touch $@

# Runs with the torch and the Triton of $(PYTHON) and installs nothing, and needs no network: what that Python lacks comes from
# build/wheels, which `make wheels` fills elsewhere. ARGS: such as --only step,cifar100 or --device cpu (bench/first_contact.py);
# for wheels --all, --python 3.11.
gpu:
	@PYTHONPATH=. $(PYTHON) -m bench.first_contact $(ARGS)

wheels:
	@PYTHONPATH=. $(PYTHON) -m bench.wheels $(ARGS)

soak: export FASTIL_SOAK = 1
soak: test

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@! grep -rE '<(script|link|img|iframe)[^>]* (src|href)="?(https?:)?//' build/site --include='*.html'
	@echo "build/site/index.html"

.venv/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/dev: .venv/run
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

.venv/docs: .venv/run
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

# FFCV comes as source and needs two libraries that pip does not bring. What goes wrong is in .venv/ffcv.log, and is tried
# again by the next `make test`.
FFCV_PACKAGES := libturbojpeg0-dev libopencv-dev pkg-config
.venv/ffcv: .venv/dev
	@exec 3>&1 > .venv/ffcv.log 2>&1; \
	libraries() { pkg-config --exists opencv4 libturbojpeg; }; \
	if ! libraries && [ "$$(id -u)" = 0 ] && command -v apt-get; then \
	echo "Installing $(FFCV_PACKAGES), for the tests against FFCV" >&3; \
	apt-get update; \
	DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends $(FFCV_PACKAGES); fi; \
	if ! libraries; then \
	echo "The tests against FFCV are skipped, its libraries are missing: apt-get install $(FFCV_PACKAGES)" >&3; \
	elif $(BIN)/pip install --disable-pip-version-check -c constraints.txt setuptools \
	&& $(BIN)/pip install --disable-pip-version-check -c constraints.txt --no-build-isolation ffcv==1.0.2 \
	&& $(BIN)/python -c 'import ffcv'; then touch $@; \
	else echo "The tests against FFCV are skipped, it does not build or does not run: see .venv/ffcv.log" >&3; fi

.venv/dali: .venv/dev
	@if $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dali]' > .venv/dali.log 2>&1 \
	&& $(BIN)/python -c 'import nvidia.dali'; then touch $@; \
	else echo "The tests of DALI are skipped, it cannot be installed here: see .venv/dali.log" >&2; fi

clean:
	rm -rf .venv runs/demo build *.egg-info .mypy_cache .ruff_cache .pytest_cache

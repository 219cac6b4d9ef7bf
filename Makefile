# They need Python 3.11 or newer and nothing else, the GPU check aside: packages go into .venv.
#   make demo       export, build and run the MoVQ and the RQ-VAE of emoji, and verify them against PyTorch
#   make test       lint, type-check and test
#   make quick      lint, and the tests that are not slow: four minutes on two cores, once packages are exported
#   make gpu-check  on a machine with an NVIDIA GPU: test, verify and time everything there, see docs/gpu.md
#   make clean      remove .venv and everything that was generated

PYTHON ?= python3
# A test at a time for each core. What two processes need is exported once, see tests/support/artifacts.py.
PARALLEL = -n auto --maxprocesses 8 --dist worksteal
export PATH := $(CURDIR)/.venv/bin:$(PATH)

.PHONY: demo test quick gpu-check clean
.DEFAULT_GOAL := demo

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	pip install -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/ready
	mkdir -p demo
	cd demo && vqdeploy export --model movq --preset emoji --no-verify
	cd demo && vqdeploy build movq-onnx
	cd demo && vqdeploy run --engine movq.plan --film movq-film.gif
	cd demo && vqdeploy run --engine movq.plan --task inpaint --input ../examples/emoji --mask-ratio 0.5 --completions 2
	cd demo && vqdeploy verify --engine movq.plan
	cd demo && vqdeploy export --model rqvae --preset emoji --no-verify
	cd demo && vqdeploy build
	cd demo && vqdeploy run --engine rqvae.plan
	cd demo && vqdeploy run --engine rqvae.plan --task reconstruct --input ../examples/emoji
	cd demo && vqdeploy verify --engine rqvae.plan
	@echo
	@echo "Emoji of MoVQ, one row a class, and step by step:  demo/movq-generate.png, demo/movq-film.gif"
	@echo "Held-out emoji, half of them drawn anew:           demo/movq-inpaint.png"
	@echo "Emoji of RQ-VAE:                                   demo/rqvae-generate.png"
	@echo "Held-out emoji, above their decoded codes:         demo/rqvae-reconstruct.png"

# mypy finds packages by folder. The links give it the import paths: vqdeploy.export is export/, and so on.
test: .venv/ready
	ruff check .
	ruff format --check .
	rm -rf .venv/types/vqdeploy && mkdir -p .venv/types/vqdeploy
	ln -s $(addprefix $(CURDIR)/,$(wildcard vqdeploy/*) export engines runtime) .venv/types/vqdeploy
	cd .venv/types && mypy --config-file ../../pyproject.toml -p vqdeploy
	pytest $(PARALLEL)

quick: .venv/ready
	ruff check .
	ruff format --check .
	pytest $(PARALLEL) -m "not slow and not gpu"

gpu-check: .venv/ready
	python tools/gpu_check.py

clean:
	rm -rf .venv build demo *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

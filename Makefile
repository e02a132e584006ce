# make demo    a whole swarm on this machine: chain, keeper, bootnode, three workers
# make demo MODEL=smollm2    the same with a real model, SmolLM2-135M-Instruct, in at most twenty minutes
# make demo MARKET=1    the same with a judge, on whose questions the workers bet
# make test    every check, and every test but the nightly ones
# make fleet   three real hosts on this machine, deployed over ssh    (fleet-check, fleet-status, fleet-down)
# The first run sets up what is needed, in .venv and .cache; the next ones start at once.
SHELL := /bin/sh
.DEFAULT_GOAL := help
bin := .venv/bin

.PHONY: help
help:
	@sed -n 's/^# //p' Makefile

# -- set-up ---------------------------------------------------------------------------------------------------------
.PHONY: setup lock docs tiny-model contracts
setup:
	@scripts/environment .venv dev
	@[ -x $(bin)/hivewright ] || $(bin)/uv pip install --quiet --offline --python $(bin)/python --no-deps \
		--no-build-isolation --editable .
	@[ -e .cache/node/anvil ] || echo "anvil: installing the embedded chain into .cache/node" >&2
	@scripts/anvil .cache/node >/dev/null

lock:
	scripts/lock

docs: setup
	$(bin)/python scripts/configuration
	$(bin)/python scripts/tables

tiny-model: setup
	$(bin)/python scripts/tiny_model.py --output worker/policy/tiny --seed 0

contracts: setup
	scripts/contracts build

# -- the main job ---------------------------------------------------------------------------------------------------
.PHONY: demo
demo: setup
ifeq ($(MODEL),smollm2)
	@[ -e .cache/smollm2/config.json ] || \
		$(bin)/python scripts/pretrained_model.py --model smollm2 --output .cache/smollm2
	@$(bin)/hivewright demo --workers 3 --rounds 25 --minutes 16 --seed 0 --output demo --model $(CURDIR)/.cache/smollm2 $(if $(MARKET),--market)
else
	@$(bin)/hivewright demo --workers 3 --rounds 10 --seed 0 --output demo $(if $(MARKET),--market)
endif

# -- tests ----------------------------------------------------------------------------------------------------------
.PHONY: test lint all-tests
lint: setup
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/mypy worker deploys lab
	$(bin)/python scripts/measure_code --words

# At the same time: mypy computes for a while, on one core.
test: setup
	@$(MAKE) --no-print-directory --jobs=2 lint all-tests

all-tests: setup
	scripts/run_tests $(bin)/python tests

# -- three real hosts on this machine -------------------------------------------------------------------------------
.PHONY: fleet fleet-check fleet-status fleet-down
fleet fleet-check fleet-status fleet-down: setup
	@$(bin)/python -m lab.fleet $(subst fleet,up,$(subst fleet-,,$@))

# MODEL=Qwen/… or a folder (default: the demo model); ARGS="…" goes to the server or the offline chat, WEBUI="…" to the page.
# URL=http://… of a server that runs: chat and webui start none.
MODEL ?=
ARGS ?=
WEBUI ?=
URL :=
PY := .venv/bin/python
# By the environment, so that a folder may have any name.
SERVER_ARGS := $(if $(MODEL),--model "$$MODEL") $(ARGS)
WITH_SERVER = $(if $(URL),QWEN_URL="$$URL",$(PY) -m qwen_vllm.with_server $(SERVER_ARGS) --)
export PYTHON MODEL URL

.PHONY: help setup chat webui serve offline test test-long test-clients soak lint docs lock clean
.SILENT:

help:  ## this list
	sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14
	echo; sed -n '1,2s/^# //p' $(MAKEFILE_LIST)

setup:  ## install into .venv what this machine needs
	./setup.sh

chat: setup  ## start a server, chat with it here, stop it at the end
	$(WITH_SERVER) $(PY) vllm_client.py

webui: setup  ## start a server and a page to chat with it in the browser
	$(WITH_SERVER) $(PY) gradio_webui.py $(WEBUI)

serve: setup  ## start a server
	exec $(PY) vllm_server.py $(SERVER_ARGS)

offline: setup  ## chat without a server
	exec $(PY) vllm_offline.py $(SERVER_ARGS)

# The packages of the test libraries are then imported as they are, and not compiled anew with other asserts.
TESTS = PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(PY)

test: setup  ## lint, and all tests, on the real engine too, and how much of the code they run; with ARGS, what pytest is told
ifneq ($(ARGS),)
	$(PY) -m pytest $(ARGS)
else
	# Those of whole programs beside the others. What failed comes last.
	{ $(MAKE) lint && $(TESTS) -m tests.support.covered -m 'not long and not vision' --ignore tests/e2e; } >.tests.log 2>&1 & others=$$!; \
	{ $(TESTS) -m pytest -m 'not long and not vision' tests/e2e; echo $$? >.e2e.status; } 2>&1 | tee .e2e.log; \
	wait $$others; others=$$?; cat .tests.log; e2e=$$(cat .e2e.status); \
	[ $$e2e = 0 ] || tail -n 60 .e2e.log; exit $$((e2e | others))
	$(PY) -m coverage report
endif

test-long: setup  ## what takes longer: servers of several processes, families of models, adapters, thoughts
	$(PY) -m pytest -m long $(ARGS)

test-clients: setup  ## clients of others, pinned, in .clients, against one server; ARGS="openai llm" for some
	$(PY) -m tests.clients.run $(ARGS)

soak: setup  ## load and faults on this machine, as a table; ARGS="--minutes 30" for a long mix
	$(PY) -m benchmarks.soak $(ARGS)

lint: setup  ## check style, types, the page's script, and that the docs are up to date
	$(PY) -m ruff check . && $(PY) -m ruff format --check .
	$(PY) -m mypy --no-error-summary
	.venv/bin/oxlint --silent --deny-warnings qwen_vllm/webui
	$(PY) -m cogapp -P --check --diff --verbosity=0 docs/*.md

docs: setup  ## write the generated parts of the docs anew
	$(PY) -m cogapp -P -r --verbosity=0 docs/*.md

lock: ## write the locked requirements anew from pyproject.toml
	./setup.sh lock

clean:  ## remove what setup and tests made here; the model cache stays
	rm -rf .venv .tools .clients *.egg-info .coverage .coverage.* .tests.log .e2e.* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

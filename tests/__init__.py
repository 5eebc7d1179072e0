"""The environment of all tests, and of what they start; set before anything reads it."""

import os

# To fill a larger cache with zeros takes seconds of each start.
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
# Several engines share the cores. Where threads wait actively, one engine beside others takes 4 times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# What the tests read is English, whatever the developer's locale is.
os.environ["QWEN_LANG"] = "en"

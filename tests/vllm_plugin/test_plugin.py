"""What each process of vLLM's begins with, in our programs and in others."""

import os
import subprocess
import sys
import threading

import psutil
import pytest

from qwen_vllm.vllm_plugin import plugin

LOADED = f"""
import os, vllm.plugins
from vllm import ModelRegistry
from vllm.lora.ops.torch_ops import lora_ops
from vllm.reasoning import ReasoningParserManager
from vllm.v1.core.sched import scheduler
from vllm.v1.engine import detokenizer

def load():
    vllm.plugins.plugins_loaded = False
    vllm.plugins.load_general_plugins()
    changed = [scheduler.KVCacheManager, detokenizer.FastIncrementalDetokenizer, lora_ops.bgmv_shrink]
    print(*(thing.__module__.startswith("vllm.") for thing in changed))
    print("qwen_thinking" in ReasoningParserManager.list_registered(), "QwenV1ForCausalLM" in ModelRegistry.models)

load()
os.environ["{plugin.OURS}"] = "1"
load()
"""


@pytest.mark.long
def test_only_our_programs_change_vllm() -> None:
    plain = {name: value for name, value in os.environ.items() if name != plugin.OURS}
    done = subprocess.run([sys.executable, "-c", LOADED], env=plain, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["True True True", "False False", "False False False", "True True"], done.stderr


def test_a_process_of_the_engine_ends_with_the_one_that_started_it() -> None:
    code = "from tests.support import orphan; orphan.child_of_a_killed_process()"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    assert child.wait(60) is None


def test_a_process_without_a_parent_of_ours_goes_on() -> None:
    threads = threading.active_count()
    plugin.end_with_parent()
    assert threading.active_count() == threads

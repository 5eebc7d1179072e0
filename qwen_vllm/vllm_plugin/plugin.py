"""What each of vLLM's processes begins with, in our programs."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import entry_points

from qwen_vllm import hardware, reasoning, tool_calls
from qwen_vllm.models import qwen_v1
from qwen_vllm.vllm_plugin import engines, patches
from qwen_vllm.vllm_plugin.patch import Patch

NAME = "qwen_chat"
"""The name of our entry points in pyproject.toml and in $VLLM_PLUGINS."""
OURS = "QWEN_VLLM"
"""The environment variable that marks our programs and what they start; a plain `vllm serve` stays vLLM's own."""


def is_installed() -> bool:
    """Tell whether vLLM can find our plugins, which its other processes load by the package's metadata."""
    return bool(entry_points(group="vllm.general_plugins", name=NAME))


def begin_ours() -> None:
    """Mark this process and those that it starts as ours, and begin it."""
    os.environ[OURS] = "1"
    begin_process()


def begin_process() -> None:
    """Register our model and parsers, apply the patches, and end with the parent.

    vLLM calls this in each of its processes, as a general plugin. It does nothing in other programs; to call it
    again does no harm.
    """
    if OURS not in os.environ:
        return
    end_with_parent()
    qwen_v1.register()
    reasoning.register()
    tool_calls.register()
    for patch in process_patches():
        patch.apply()
    if engines.SLEEP_AFTER in os.environ:
        patches.SLEEP.apply()
    if hardware.on_cpu():
        for module in ("cpu_speedups", "int8_copy"):
            import_module(f"{__package__}.{module}").register()


def process_patches() -> Sequence[Patch]:
    """Return the patches that each of vLLM's processes gets on this hardware."""
    return (*patches.IN_EVERY_PROCESS, *(patches.ON_CPU if hardware.on_cpu() else patches.ON_GPU))


def end_with_parent() -> None:
    """End this process when the one that started it is gone, even if that was killed.

    An engine that is left over would keep the GPU's memory.
    """
    parent = multiprocessing.parent_process()
    if not parent:
        return

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()

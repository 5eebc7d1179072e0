"""The server's other processes, engines and front ends: forked from one that imports vLLM while the server does.

Importing vLLM is half of a start, and each of them needs it.
"""

import gc
import multiprocessing
import os
import platform
import sys
from collections.abc import Callable
from importlib import import_module
from multiprocessing import forkserver
from types import SimpleNamespace
from typing import Any

MODULES = ("qwen_vllm.vllm_plugin.with_server_only", "qwen_vllm.vllm_plugin.early_imports")
"""What they import, after the rule of when this ends."""


def is_possible() -> bool:
    """Tell whether processes may be forked: by vLLM's own rules, and unless the user wants them to be spawned."""
    is_wsl = "microsoft" in platform.uname().release.lower()
    return not (is_wsl or "--numa-bind" in sys.argv or os.environ.get("VLLM_WORKER_MULTIPROC_METHOD") == "spawn")


def begin() -> None:
    """Start the process that imports. Nothing there may use the GPU: CUDA does not survive a fork."""
    multiprocessing.set_forkserver_preload(list(MODULES))
    before = dict(os.environ)
    # Python does not hand on where modules are found: a file of the current folder would take a library's place.
    os.environ |= {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONSAFEPATH": "1"}
    try:
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)


class EarlyProcess(multiprocessing.context.ForkServerProcess):
    """A process that is forked from there, with this one's environment, as a spawned one would have it."""

    def start(self) -> None:
        """Start the process."""
        target, args = (vars(self)[name] for name in ("_target", "_args"))
        vars(self).update(_target=_with_environment, _args=(dict(os.environ), target, *args))
        super().start()


def _with_environment(environment: dict[str, str], target: Callable[..., None], *args: Any, **options: Any) -> None:
    gc.freeze()  # what is imported stays: garbage is looked for among what comes
    gc.enable()
    threads = environment.get("OMP_NUM_THREADS")
    if threads and threads != os.environ.get("OMP_NUM_THREADS"):
        torch: Any = import_module("torch")  # it reads the variable as it is imported
        torch.set_num_threads(int(threads))
    os.environ.clear()
    os.environ.update(environment)
    if "PROMETHEUS_MULTIPROC_DIR" in environment:
        values: Any = import_module("prometheus_client.values")
        values.ValueClass = values.get_value_class()  # it too looks at the environment as it is imported
    target(*args, **options)


class EarlyContext(multiprocessing.context.ForkServerContext):
    """Starts `EarlyProcess`es."""

    Process = EarlyProcess


def for_front_ends(multiprocessing: Any) -> Any:
    """Return the module `multiprocessing` with `EarlyContext` in the place of all others."""
    return SimpleNamespace(**vars(multiprocessing) | {"get_context": lambda _: EarlyContext()})

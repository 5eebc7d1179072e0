"""The engine's process on a CPU: forked from one that imports vLLM while the server does.

Importing vLLM is most of a start there, and both processes need it.
"""

import gc
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

MODULES = ("qwen_vllm.vllm_plugin.with_server_only", "qwen_vllm.vllm_plugin.early_imports")
"""What an engine imports, after the rule of when this ends."""


def begin() -> None:
    """Start the process that imports."""
    multiprocessing.set_forkserver_preload(list(MODULES))
    forkserver.ensure_running()


class EarlyProcess(multiprocessing.context.ForkServerProcess):
    """A process that is forked from there, with this one's environment, as a spawned one would have it."""

    def start(self) -> None:
        """Start the process."""
        vars(self).update(_target=_with_environment, _args=(dict(os.environ), vars(self)["_target"]))
        super().start()


def _with_environment(environment: dict[str, str], target: Callable[..., None], **options: Any) -> None:
    gc.freeze()  # what is imported stays: garbage is looked for among what comes
    gc.enable()
    os.environ.clear()
    os.environ.update(environment)
    target(**options)


class EarlyContext(multiprocessing.context.ForkServerContext):
    """Starts `EarlyProcess`es."""

    Process = EarlyProcess

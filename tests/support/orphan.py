"""A child of a process that is killed; a small module, for both import it anew."""

import multiprocessing
import threading

from qwen_vllm.vllm_plugin import plugin


def child_of_a_killed_process() -> None:
    """Runs in a process of its own: starts a child that waits for ever, and is killed."""
    context = multiprocessing.get_context("spawn")
    child = context.Process(target=wait_for_ever)
    child.start()
    print(child.pid, flush=True)
    child.join()


def wait_for_ever() -> None:
    plugin.end_with_parent()
    threading.Event().wait()

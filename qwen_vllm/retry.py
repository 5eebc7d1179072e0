"""Decides when to ask a busy server again, for the terminal and the page."""

import random

from qwen_vllm.protocol import ChatError

RETRIES = 6
"""Number of retries; they take about a minute together."""


def retry_delay(error: ChatError, attempt: int) -> float:
    """Return the seconds to wait after the `attempt`-th refusal (from 1), or raise it again to give up.

    The delay doubles, is at least the server's `retry_after`, and has a random part to spread clients.
    """
    if error.retry_after is None or attempt > RETRIES:
        raise error
    return max(error.retry_after, min(2.0 ** (attempt - 1), 16.0)) * random.uniform(1, 1.25)

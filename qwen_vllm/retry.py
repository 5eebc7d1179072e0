"""Decides when to ask a busy server again, for the terminal and the page."""

import random

from qwen_vllm.protocol import ChatError

RETRIES = 6
"""Number of retries; they take about a minute together."""


def retry_delay(error: ChatError, attempt: int) -> float | None:
    """Return the seconds to wait after the `attempt`-th refusal (from 1), or None.

    None: do not ask again. The delay doubles each time and is never shorter than the server's `retry_after`. A random
    part spreads the clients.
    """
    if error.retry_after is None or attempt > RETRIES:
        return None
    return max(error.retry_after, min(2.0 ** (attempt - 1), 16.0)) * random.uniform(1, 1.25)

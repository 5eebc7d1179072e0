"""The guard's flags."""

from argparse import Namespace
from typing import Any

MAX_BODY = 2**20


def guard_args(**flags: Any) -> Namespace:
    """The command line as the guard sees it, with its defaults."""
    defaults = {
        "api_key": None,
        "max_body_size": MAX_BODY,
        "body_timeout": 30.0,
        "tool_call_parser": None,
        "key_file": None,
        "data_parallel_size": 1,
    }
    for name in ("origins", "methods", "headers"):
        defaults[f"allowed_{name}"] = ["*"]
    defaults["allow_credentials"] = False
    return Namespace(**{**defaults, "disable_fastapi_docs": False, "enable_offline_docs": False, **flags})

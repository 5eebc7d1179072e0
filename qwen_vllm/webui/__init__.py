"""The page's parts. Import Gradio from here: it fails to load where the proxy in the environment is a SOCKS one."""

import os
from typing import Any

_proxies = {name: os.environ.pop(name) for name in list(os.environ) if name.lower().endswith("_proxy")}
try:
    import gradio
finally:
    os.environ.update(_proxies)

__all__ = ["UNQUEUED", "gradio"]

UNQUEUED: dict[str, Any] = {"queue": False, "api_visibility": "private"}
"""For events that are handled at once, by no other program."""

"""Where a program listens, and how others on this machine reach it."""

import socket
import sys

from qwen_vllm.words import say

THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
"""Hosts that no other machine can reach."""


def listen(program: str, host: str, port: int) -> socket.socket:
    """Listen on a port; end the program with one line where that is not possible."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        told = say(
            "cannot listen on {address} ({reason}): choose another --port", address=f"{host}:{port}", reason=reason
        )
        sys.exit(f"{program}: {told}")


def address(host: str, port: int, tls: bool = False) -> str:
    """Return the URL by which this machine reaches a program that listens on `host`."""
    host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"

"""A server with --headless computes for the server of another machine, the head: it ends when that is gone."""

import math
import socket
import sys
import threading
import time
from argparse import Namespace
from contextlib import suppress

import psutil

INTERVAL = 2
LATE = 10
"""Seconds after which a head that has closed its connections counts as ended."""


def end_with_head(args: Namespace) -> None:
    """End the engine's processes of this machine when the head has ended, or was cut off for --stall-timeout.

    vLLM's engine would wait for its next work for ever. The server ends with its engine.
    """
    head = str(socket.getaddrinfo(args.data_parallel_address or args.master_addr, None)[0][4][0])

    def watch() -> None:
        while not (ports := _ports(head)):
            time.sleep(INTERVAL)
        heard, cut_off = time.monotonic(), args.stall_timeout or math.inf
        while (silent := time.monotonic() - heard) < (cut_off if ports else LATE):
            time.sleep(INTERVAL)
            ports = _ports(head)
            if any(_listens(head, port) for port in ports):
                heard = time.monotonic()
        print(f"vllm_server.py: {head} has not answered for {silent:.0f} s", file=sys.stderr, flush=True)
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()

    threading.Thread(target=watch, daemon=True).start()


def _ports(head: str) -> set[int]:
    """Return the ports of the head with which processes of this server are connected."""
    ports = set()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            found = child.net_connections("tcp")
            ports |= {at.raddr.port for at in found if at.raddr and at.raddr.ip == head and at.status == "ESTABLISHED"}
    return ports


def _listens(head: str, port: int) -> bool:
    try:
        socket.create_connection((head, port), timeout=INTERVAL).close()
    except OSError:
        return False
    return True

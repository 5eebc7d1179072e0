"""Imported by the process that `early.begin` starts: it ends when the server does, also while it imports."""

import ctypes
import gc
import signal

import setproctitle

PR_SET_PDEATHSIG = 1
"""Of Linux's prctl: the signal that comes when the parent has ended. Processes that are forked do not inherit it."""

# What is imported stays: to look for garbage among it takes a tenth of the time.
gc.disable()
signal.signal(signal.SIGINT, signal.SIG_IGN)
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
# Once the environment has changed, an engine that is forked from here could no longer be given its name.
setproctitle.setproctitle("VLLM::Imports")

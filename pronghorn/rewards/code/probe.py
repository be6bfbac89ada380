"""Whether this machine can isolate untrusted code: shown by a program that tries to get out, not read from versions."""

from __future__ import annotations

import functools
import json
import os
import secrets
import socket
import sys
import tempfile
from typing import Any

from .errors import SandboxError
from .limits import Limits
from .sandbox import run_in_sandbox

_LIMITS = Limits(seconds=30, cpu_seconds=10, memory_mb=128)

# Prints what it could do, each of which must be False. Input: a file outside, our process number, a local socket.
_ATTEMPTS = """
import ctypes, json, os, socket, sys, threading
file, pid, name = json.load(sys.stdin)
could = {}
def attempt(what, do, *errors):
    try:
        do()
        could[what] = True
    except errors:
        could[what] = False
def connect():
    with socket.socket(socket.AF_UNIX) as s:
        s.connect("\\0" + name)
def threads():
    stop = threading.Event()
    started = []
    threading.stack_size(65536)  # so that it is not memory that runs out
    try:
        for _ in range(100):
            started.append(threading.Thread(target=stop.wait))
            started[-1].start()
    finally:
        stop.set()
def mount():
    if ctypes.CDLL(None).mount(b"none", b"/work", b"tmpfs", 0, None):
        raise PermissionError
attempt("read a file outside", lambda: open(file).close(), OSError)
attempt("write outside its folder", lambda: open("/outside", "w").close(), OSError)
attempt("see the trainer's process", lambda: os.kill(pid, 0), ProcessLookupError)
attempt("reach a local socket of the trainer", connect, OSError)
attempt("open a network socket", lambda: socket.socket(socket.AF_INET), OSError)
attempt("start a process", lambda: os.fork() or os._exit(0), OSError)
attempt("start 100 threads", threads, RuntimeError)
attempt("take more memory than it may", lambda: bytearray(2**28), MemoryError)
attempt("mount a file system", mount, PermissionError)
could["read the environment"] = set(os.environ) != {"PATH", "HOME", "TMPDIR", "LANG"}
could["run as root"] = os.getuid() == 0
open("inside", "w").close()
print(json.dumps(could))
"""


def require_sandbox() -> None:
    """Returns where untrusted code can be isolated; tried once a process.

    Raises:
        SandboxError: no Linux, no namespaces, or a wall that does not hold; the message says which, and the remedy.
    """
    _shown()


@functools.cache
def _shown() -> bool:
    """True; an error is not cached, so that a machine that was put right is tried again."""
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"untrusted code cannot be isolated on {sys.platform}: it takes Linux namespaces")
    name = f"pronghorn-{secrets.token_hex(8)}"
    with tempfile.NamedTemporaryFile() as file, socket.socket(socket.AF_UNIX) as server:
        server.bind("\0" + name)
        server.listen()
        tried = run_in_sandbox(_ATTEMPTS, json.dumps([file.name, os.getpid(), name]), _LIMITS)
    could: dict[str, Any] = json.loads(tried.stdout) if tried.status == "ok" else {}
    if not could:
        raise SandboxError(f"the sandbox for untrusted code does not work: {tried.status}, {tried.stderr[-500:]!r}")
    through = [what for what, did in could.items() if did]
    if through:
        raise SandboxError(f"the sandbox for untrusted code does not hold: a program in it could {', '.join(through)}")
    return True

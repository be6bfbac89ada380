"""One worker process from the trainer's side: started, asked, timed, killed, and its death put in words."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from typing import Any

from .calling import CallFailed
from .kill import kill_tree

START_SECONDS = 120.0
"""How long a worker may take to start and to import what its function needs; no part of a call's `timeout`."""

# A fresh interpreter that runs no code of the caller's script: no fork of a process with CUDA and threads, and no
# second import of `__main__`.
_BOOT = (
    "import json, sys; fd, parent, path = json.loads(sys.argv.pop()); sys.path[:] = path; "
    "from pronghorn.rewards.worker import main; main(fd, parent)"
)


class WorkerProcess:
    """A process that holds one reward function. Its life: `start`, then `ask` any number of times, then `kill`.

    The thread that starts it must outlive it: the kernel kills a worker when the thread ends that started it.

    Args:
        name: the function's, for messages.
        packed: the function, from `carry.pack`.
    """

    def __init__(self, name: str, packed: bytes) -> None:
        self.name, self._packed = name, packed
        self._ending = threading.Lock()
        self._connection, theirs = Pipe()
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _BOOT, json.dumps([theirs.fileno(), os.getpid(), sys.path])],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the trainer's to handle, and one kill reaches the whole group
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
            )
        except BaseException:
            self._connection.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def start(self) -> None:
        """Hands the function over and waits until the worker has it.

        Raises:
            CallFailed: the worker cannot load it, died, or took over `START_SECONDS`.
        """
        answer = self._exchange(pickle.dumps((self.name, self._packed)), START_SECONDS, "starting")
        if isinstance(answer, CallFailed):
            self.kill()
            raise answer

    def ask(self, request: bytes, limit: float) -> Any:
        """The worker's answer to `request`, unpickled.

        Raises:
            CallFailed: no answer within `limit` seconds ("timeout"), or the worker died ("death"). It is gone with its
                children when this is raised.
        """
        return self._exchange(request, limit, "running")

    def ended_idle(self) -> str | None:
        """Between two questions: how the worker died meanwhile, in words, or None while it lives."""
        if not self._connection.poll():  # it never speaks unasked, so there is only an end to be read
            return None
        return _in_words(self.kill())

    def _exchange(self, message: bytes, limit: float, doing: str) -> Any:
        started = time.monotonic()
        try:
            self._connection.send_bytes(message)
            answered = self._connection.poll(limit)
            if answered:
                return pickle.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            status = self.kill()
            raise CallFailed("death", f"its worker process {_in_words(status)} while {doing}") from error
        self.kill()
        seconds = time.monotonic() - started
        raise CallFailed("timeout", f"ran over its timeout of {limit:g} s (killed after {seconds:.1f} s)")

    def end(self) -> int:
        """Ends the worker and all it started; its exit status. For any thread: one that waits in `ask` sees a death."""
        with self._ending:
            return kill_tree(self._process)

    def kill(self) -> int:
        """`end`, and closes the connection: for the thread that asks, or once no thread does."""
        status = self.end()
        self._connection.close()
        return status


def _in_words(status: int) -> str:
    if status >= 0:
        return f"ended by itself with exit status {status}"
    killed = signal.Signals(-status).name if -status in set(signal.Signals) else f"signal {-status}"
    return f"died of {killed}{' (out of memory?)' if killed == 'SIGKILL' else ''}"

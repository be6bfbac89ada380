"""The process that runs one reward function: reads rows, calls it, answers. Started by `process.WorkerProcess`.

Light on purpose: nothing here imports torch, and no GPU is visible in it, so CUDA cannot start.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import select
import signal
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

from .calling import CallFailed, call, check_arguments, no_log
from .carry import unpack
from .errors import RewardError
from .kill import kill_descendants, tie_to_parent
from .policy import Scored
from .state import StateReceiver
from .values import as_rewards


def main(fd: int, parent: int) -> None:
    """Serves the connection `fd` until `parent` closes it or ends."""
    tie_to_parent(parent)
    connection = Connection(fd)
    threading.Thread(target=_end_with_the_connection, args=(fd,), name="lifeline", daemon=True).start()
    name, packed = pickle.loads(connection.recv_bytes())
    try:
        func = unpack(packed)
    except Exception as error:  # noqa: BLE001 - whatever an import of the user's raises is the answer
        connection.send(CallFailed("start", f"cannot be loaded in a worker process: {error!r}", _as_text(error)))
        return
    connection.send(None)
    loop = asyncio.new_event_loop()  # one for good: clients that the function keeps stay bound to it
    receiver = StateReceiver()
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(func, name, loop, receiver, request))


def _answer(func: Any, name: str, loop: asyncio.AbstractEventLoop, receiver: StateReceiver, request: bytes) -> bytes:
    """`Scored` with what was logged, or the exception that says why there are no rewards."""
    extra: list[tuple[str, list[Any]]] = []
    metrics: list[tuple[Any, ...]] = []
    try:
        rows, update, collect, alone = pickle.loads(request)
        extras = {
            "trainer_state": receiver.state(update),
            "log_extra": no_log if alone else lambda column, values: extra.append((column, list(values))),
            "log_metric": no_log if alone else lambda *given: metrics.append(given),
        }
        check_arguments(func, name, {**rows, **extras})
        returned = call(func, rows, extras, loop.run_until_complete)
        faults: dict[int, RewardError] = {}
        values = as_rewards(name, returned, rows["completions"], faults if collect else None)
        return pickle.dumps((Scored(values, faults), extra, metrics))
    except CallFailed as failed:
        return pickle.dumps(CallFailed(failed.kind, failed.problem, _as_text(failed.cause)))
    except RewardError as fault:
        return pickle.dumps(fault)
    except Exception as error:  # noqa: BLE001 - rows or logs that do not pickle; told, not lost
        problem = f"was passed, or logged, what a worker process cannot exchange: {error!r}"
        return pickle.dumps(RewardError(name, problem))


def _as_text(error: BaseException | None) -> WorkerTraceback | None:
    """The traceback in words: exceptions and their frames do not travel."""
    return None if error is None else WorkerTraceback("".join(traceback.format_exception(error)))


class WorkerTraceback(Exception):
    """The traceback of an exception in a worker process, as text; the cause of the error raised in the trainer."""

    def __str__(self) -> str:
        return f"in the worker process:\n{self.args[0]}"


def _end_with_the_connection(fd: int) -> None:
    """Kills this process and what it started once the other end is closed, whatever the function is doing."""
    poll = select.poll()
    poll.register(fd, 0)  # only hang-ups
    poll.poll()
    kill_descendants(os.getpid())
    os.killpg(os.getpgid(0), signal.SIGKILL)

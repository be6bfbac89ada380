"""The workers of one reward function: started ahead, kept, timed, replaced when they die."""

from __future__ import annotations

import logging
import pickle
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .calling import CallFailed, Rows, no_log
from .errors import RewardError
from .policy import OnError, Scored, score_rows, shifted
from .process import WorkerProcess
from .state import StateSender, Update, plain_state

logger = logging.getLogger("pronghorn")

ALONE = 0.5
"""A row tried alone gets this part of `timeout`: enough for what a fresh worker's first call imports."""

SEARCH = 2.0
"""All rows tried alone get so many times `timeout`: four that hang fit."""


@dataclass
class _Slot:
    process: WorkerProcess | None = None
    sender: StateSender = field(default_factory=StateSender)


@dataclass
class _Part:
    """What one worker gave for its part of the rows."""

    scored: Scored
    extra: list[tuple[str, list[Any]]] = field(default_factory=list)
    metrics: list[tuple[Any, ...]] = field(default_factory=list)


class PendingCall:
    """A call that workers are busy with."""

    def __init__(self, name: str, completions: Sequence[Any], starts: list[int], parts: list[Future[_Part]]) -> None:
        self._name, self._completions, self._starts, self._parts = name, completions, starts, parts

    def result(self, log_extra: Callable[..., Any] = no_log, log_metric: Callable[..., Any] = no_log) -> Scored:
        """Waits for all parts, hands on what they logged (columns joined in the rows' order), joins the rewards.

        Raises:
            RewardError: as the policy says; the row is that of the whole batch.
        """
        whole = Scored([])
        columns: dict[str, list[Any]] = {}
        for start, future in zip(self._starts, self._parts):
            try:
                part = future.result()
            except RewardError as fault:
                raise shifted(fault, start, self._completions) from fault.__cause__
            whole.values += part.scored.values
            for row, excused in part.scored.faults.items():
                whole.faults[start + row] = shifted(excused, start, self._completions)
            for column, values in part.extra:
                columns.setdefault(column, []).extend(values)
            for given in part.metrics:
                log_metric(*given)
        for column, values in columns.items():
            log_extra(column, values)
        return whole


class WorkerPool:
    """`workers` processes that each hold the function `packed`; a call's rows are split evenly among them, in order.

    Thread-safe apart from `close`, which ends whatever runs. Processes start at `prepare` or at the first call.
    """

    def __init__(self, name: str, packed: bytes, timeout: float, on_error: OnError, workers: int) -> None:
        self.name, self.timeout, self.on_error, self.workers = name, timeout, on_error, workers
        self._packed = packed
        self._lock = threading.Lock()
        self._closing = False
        self._threads: ThreadPoolExecutor | None = None
        self._slots: list[_Slot] = []
        self._idle: queue.SimpleQueue[_Slot] = queue.SimpleQueue()

    @property
    def pids(self) -> list[int]:
        """The process numbers of the workers that live now."""
        return [slot.process.pid for slot in self._slots if slot.process is not None]

    def prepare(self) -> None:
        """Starts the workers in the background, so that their imports pass while something else runs."""
        if self._threads is None:
            for _ in range(self.workers):
                self._executor().submit(self._warm)

    def submit(self, rows: Rows, state: Any = None) -> PendingCall:
        """Starts a call on `rows`."""
        completions = rows["completions"]
        size = max(1, -(-len(completions) // self.workers))
        starts = list(range(0, len(completions), size))
        seen = plain_state(state)
        parts = [
            self._executor().submit(self._score, {k: list(v[s : s + size]) for k, v in rows.items()}, seen)
            for s in starts
        ]
        return PendingCall(self.name, completions, starts, parts)

    def close(self) -> None:
        """Kills the workers with all they started and joins the threads. The next call starts anew."""
        if self._threads is None:
            return
        with self._lock:
            self._closing = True
            processes = [slot.process for slot in self._slots if slot.process is not None]
        for process in processes:
            process.end()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for slot in self._slots:
            if slot.process is not None:
                slot.process.kill()
        self._threads, self._slots, self._idle = None, [], queue.SimpleQueue()
        self._closing = False

    def _executor(self) -> ThreadPoolExecutor:
        if self._threads is None:
            self._threads = ThreadPoolExecutor(self.workers, thread_name_prefix=f"pronghorn-reward-{self.name}")
            self._slots = [_Slot() for _ in range(self.workers)]
            for slot in self._slots:
                self._idle.put(slot)
        return self._threads

    def _warm(self) -> None:
        slot = self._idle.get()
        try:
            self._started(slot)
        finally:
            self._idle.put(slot)

    def _score(self, rows: Rows, state: dict[str, Any] | None) -> _Part:
        slot = self._idle.get()
        try:
            part = _Part(Scored([]))

            def attempt(rows: Rows, alone: bool) -> Scored:
                scored, extra, metrics = self._ask(slot, rows, state, alone)
                part.extra += extra
                part.metrics += metrics
                return scored

            part.scored = score_rows(self.name, attempt, rows, self.on_error, self.timeout * SEARCH)
            return part
        finally:
            self._idle.put(slot)

    def _ask(self, slot: _Slot, rows: Rows, state: dict[str, Any] | None, alone: bool) -> Any:
        process = self._started(slot)
        update = slot.sender.update(state)
        request = _packed_request(self.name, rows, update, self.on_error != "raise", alone)
        try:
            answer = process.ask(request, self.timeout * ALONE if alone else self.timeout)
        except CallFailed:
            slot.process = None  # it is dead; the next attempt starts another
            raise
        if isinstance(answer, (CallFailed, RewardError)):
            raise answer
        slot.sender.arrived(state, update)
        return answer

    def _started(self, slot: _Slot) -> WorkerProcess:
        if slot.process is not None:
            death = slot.process.ended_idle()
            if death is None:
                return slot.process
            logger.warning("a worker of reward function %r %s while it had nothing to do; starting another",
                           self.name, death)  # fmt: skip
            slot.process = None
        with self._lock:
            if self._closing:
                raise RewardError(self.name, "was stopped: its workers were closed")
            process = slot.process = WorkerProcess(self.name, self._packed)
            slot.sender = StateSender()
        try:
            process.start()
        except CallFailed as failed:  # of no row, so no policy forgives it
            slot.process = None
            raise RewardError(self.name, failed.problem) from failed.cause
        return process


def _packed_request(name: str, rows: Rows, update: Update | None, collect: bool, alone: bool) -> bytes:
    try:
        return pickle.dumps((rows, update, collect, alone), protocol=pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # whatever a value's own __reduce__ raises
        for key, column in rows.items():
            try:
                pickle.dumps(column)
            except Exception as cause:
                raise RewardError(name, f"column {key!r} cannot be sent to a worker process: {cause!r}") from cause
        raise RewardError(name, f"its rows cannot be sent to a worker process: {error!r}") from error

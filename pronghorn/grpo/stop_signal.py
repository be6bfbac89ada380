"""SIGTERM while training: the run stops at once where nothing can break, and at the next such place where it could."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequested(BaseException):
    """Raised within a step when SIGTERM came; not an ``Exception``, so that no reward function takes it for its own."""


class StopSignal:
    """Notes SIGTERM, and raises :class:`StopRequested` inside :meth:`interruptible`.

    Args:
        tell: called when it comes, in the signal's handler, wherever the main thread is: it must take no lock.

    Attributes:
        requested: SIGTERM has come since :meth:`listening` began.
    """

    def __init__(self, say: Callable[[str], None] = print, tell: Callable[[], None] = lambda: None) -> None:
        self.requested = False
        self._say, self._tell = say, tell
        self._interruptible = False
        self._owner = 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM inside; the handler of before is back afterwards.

        Python lets only the main thread handle signals: elsewhere one line says that SIGTERM ends the process as ever.
        A process that ignores SIGTERM goes on ignoring it.
        """
        self.requested, self._interruptible, self._owner = False, False, os.getpid()
        before = signal.getsignal(signal.SIGTERM)
        if before is signal.SIG_IGN:
            yield
            return
        if threading.current_thread() is not threading.main_thread():
            self._say("Pronghorn: train() runs outside the main thread, so SIGTERM saves no checkpoint")
            yield
            return
        signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        finally:
            # None: a handler that was not set from Python, which Python cannot put back
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked child, a data loader's worker say: it ends as if nobody listened
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        if self.requested:
            return  # it is stopping already; a second signal must not cut the save short
        self.requested = True
        self._tell()
        if self._interruptible:
            self._interruptible = False
            raise StopRequested

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, the work is thrown away and done again after a resume, so SIGTERM may end it anywhere."""
        self._interruptible = True
        try:
            if self.requested:  # it came where it could only be noted
                raise StopRequested
            yield
        finally:
            self._interruptible = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A part of interruptible work that must not be cut: what came within it ends the work behind it."""
        interruptible, self._interruptible = self._interruptible, False
        try:
            yield
        finally:
            self._interruptible = interruptible
        if interruptible and self.requested:
            raise StopRequested

"""One call on a thread of its own, joined where its result is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any


class Background:
    """A call that :meth:`start` begins at once, or when ``after`` is over. The thread is a daemon and ends with it."""

    def __init__(self, call: Callable[[], Any], after: Background | None = None, kind: str = "scoring") -> None:
        self._future: Future[Any] = Future()
        self._call: Callable[[], Any] | None = call
        self._after = after
        self._thread = threading.Thread(target=self._run, name=f"pronghorn-{kind}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        if self._after is not None:
            self._after.over()
            self._after = None
        assert self._call is not None
        try:
            self._future.set_result(self._call())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            self._future.set_exception(error)
        self._call = None  # and with it what it was made of

    def over(self) -> None:
        """Wait for the call, however it ends."""
        wait([self._future])

    def result(self) -> Any:
        """Wait for the call; what it raised is raised here."""
        return self._future.result()

    def end(self) -> BaseException | None:
        """Wait until the thread is gone; what the call raised, if it did. None where it never started."""
        if self._thread.ident is None:
            return None
        self._thread.join()
        return self._future.exception()

"""One call on a thread of its own, joined where its result is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any


class Background:
    """Starts ``call`` at once, or when ``after`` is over. The thread is a daemon and ends with the call."""

    def __init__(self, call: Callable[[], Any], after: Background | None = None) -> None:
        self._future: Future[Any] = Future()
        self._call, self._after = call, after
        self._thread = threading.Thread(target=self._run, name="pronghorn-scoring", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if self._after is not None:
            wait([self._after._future])
            self._after = None
        try:
            self._future.set_result(self._call())
        except BaseException as error:  # noqa: BLE001 - raised again where the result is asked for
            self._future.set_exception(error)

    def result(self) -> Any:
        """Wait for the call; what it raised is raised here."""
        return self._future.result()

    def end(self) -> BaseException | None:
        """Wait until the thread is gone; what the call raised, if it did."""
        self._thread.join()
        return self._future.exception()

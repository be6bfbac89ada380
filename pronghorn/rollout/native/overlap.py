"""A generation that is ready to be drawn by another thread, while the policy trains on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from ...kernels.launch import not_recorded
from ..base import DrawingStopped, KeptPolicy, Progress, RequestOutput

Run = Callable[[Progress], list[RequestOutput]]


class SideStream:
    """Where a drawing's kernels are queued: on a GPU a stream of its own, behind what was queued when it was made.

    What the drawing reads and writes was made on the trainer's stream, and may be given back there once the drawing is
    over; so the host waits for the stream at its end.

    Args:
        device: where the model is.
        stream: the engine's own stream; None on the CPU.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None) -> None:
        self.device, self.stream = device, stream
        self.ready = None if stream is None else torch.cuda.current_stream(device).record_event()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Gradient mode, current device and current stream are a thread's own: set here, and put back."""
        with torch.no_grad(), not_recorded():
            if self.stream is None or self.ready is None:
                yield
                return
            with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
                self.stream.wait_event(self.ready)
                try:
                    yield
                finally:
                    self.stream.synchronize()


class Drawing:
    """See :class:`pronghorn.rollout.base.Drawing`.

    Args:
        turn: held while it is drawn: an engine draws one generation at a time.
        unused: whether nothing else was drawn since it was made ready.
        where: its stream.
        run: draws it, calling the progress that it is given after each look at the tokens.
        policy: copies what it is drawn by.
    """

    def __init__(
        self,
        turn: threading.RLock,
        unused: Callable[[], bool],
        where: SideStream,
        run: Run,
        policy: Callable[[], KeptPolicy],
    ) -> None:
        self._turn, self._unused, self._where, self._run, self._policy = turn, unused, where, run, policy
        self._begun = threading.Event()
        self._stopped = self._keep = False  # no event: it has a lock, which a signal may find held by its own thread

    def __call__(self) -> list[RequestOutput]:
        try:
            with self._turn:
                self._begun.set()
                if not self._unused():
                    raise RuntimeError("another generation ran between making this one ready and drawing it")
                with self._where():
                    return self._run(self._look)
        finally:
            self._begun.set()

    def _look(self, finished: int, total: int, tokens: int) -> None:
        if self._stopped:
            # Copied here, while it has the engine: whoever asks next may be answered by another policy.
            policy = self._policy() if self._keep else None
            raise DrawingStopped(f"stopped after {finished} of {total} completions", policy)

    def wait_begun(self) -> None:
        self._begun.wait()

    def stop(self, keep: bool = False) -> None:
        self._keep = self._keep or keep  # first: the thread looks at it once it is stopped
        self._stopped = True

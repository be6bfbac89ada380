"""Compiling the kernels of a recorded walk side by side, before their first launch.

One by one at their first use, the kernels of a GRPO step of an 8B model take a quarter of a minute: Triton compiles
each in 0.2 to 2 s, then a C compiler builds the function that launches it, a third of a second for each signature.
Neither holds Python's lock for most of it, so threads are enough, though what runs beside them is slowed
(``docs/performance.md``). Triton's own mode for it (``AsyncCompileMode``) puts a
kernel where a launch looks for it, under the key that the launch will compute; a launch that comes before its kernel
is ready waits for that kernel alone. Nothing is tuned, nothing is launched.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from pronghorn.kernels.launch import Recorded

MOST_THREADS = 16
SILENT_SECONDS = 1.0
"""Below it nothing is said: the kernels came from Triton's cache."""


def threads() -> int:
    """As many as this process may use processors, up to :data:`MOST_THREADS`."""
    return min(len(os.sched_getaffinity(0)), MOST_THREADS)


class _Compilers:
    """The executor that Triton's mode is given: the function that launches a kernel is built in the same thread.

    Both end in Triton's cache. The GPU is not touched: a kernel's code is loaded at its first launch, by the thread
    that launches, since loading it from another while a CUDA graph is being captured would break the capture.
    """

    def __init__(self, pool: ThreadPoolExecutor, device: torch.device) -> None:
        self.pool, self.device = pool, device

    def submit(self, compile_kernel: Callable[[], Any]) -> Future[Any]:
        return self.pool.submit(self._ready, compile_kernel)

    def _ready(self, compile_kernel: Callable[[], Any]) -> Any:
        from triton.runtime import driver

        kernel = compile_kernel()
        if self.device.type == "cuda":
            driver.active.launcher_cls(kernel.src, kernel.metadata)
        return kernel


class Warming:
    """Kernels being compiled in the background.

    Args:
        recorded: what to compile.
        device: the GPU that will run it. For any other device no launching functions are built.
        what: how the printed line names it.
    """

    def __init__(self, recorded: Recorded, device: torch.device, what: str) -> None:
        self.recorded, self.device, self.what = recorded, device, what
        self.seconds: float | None = None
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="pronghorn-warm")
        self._thread.start()

    def wait(self) -> float:
        """Seconds that it took.

        Raises:
            Exception: what a kernel's compilation raised.
        """
        self._thread.join()
        if self.error is not None:
            raise self.error
        assert self.seconds is not None
        return self.seconds

    def _run(self) -> None:
        begun = time.perf_counter()
        try:
            self._compile()
        except Exception as error:  # noqa: BLE001 - kept for wait(), said in a line, raised again by the launch itself
            self.error = error
            print(
                f"Pronghorn: compiling the kernels of {self.what} ahead stopped ({type(error).__name__}: {error}); "
                "they are compiled at their first launch",
                flush=True,
            )
            return
        self.seconds = time.perf_counter() - begun
        if self.seconds >= SILENT_SECONDS:
            count = len(self.recorded.launches) + len(self.recorded.sources)
            print(
                f"Pronghorn: {count} kernels of {self.what} compiled in {self.seconds:.1f} s by {threads()} threads, "
                "beside other work; they stay in the cache",
                flush=True,
            )

    def _compile(self) -> None:
        from triton import AsyncCompileMode

        from pronghorn.kernels.cuda_source import cached_cubin

        with ThreadPoolExecutor(threads(), "pronghorn-compile") as pool:
            recorded, built = self.recorded, list[Future[bytes]]()

            def build_those_before(launches: int) -> None:
                while len(built) < len(recorded.sources) and recorded.before[len(built)] <= launches:
                    built.append(pool.submit(cached_cubin, *recorded.sources[len(built)]))

            guard = torch.cuda.device(self.device if self.device.type == "cuda" else -1)
            with guard, AsyncCompileMode(_Compilers(pool, self.device)):  # type: ignore[arg-type]
                for at, (kernel, args, options) in enumerate(recorded.launches):  # all in the walk's order
                    build_those_before(at)
                    kernel.warmup(*args, grid=(1,), **options)
                build_those_before(len(recorded.launches))
            for source in built:
                source.result()


def warm(recorded: Recorded, device: torch.device, what: str) -> Warming | None:
    """Begin to compile; None where there is nothing to do."""
    if not recorded.launches and not recorded.sources:
        return None
    return Warming(recorded, device, what)

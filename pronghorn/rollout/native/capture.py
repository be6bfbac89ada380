"""Capturing CUDA graphs of one engine: on one stream, in one pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


class Capture:
    """``capture(run)`` makes a graph of what ``run`` launches.

    The graphs share memory: no two run at once, and what one gives is read before another runs.

    Args:
        device: the GPU.
        stream: what to capture on; its own where None.
    """

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        self.device, self._stream = device, stream
        self._pool: Any = None

    def __call__(self, run: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
        """The graph, and what ``run`` gave within it. Kernels compile and workspaces are made in a run outside of it,
        before. Both are on one stream: kernels keep a workspace a stream, and one that was first made within a graph
        would be the graph's.
        """
        stream = self._stream = self._stream or torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        mode = "thread_local"  # rewards may use the GPU
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode=mode):
            given = run()
        self._pool = graph.pool()
        return graph, given

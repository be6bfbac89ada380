"""Activations in host memory between forward and backward, copied beside the kernels that compute.

Forward hands a layer's tensors over and goes on; they are copied out on a stream of their own, and their memory on the
GPU is free once that is done (at most :data:`IN_FLIGHT` layers wait for it at a time). Backward of a layer asks for the
layer before it, so that the copy in runs while this one computes. Nothing here waits on the host.

Order of writes and reads, by stream: the copy out waits for all that was queued when it was asked for, so for the
kernels that made the tensors, and for earlier copies in, which the compute stream has waited for by then. The copy in
is queued behind all that was queued when it was asked for, since its buffers may be memory that a queued kernel reads.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence

import torch

from ..lora.projection import row_columns
from .host_memory import HostMemory, Slot

IN_FLIGHT = 2
"""Layers whose copy out may be under way before compute waits for the oldest."""


class HostStore:
    """The host memory and the two copy streams of one GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = HostMemory()
        self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self.leaving: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()
        self.latest: weakref.ref[Stored] | None = None

    def save(self, tensors: Sequence[torch.Tensor | None]) -> Stored:
        """Start to copy ``tensors`` out. The caller drops its own references to free their memory on the GPU."""
        compute = torch.cuda.current_stream(self.device)
        while len(self.leaving) >= IN_FLIGHT or (self.leaving and self.leaving[0][0].query()):
            compute.wait_event(self.leaving.popleft()[0])
        stored = Stored(self, tensors, None if self.latest is None else self.latest())
        self.latest = weakref.ref(stored)
        return stored

    def settle(self) -> None:
        """Let compute wait for every copy out, and drop what was copied."""
        compute = torch.cuda.current_stream(self.device)
        while self.leaving:
            compute.wait_event(self.leaving.popleft()[0])


class Stored:
    """Tensors of one layer on their way out, in host memory, or on their way back."""

    def __init__(self, store: HostStore, tensors: Sequence[torch.Tensor | None], previous: Stored | None) -> None:
        self.store = store
        self.previous = None if previous is None else weakref.ref(previous)
        self.columns = [None if t is None or t.is_contiguous() else t.shape[-1] for t in tensors]
        tensors = [None if t is None else _whole(t) for t in tensors]
        self.kinds = [None if t is None else (tuple(t.shape), t.dtype) for t in tensors]
        self.slots: list[Slot | None] = []
        self.coming: list[torch.Tensor | None] | None = None
        self.asked = torch.cuda.current_stream(store.device)
        self.ready = torch.cuda.Event()
        held = [t for t in tensors if t is not None]
        store.out.wait_stream(torch.cuda.current_stream(store.device))
        with torch.cuda.stream(store.out):
            for t in tensors:
                slot = None if t is None else store.memory.take(t.numel() * t.dtype.itemsize)
                self.slots.append(slot)
                if t is not None and slot is not None:
                    store.memory.view(slot, tuple(t.shape), t.dtype).copy_(t, non_blocking=True)
            self.gone = torch.cuda.Event()
            self.gone.record(store.out)
        store.leaving.append((self.gone, held))

    def prefetch(self) -> None:
        """Start to copy the tensors back, unless that was done."""
        if self.coming is not None or not self.slots:
            return
        store = self.store
        self.asked = torch.cuda.current_stream(store.device)
        self.coming = [
            None if kind is None else torch.empty(kind[0], dtype=kind[1], device=store.device) for kind in self.kinds
        ]
        store.back.wait_stream(self.asked)
        store.back.wait_event(self.gone)
        with torch.cuda.stream(store.back):
            for t, slot in zip(self.coming, self.slots):
                if t is not None and slot is not None:
                    t.copy_(store.memory.view(slot, tuple(t.shape), t.dtype), non_blocking=True)
            self.ready.record(store.back)

    def take(self) -> list[torch.Tensor | None]:
        """The tensors, on the GPU, once: compute waits for them. The layer before is asked for at the same time.

        Raises:
            RuntimeError: they were taken before (backward ran twice through one graph).
        """
        if not self.slots:
            raise RuntimeError(
                "backward ran twice through a layer whose activations were offloaded, which are kept for one backward: "
                "run the forward again, or pass use_gradient_checkpointing='off'"
            )
        self.store.settle()
        self.prefetch()
        torch.cuda.current_stream(self.store.device).wait_event(self.ready)
        found, self.coming = self.coming, None
        assert found is not None
        self._release()
        ahead = self.previous() if self.previous is not None else None
        if ahead is not None:
            ahead.prefetch()
        return [t if t is None or n is None else t[..., :n] for t, n in zip(found, self.columns)]

    def _release(self) -> None:
        for slot in self.slots:
            if slot is not None:
                self.store.memory.give(slot)
        self.slots = []

    def __del__(self) -> None:
        if self.slots:  # a graph dropped without its backward: later copies out wait for what still reads or writes
            if self.coming is not None:
                self.store.out.wait_event(self.ready)
                self.asked.wait_event(self.ready)  # and so does whoever takes the memory that is being copied to
            self._release()


def _whole(t: torch.Tensor) -> torch.Tensor:
    """``t``, or the table that it is the first columns of: rows that lie apart are copied with what is between them.

    Copying them alone would pack them on the GPU first, into memory of the copy's stream.
    """
    if t.is_contiguous() or t.dim() != 2:
        return t.contiguous()
    rows, pitch = t.shape[0], t.stride(0)
    is_table = t.stride(1) == 1 and pitch == row_columns(t.shape[1]) and t.storage_offset() == 0
    if not is_table or t.untyped_storage().nbytes() < rows * pitch * t.element_size():
        return t.contiguous()
    return t.as_strided((rows, pitch), (pitch, 1))


_stores: dict[int, HostStore] = {}


def host_store(index: int) -> HostStore:
    """The store of GPU ``index``, shared by all models on it."""
    if index not in _stores:
        _stores[index] = HostStore(torch.device("cuda", index))
    return _stores[index]


def look_ahead(device: torch.device) -> None:
    """A layer that kept its own on the GPU goes backward: what left has left, and what it will meet next may come."""
    store = _stores.get(device.index) if device.type == "cuda" else None
    if store is None:
        return
    store.settle()
    latest = None if store.latest is None else store.latest()
    if latest is not None:
        latest.prefetch()

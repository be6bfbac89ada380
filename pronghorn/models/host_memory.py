"""Page-locked host memory in a few large segments, handed out in pieces and taken back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

SEGMENT = 1 << 29
"""Bytes of a segment; a power of two, which is what a page-locked allocation takes up anyway."""

_ALIGN = 512


@dataclass(frozen=True)
class Slot:
    """``size`` bytes from ``start`` of segment ``segment``."""

    segment: int
    start: int
    size: int


class HostMemory:
    """First fit over segments that are never given back: a step's activations have the same sizes as the last one's.

    Args:
        pinned: page-lock the segments, so that copies run beside kernels. False where there is no GPU.
        segment: bytes of a segment; a larger request gets a segment of its own, up to the next power of two.
    """

    def __init__(self, pinned: bool = True, segment: int = SEGMENT) -> None:
        self.pinned, self.segment = pinned, segment
        self.segments: list[torch.Tensor] = []
        self.free: list[Slot] = []

    @property
    def reserved(self) -> int:
        """Bytes of all segments."""
        return sum(s.numel() for s in self.segments)

    @property
    def used(self) -> int:
        """Bytes handed out."""
        return self.reserved - sum(slot.size for slot in self.free)

    def take(self, size: int) -> Slot:
        """A slot of at least ``size`` bytes."""
        size = max(-(-size // _ALIGN) * _ALIGN, _ALIGN)
        for i, slot in enumerate(self.free):
            if slot.size >= size:
                return self._cut(i, size)
        bytes_ = max(self.segment, 1 << (size - 1).bit_length())
        self.segments.append(torch.empty(bytes_, dtype=torch.uint8, pin_memory=self.pinned))
        self.free.append(Slot(len(self.segments) - 1, 0, bytes_))
        return self._cut(len(self.free) - 1, size)

    def _cut(self, i: int, size: int) -> Slot:
        slot = self.free[i]
        if slot.size == size:
            self.free.pop(i)
        else:
            self.free[i] = Slot(slot.segment, slot.start + size, slot.size - size)
        return Slot(slot.segment, slot.start, size)

    def give(self, slot: Slot) -> None:
        """Take a slot back and join it with its free neighbours."""
        start, end = slot.start, slot.start + slot.size
        rest = []
        for other in self.free:
            if other.segment == slot.segment and other.start + other.size == start:
                start = other.start
            elif other.segment == slot.segment and other.start == end:
                end = other.start + other.size
            else:
                rest.append(other)
        rest.append(Slot(slot.segment, start, end - start))
        self.free = sorted(rest, key=lambda s: (s.segment, s.start))

    def view(self, slot: Slot, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over a slot, which must be large enough."""
        bytes_ = dtype.itemsize
        for n in shape:
            bytes_ *= n
        return self.segments[slot.segment][slot.start : slot.start + bytes_].view(dtype).view(shape)

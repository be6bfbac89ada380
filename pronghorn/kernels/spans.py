"""Which queries meet which keys: packed tokens cut into spans, as the attention kernels take them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch


def on_device(values: Sequence[int] | torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``values`` as a tensor on ``device``; on a GPU the copy is queued and the host goes on."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def pieces_on_device(pieces: Iterable[tuple[int, int]], device: torch.device) -> torch.Tensor:
    """int64 numbers of all the ranges ``[start, stop)``, one after another."""
    return on_device(torch.cat([torch.arange(start, stop) for start, stop in pieces]), torch.int64, device)


@dataclass(frozen=True)
class Spans:
    """Queries and keys in equally many spans, one after another; the queries of span i see only keys of span i.

    Attributes:
        q_lengths, k_lengths: queries and keys of each span, each at least 1.
        causal: query n of a span sees its keys up to n; else all of them. With more keys than queries a span's last
            query sees all its keys, and each one before it one key less: flash alone takes such spans.
        window: a query sees at most the last ``window`` keys up to its own; None for all. Causal spans only.
        device: where the tokens are.
    """

    q_lengths: tuple[int, ...]
    k_lengths: tuple[int, ...]
    causal: bool
    device: torch.device
    window: int | None = None

    @cached_property
    def max_q(self) -> int:
        return max(self.q_lengths)

    @cached_property
    def max_k(self) -> int:
        return max(self.k_lengths)

    @cached_property
    def equal(self) -> bool:
        """All spans have as many queries as each other, and as many keys."""
        return len(set(self.q_lengths)) == 1 and len(set(self.k_lengths)) == 1

    @cached_property
    def cu_q(self) -> torch.Tensor:
        """int32 ``[spans + 1]``: where each span's queries begin, and the end."""
        return on_device([0, *accumulate(self.q_lengths)], torch.int32, self.device)

    @cached_property
    def cu_k(self) -> torch.Tensor:
        """int32 ``[spans + 1]``: where each span's keys begin, and the end."""
        if self.k_lengths == self.q_lengths:
            return self.cu_q
        return on_device([0, *accumulate(self.k_lengths)], torch.int32, self.device)

    @cached_property
    def q_slots(self) -> torch.Tensor | None:
        """int64: the slot of each query in spans padded on the right to the longest; None where none is padded."""
        return self._slots(self.q_lengths)

    @cached_property
    def k_slots(self) -> torch.Tensor | None:
        """int64: the slot of each key in padded spans; None where none is padded."""
        return self.q_slots if self.k_lengths == self.q_lengths else self._slots(self.k_lengths)

    def _slots(self, lengths: tuple[int, ...]) -> torch.Tensor | None:
        longest = max(lengths)
        if longest * len(lengths) == sum(lengths):
            return None
        return pieces_on_device(((row * longest, row * longest + n) for row, n in enumerate(lengths)), self.device)

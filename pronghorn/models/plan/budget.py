"""The memory that a plan may use: of the GPU at hand, of a card that is only named, and of the host."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...env import cpu
from .card import Card
from .constants import CONTEXT_BYTES, HOST_SHARE, RESERVE_BYTES, RESERVE_SHARE


@dataclass(frozen=True)
class Budget:
    """Bytes, as the allocator counts them.

    Attributes:
        peak: the most that may be allocated at once, what is allocated now included.
        allocated: what is allocated now.
        limit: the memory there is for this process.
    """

    peak: int
    allocated: int
    limit: int


def less_reserve(limit: int) -> int:
    """``limit`` without what is left free for fragmentation and workspaces."""
    return int(limit * (1 - RESERVE_SHARE)) - RESERVE_BYTES


def gpu_budget(device: torch.device) -> Budget:
    """What this process may allocate on ``device``: what is free there and what its allocator already holds.

    ``torch.cuda.set_per_process_memory_fraction`` is honoured where torch tells it.
    """
    free, total = torch.cuda.mem_get_info(device)
    told = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    limit = total if told is None else int(told(device) * total)
    usable = min(limit, free + torch.cuda.memory_reserved(device))
    return Budget(less_reserve(usable), torch.cuda.memory_allocated(device), limit)


def named_budget(card: Card) -> Budget:
    """The budget on an empty ``card``."""
    return Budget(less_reserve(card.total_bytes - CONTEXT_BYTES), 0, card.total_bytes)


def host_budget() -> int:
    """Bytes of main memory that may be pinned for offloaded tensors."""
    return int(HOST_SHARE * cpu().free_bytes)

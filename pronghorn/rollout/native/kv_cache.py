"""Keys and values in fixed-size blocks, taken when first needed and given back for training."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...config.errors import ConfigError
from ...kernels.spans import on_device


@dataclass(frozen=True)
class KVShape:
    """What one cached token costs: its layers, kv heads (K), head dim (E) and dtype, and where it lives."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, base: Any) -> KVShape:
        """Read it off a transformers ``*ForCausalLM``."""
        config = base.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        embedding = base.get_input_embeddings().weight
        return cls(config.num_hidden_layers, config.num_key_value_heads, head_dim, embedding.dtype, embedding.device)

    @property
    def token_bytes(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.dtype.itemsize


def memory_budget(device: torch.device, utilization: float) -> int:
    """Bytes that a KV cache may take now: ``utilization`` of the device's memory, less what is already in use."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        idle = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch's own, reusable
        return int(total * utilization) - (total - free - idle)
    page = os.sysconf("SC_PAGE_SIZE")
    return int(page * os.sysconf("SC_AVPHYS_PAGES") * utilization)


def total_memory(device: torch.device) -> int:
    """Bytes of the device's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


class KVCache:
    """Per layer, keys and values ``[num_blocks, block_size, K, E]``.

    Zeroed when made: padded gathers read slots that nobody wrote, and a mask does not hide a NaN.

    Raises:
        torch.OutOfMemoryError: naming its size; the engine adds the remedy, and may try again with fewer rows.
    """

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int) -> None:
        self.shape = shape
        self.num_blocks = num_blocks
        self.block_size = block_size
        size = (num_blocks, block_size, shape.kv_heads, shape.head_dim)
        try:
            self.keys = [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.layers)]
            self.values = [torch.zeros(size, dtype=shape.dtype, device=shape.device) for _ in range(shape.layers)]
        except (torch.OutOfMemoryError, MemoryError) as error:
            need = num_blocks * block_size * shape.token_bytes / 2**30
            raise torch.OutOfMemoryError(
                f"the KV cache of {num_blocks * block_size} tokens needs {need:.2f} GiB, which are not free: {error}"
            ) from error

    @property
    def bytes(self) -> int:
        """Memory held."""
        return self.num_blocks * self.block_size * self.shape.token_bytes

    def write(self, layer: int, slots_T: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor) -> None:
        """Store T tokens at their slots (block number * block size + offset)."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots_T, k_TKE)
        self.values[layer].flatten(0, 1).index_copy_(0, slots_T, v_TKE)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy whole blocks ``(source, target)`` in every layer; every source is read before any target is written."""
        if not pairs:
            return
        source, target = on_device(torch.tensor(pairs), torch.int64, self.shape.device).unbind(1)
        for tensor in (*self.keys, *self.values):
            tensor.index_copy_(0, target, tensor.index_select(0, source))


def capacity(shape: KVShape, block_size: int, needed: int, at_least: int, utilization: float, others: int = 0) -> int:
    """How many blocks to make: ``needed`` for the run, but no more than the memory budget holds.

    ``others`` are bytes to leave for weights in 16 bits, as long as half of ``needed`` fits beside them: many rows
    decode faster by weights that need not be made for each step than with nobody ever preempted.

    Raises:
        ConfigError: the budget does not hold ``at_least`` blocks, the largest single request.
    """
    budget, block = max(memory_budget(shape.device, utilization), 0), shape.token_bytes * block_size
    fits, beside = budget // block, max(budget - others, 0) // block
    if beside >= max(at_least, needed // 2):
        fits = beside
    if fits < at_least:
        raise ConfigError(
            f"gpu_memory_utilization={utilization} leaves room for a KV cache of {fits * block_size} tokens on "
            f"{shape.device}, and one request may come to {at_least * block_size}; raise gpu_memory_utilization, or "
            "lower max_tokens or max_seq_length"
        )
    return min(needed, fits)

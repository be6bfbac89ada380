"""Writing a safetensors file tensor by tensor, so that no more than one tensor need be in memory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from .shards import DTYPE_NAMES


class Planned(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = self.dtype.itemsize
        for size in self.shape:
            count *= size
        return count


def write_shard(
    path: Path, plan: Sequence[Planned], tensors: Iterable[torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write ``tensors``, which come in the order of ``plan`` with its dtypes and shapes, as one safetensors file.

    Raises:
        ValueError: a tensor does not match its plan, or there are too few or too many.
    """
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    offset = 0
    for item in plan:
        header[item.name] = {
            "dtype": DTYPE_NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [offset, offset + item.nbytes],
        }
        offset += item.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)  # tensors start at a multiple of 8 bytes
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for item, tensor in zip(plan, tensors, strict=True):
            if tensor.dtype != item.dtype or tuple(tensor.shape) != item.shape:
                raise ValueError(f"{item.name}: planned {item.dtype} {item.shape}, got {tensor.dtype} {tensor.shape}")
            if item.nbytes:
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

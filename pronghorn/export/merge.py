"""Writing the merged weights, file by file as the original has them, in 16 bits or quantized again."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..quant.bnb import to_bnb
from ..quant.nf4 import NF4Tensor
from ..weights.shards import INDEX, Entry, Shard
from ..weights.stream import stream
from ..weights.writer import Planned, write_shard
from .changes import Changes
from .original import Original


@dataclasses.dataclass(frozen=True)
class Merge:
    """A merge about to be written.

    Attributes:
        original: what is merged into.
        changes: what training changed.
        untied_head: (head, embedding) weight names where the two were tied and training made them differ, else ().
    """

    original: Original
    changes: Changes
    untied_head: tuple[str, ...] = ()

    def plan(self, shard: Shard) -> list[Planned]:
        """What the merged file holds, in order."""
        items = []
        for entry in self.original.entries(shard):
            items.append(Planned(entry.name, entry.dtype, tuple(entry.shape)))
            if self.untied_head and entry.name == self.untied_head[1]:
                items.append(Planned(self.untied_head[0], entry.dtype, tuple(entry.shape)))
        return items

    def tensors(self, shard: Shard) -> Iterator[tuple[str, torch.Tensor]]:
        """The merged tensors in the order of :meth:`plan`."""
        for entry, tensor in self.original.tensors(shard):
            yield entry.name, self.changes.apply(entry.name, tensor, entry.dtype)
            if self.untied_head and entry.name == self.untied_head[1]:
                yield self.untied_head[0], self.changes.apply(self.untied_head[0], tensor, entry.dtype)


def find_untied_head(original: Original, changes: Changes, tied: tuple[str, ...]) -> tuple[str, ...]:
    """``tied`` (head, embedding) where training gave the two different values and no file holds the head, else ()."""
    if not tied or not (tied[0] in changes or tied[1] in changes):
        return ()
    for shard in original.shards:
        names = {entry.name: entry for entry in shard.entries}
        if tied[0] in names:
            return ()
        if tied[1] in names:
            found, holder = names[tied[1]], shard
    tensor = _read_one(holder, found)
    head, embedding = (changes.apply(name, tensor) for name in tied)
    return () if torch.equal(head, embedding) else tied


def _read_one(shard: Shard, entry: Entry) -> torch.Tensor:
    return next(iter(stream([dataclasses.replace(shard, entries=(entry,))])))[2]


def write_16bit(merge: Merge, folder: Path) -> list[str]:
    """Write every file of the merge to ``folder`` under its original name, tensor by tensor; return the file names."""
    where: dict[str, str] = {}
    total = 0
    for shard in merge.original.shards:
        plan = merge.plan(shard)
        if not plan:
            continue  # a file that held nothing but pieces of 4-bit weights
        write_shard(folder / shard.path.name, plan, (t for _, t in merge.tensors(shard)), shard.metadata or None)
        where |= {item.name: shard.path.name for item in plan}
        total += sum(item.nbytes for item in plan)
    return _write_index(merge, folder, where, total)


def write_4bit(merge: Merge, folder: Path, quantized: set[str], device: torch.device) -> list[str]:
    """Write the merge with the weights in ``quantized`` as NF4 in bitsandbytes' format, quantized on ``device``.

    The merged 16-bit weight is quantized anew; the 4-bit base is never read.
    """
    where: dict[str, str] = {}
    total = 0
    for shard in merge.original.shards:
        out: dict[str, torch.Tensor] = {}
        for name, tensor in merge.tensors(shard):
            if name in quantized:
                nf4 = NF4Tensor.quantize(tensor.to(device), tensor.dtype)
                out |= {key: value.cpu() for key, value in to_bnb(nf4, name).items()}
            else:
                out[name] = tensor
        if not out:
            continue
        plan = [Planned(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in out.items()]
        write_shard(folder / shard.path.name, plan, out.values())
        where |= dict.fromkeys(out, shard.path.name)
        total += sum(item.nbytes for item in plan)
    return _write_index(merge, folder, where, total)


def _write_index(merge: Merge, folder: Path, where: dict[str, str], total: int) -> list[str]:
    names = sorted(set(where.values()))
    if (merge.original.folder / INDEX).is_file():
        before: dict[str, Any] = json.loads((merge.original.folder / INDEX).read_text(encoding="utf-8"))
        metadata = {**(before.get("metadata") or {}), "total_size": total}
        text = json.dumps({"metadata": metadata, "weight_map": dict(sorted(where.items()))}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")
    return names

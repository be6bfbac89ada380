"""Numbers gathered between two logs, under TRL's names, and their history on disk."""

from __future__ import annotations

import json
import math
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from ..weights.folder import sync
from .disk import append_whole, room_on_disk


class Metrics:
    """Means, minima and maxima since the last flush. NaN values are left out.

    Means are weighted (by tokens, rows or steps), so that splitting a batch into micro-batches changes nothing. Values
    that a GPU has yet to compute are read when somebody asks, all at once: reading each as it comes would have the host
    wait some twenty times between a forward and its backward, and the GPU idle meanwhile.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}
        self._coming: list[tuple[str, str, float | torch.Tensor, float, float]] = []

    def mean(self, name: str, value: float | torch.Tensor, weight: float = 1.0) -> None:
        """One value of ``weight`` more to average."""
        self._take("mean", name, value, weight, weight)

    def add(self, name: str, total: float | torch.Tensor, weight: float) -> None:
        """A sum of ``weight`` values more to average; ``weight`` 0 adds to the sum alone."""
        self._take("mean", name, total, 1.0, weight)

    def low(self, name: str, value: float | torch.Tensor) -> None:
        self._take("low", name, value, 1.0, 1.0)

    def high(self, name: str, value: float | torch.Tensor) -> None:
        self._take("high", name, value, 1.0, 1.0)

    def last(self, name: str, value: float) -> None:
        self._take("last", name, value, 1.0, 1.0)

    def _take(self, kind: str, name: str, value: float | torch.Tensor, factor: float, weight: float) -> None:
        """Take one now, or behind those that are still coming: a name's values are put in the order of their calls."""
        if isinstance(value, torch.Tensor):
            value = value.detach()
            if _computing(value) or self._coming:
                self._coming.append((kind, name, value, factor, weight))
                return
        elif self._coming:
            self._coming.append((kind, name, float(value), factor, weight))
            return
        self._put(kind, name, float(value), factor, weight)

    def settle(self) -> None:
        """Read what a GPU had yet to compute; it is waited for."""
        coming, self._coming = self._coming, []
        numbers = _numbers([value for _, _, value, _, _ in coming])
        for (kind, name, _, factor, weight), number in zip(coming, numbers):
            self._put(kind, name, number, factor, weight)

    def _put(self, kind: str, name: str, value: float, factor: float, weight: float) -> None:
        entry = self._values.setdefault(name, [kind, 0.0 if kind == "mean" else math.nan, 0.0])
        value *= factor
        if kind == "last":
            entry[1:] = [value, 1.0]
        elif math.isnan(value):
            return
        elif kind == "mean":
            entry[1] += value
            entry[2] += weight
        else:
            better = min if kind == "low" else max
            entry[1] = better(entry[1], value) if entry[2] else value
            entry[2] = 1.0

    def flush(self) -> dict[str, float | None]:
        """The values, None where only NaN came in; starts anew."""
        self.settle()
        out = {
            name: None if not weight else (value / weight if kind == "mean" else value)
            for name, (kind, value, weight) in self._values.items()
        }
        self._values = {}
        return out

    def state(self) -> dict[str, list[Any]]:
        self.settle()
        return {name: list(entry) for name, entry in self._values.items()}

    def load(self, state: dict[str, list[Any]]) -> None:
        self._coming = []
        self._values = {name: list(entry) for name, entry in state.items()}


def _computing(tensor: torch.Tensor) -> bool:
    """Whether reading it would wait for what was queued before."""
    return tensor.is_cuda


def _numbers(values: list[float | torch.Tensor]) -> list[float]:
    """Each as a Python float; tensors of one kind are read by one copy."""
    kinds: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for i, value in enumerate(values):
        if isinstance(value, torch.Tensor):
            kinds.setdefault((value.device, value.dtype), []).append(i)
    found = [value if isinstance(value, float) else math.nan for value in values]
    for places in kinds.values():
        tensors = [value.reshape(()) for i in places if isinstance(value := values[i], torch.Tensor)]
        for i, number in zip(places, torch.stack(tensors).tolist()):
            found[i] = float(number)
    return found


class History:
    """A file of JSON lines, one for each record, each with its ``step``; what a report is drawn from.

    Raises:
        OSError: a record could not be written, with the remedy where the disk is full; the file keeps its whole lines.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def start(self, step: int | None = None) -> None:
        """Keep the records up to ``step`` (those that a resumed run has behind it) and drop later ones; None: all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if step is not None and json.loads(line)["step"] <= step]
        fresh = self.path.with_name(self.path.name + ".new")
        with self._room():
            fresh.write_text("".join(kept), encoding="utf-8")
            sync(fresh)
        os.replace(fresh, self.path)

    def _lines(self) -> list[str]:
        """Whole lines; a last one cut short by a crash is left out."""
        if not self.path.exists():
            return []
        return [line for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]

    def append(self, *records: dict[str, Any]) -> None:
        with self._room():
            append_whole(self.path, "".join(json.dumps(record, default=str) + "\n" for record in records).encode())

    def sync(self) -> None:
        """Put what was appended on disk: a checkpoint's past must not be younger than the checkpoint."""
        if self.path.exists():
            sync(self.path)

    def _room(self) -> AbstractContextManager[None]:
        remedy = "free space, then go on with train(resume_from_checkpoint=True) where a checkpoint stands"
        return room_on_disk(self.path.parent, self.path.name, remedy)

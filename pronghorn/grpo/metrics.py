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

    Means are weighted (by tokens, rows or steps), so that splitting a batch into micro-batches changes nothing.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[Any]] = {}

    def mean(self, name: str, value: float | torch.Tensor, weight: float = 1.0) -> None:
        """One value of ``weight`` more to average."""
        self.add(name, float(value) * weight, weight)

    def add(self, name: str, total: float | torch.Tensor, weight: float) -> None:
        """A sum of ``weight`` values more to average; ``weight`` 0 adds to the sum alone."""
        entry = self._values.setdefault(name, ["mean", 0.0, 0.0])
        if not math.isnan(float(total)):
            entry[1] += float(total)
            entry[2] += weight

    def low(self, name: str, value: float | torch.Tensor) -> None:
        self._extreme("low", name, float(value))

    def high(self, name: str, value: float | torch.Tensor) -> None:
        self._extreme("high", name, float(value))

    def last(self, name: str, value: float) -> None:
        self._values[name] = ["last", float(value), 1.0]

    def _extreme(self, kind: str, name: str, value: float) -> None:
        entry = self._values.setdefault(name, [kind, math.nan, 0.0])
        if not math.isnan(value):
            better = min if kind == "low" else max
            entry[1] = better(entry[1], value) if entry[2] else value
            entry[2] = 1.0

    def flush(self) -> dict[str, float | None]:
        """The values, None where only NaN came in; starts anew."""
        out = {
            name: None if not weight else (value / weight if kind == "mean" else value)
            for name, (kind, value, weight) in self._values.items()
        }
        self._values = {}
        return out

    def state(self) -> dict[str, list[Any]]:
        return {name: list(entry) for name, entry in self._values.items()}

    def load(self, state: dict[str, list[Any]]) -> None:
        self._values = {name: list(entry) for name, entry in state.items()}


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

"""The batch of an optimizer step that was skipped, on disk for study, and the way to read it back."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..config.errors import ConfigError
from ..weights.folder import whole_folder
from .rollouts import Rollout

TENSORS, FACTS = "batch.safetensors", "batch.json"


@dataclass
class SkippedBatch:
    """What :func:`load_batch` reads.

    Attributes:
        micro_batches: the rollouts of the step, micro-batch by micro-batch, with sampler log-probabilities and
            advantages (old and reference log-probabilities where the loss needed them).
        logps: for each micro-batch and rollout, log-probabilities of the completion tokens under the weights that the
            step found (which are also those that it left), at the run's temperature; None for a rollout out of the
            loss.
        facts: ``step``, ``grad_norm``, ``losses`` of the micro-batches, ``parameters`` whose gradients were not finite
            (name and how many entries), and the ``metrics`` gathered so far.
    """

    micro_batches: list[list[Rollout]]
    logps: list[list[torch.Tensor | None]]
    facts: dict[str, Any]


def save_batch(folder: Path, batch: SkippedBatch) -> None:
    """Write ``batch`` into ``folder``, which appears whole: ``batch.safetensors`` and ``batch.json``."""
    rollouts = [rollout for part in batch.micro_batches for rollout in part]
    tensors = {"micro_batch_sizes": torch.tensor([len(part) for part in batch.micro_batches])}
    for field in fields(Rollout):
        tensors |= _columns(field.name, [getattr(rollout, field.name) for rollout in rollouts])
    tensors |= _columns("logps", [logps for part in batch.logps for logps in part])
    with whole_folder(folder, replaceable=lambda old: (old / FACTS).is_file()) as building:
        save_file(tensors, str(building / TENSORS))
        (building / FACTS).write_text(json.dumps(batch.facts, indent=1, default=str), encoding="utf-8")


def load_batch(folder: str | os.PathLike[str]) -> SkippedBatch:
    """Read the batch of a skipped step: ``load_batch("outputs/skipped/step-17")``.

    Raises:
        ConfigError: the folder holds no such batch.
    """
    path = Path(folder)
    for name in (TENSORS, FACTS):
        if not (path / name).is_file():
            raise ConfigError(
                f"load_batch: folder={str(folder)!r} has no {name}; give a folder under <output_dir>/skipped"
            )
    tensors = load_file(str(path / TENSORS))
    sizes = tensors["micro_batch_sizes"].tolist()
    values = {field.name: _values(field.name, tensors, sum(sizes)) for field in fields(Rollout)}
    rollouts = [Rollout(**{name: column[i] for name, column in values.items()}) for i in range(sum(sizes))]
    for rollout in rollouts:  # lists in a Rollout, and tensors where it has tensors
        for field in fields(Rollout):
            value = getattr(rollout, field.name)
            if isinstance(value, torch.Tensor) and "Tensor" not in str(field.type):
                setattr(rollout, field.name, value.tolist())
    facts = json.loads((path / FACTS).read_text(encoding="utf-8"))
    return SkippedBatch(_split(rollouts, sizes), _split(_values("logps", tensors, sum(sizes)), sizes), facts)


def _columns(name: str, values: Sequence[Any]) -> dict[str, torch.Tensor]:
    """``values`` of all rollouts as one tensor; those with several numbers one behind the other, with their lengths.

    A length of -1 stands for None.
    """
    if all(isinstance(value, bool | int | float) for value in values):
        return {name: torch.tensor(values, dtype=torch.float64 if any(map(_is_float, values)) else None)}
    parts = [None if value is None else _tensor(value) for value in values]
    known = [part for part in parts if part is not None]
    lengths = torch.tensor([-1 if part is None else part.numel() for part in parts])
    filled = [part for part in known if part.numel()] or known[:1]  # torch.tensor([]) has no dtype to speak of
    return {name: torch.cat(filled) if filled else torch.zeros(0), f"{name}.lengths": lengths}


def _is_float(value: Any) -> bool:
    return isinstance(value, float)


def _tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value.detach().cpu()
    return torch.tensor(value, dtype=torch.float64 if any(map(_is_float, value)) else None)


def _values(name: str, tensors: dict[str, torch.Tensor], count: int) -> list[Any]:
    lengths = tensors.get(f"{name}.lengths")
    if lengths is None:
        return tensors[name].tolist()
    sizes = lengths.tolist()
    pieces = iter(tensors[name].split([size for size in sizes if size >= 0]))
    return [None if size < 0 else next(pieces).clone() for size in sizes]


def _split(values: Sequence[Any], sizes: Sequence[int]) -> list[list[Any]]:
    found, at = [], 0
    for size in sizes:
        found.append(list(values[at : at + size]))
        at += size
    return found

"""What a run folder holds, read with its gaps noted."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.errors import ConfigError

METRICS, COMPLETIONS, SUMMARY = "metrics.jsonl", "completions.jsonl", "summary.json"
CONFIG, ENVIRONMENT = "config.json", "environment.json"
_SOUGHT = ("", "checkpoints")  # a recipe's folder keeps the trainer's files in a folder of that name


@dataclass
class Run:
    """The contents of a run folder.

    Attributes:
        folder: where it is.
        metrics: one mapping a log line, by step.
        completions: one mapping a printed sample, by step.
        summary, config, environment: their files' contents, empty where absent.
        notes: what is missing or unreadable, a sentence each.
    """

    folder: Path
    metrics: list[dict[str, Any]] = field(default_factory=list)
    completions: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def warnings(self) -> list[tuple[Any, str]]:
        """(step, text) of what the run was warned about."""
        return [(line.get("step", "?"), str(line["warning"])) for line in self.metrics if "warning" in line]

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of the metric ``name``: finite numbers only, the last line of each step."""
        points: dict[float, float] = {}
        for line in self.metrics:
            step, value = line.get("step"), line.get(name)
            if _finite(step) and _finite(value):
                points[float(step)] = float(value)  # type: ignore[arg-type]
        steps = sorted(points)
        return steps, [points[step] for step in steps]

    def names(self, prefix: str = "", suffix: str = "") -> list[str]:
        """Names of recorded metrics, in the order of their first appearance."""
        found = dict.fromkeys(name for line in self.metrics for name in line)
        return [name for name in found if name.startswith(prefix) and name.endswith(suffix)]


def load(run_dir: str | Path) -> Run:
    """Read the run in ``run_dir``.

    Raises:
        ConfigError: no such folder, or none of metrics.jsonl, completions.jsonl and summary.json in it.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise ConfigError(f"run_dir={str(run_dir)!r} is no folder; give the output folder of a run")
    if not any(_find(folder, name) for name in (METRICS, COMPLETIONS, SUMMARY)):
        raise ConfigError(
            f"run_dir={str(run_dir)!r} holds none of {METRICS}, {COMPLETIONS} and {SUMMARY}; "
            "give the output folder of a run"
        )
    run = Run(folder)
    run.metrics = _lines(run, METRICS, "plots over steps")
    run.completions = _lines(run, COMPLETIONS, "sample completions")
    run.summary = _object(run, SUMMARY, "accuracy before and after")
    run.config = _object(run, CONFIG, "the configuration")
    run.environment = _object(run, ENVIRONMENT, "the environment")
    return run


def _find(folder: Path, name: str) -> Path | None:
    return next((path for sub in _SOUGHT if (path := folder / sub / name).is_file()), None)


def _lines(run: Run, name: str, shown: str) -> list[dict[str, Any]]:
    path = _find(run.folder, name)
    if path is None:
        run.notes.append(f"{name} is missing: no {shown}.")
        return []
    parsed, bad = [], 0
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = None  # an interrupted run leaves half a line
        if isinstance(value, dict):
            parsed.append(value)
        else:
            bad += 1
    if bad:
        run.notes.append(f"{name}: {bad} line{'s' if bad > 1 else ''} could not be read.")
    if not parsed:
        run.notes.append(f"{name} holds no line: no {shown}.")
    return sorted(parsed, key=lambda line: line["step"] if _finite(line.get("step")) else -1)


def _object(run: Run, name: str, shown: str) -> dict[str, Any]:
    path = _find(run.folder, name)
    if path is None:
        run.notes.append(f"{name} is missing: {shown} not known.")
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        run.notes.append(f"{name} could not be read: {error}.")
        return {}
    if not isinstance(value, dict):
        run.notes.append(f"{name} holds no JSON object: {shown} not known.")
        return {}
    return value


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)

"""The plot of a learning study: reward and held-out accuracy, by step and by second, all seeds and their mean."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

COLORS = {"pronghorn": "#b4541a", "trl": "#3a6ea5"}
LABELS = {"pronghorn": "Pronghorn", "trl": "TRL (transformers + PEFT, generate)"}
_SMOOTH = 5


def draw(study: dict[str, Any], path: Path) -> None:
    """Write the figure of ``study`` (what ``learning.py`` writes as JSON) to ``path``."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), sharey="row", constrained_layout=True)
    for name in COLORS:
        runs = [run["sides"][name] for run in study["runs"]]
        for column, by_time in enumerate((False, True)):
            for row, metric in enumerate(("reward", "accuracy")):
                lines = [_line(records, metric, by_time) for records in runs]
                for x, y in lines:
                    axes[row][column].plot(x, y, color=COLORS[name], alpha=0.3, linewidth=1)
                mean_x = [sum(v) / len(v) for v in zip(*(x for x, _ in lines))]
                mean_y = [sum(v) / len(v) for v in zip(*(y for _, y in lines))]
                marker = "o" if metric == "accuracy" else ""
                axes[row][column].plot(
                    mean_x, mean_y, color=COLORS[name], linewidth=2.2, marker=marker, label=LABELS[name]
                )
    axes[0][0].set_ylabel(f"mean reward (moving average of {_SMOOTH} steps)")
    axes[1][0].set_ylabel("held-out accuracy, greedy")
    axes[1][0].set_xlabel("optimizer step")
    axes[1][1].set_xlabel("seconds of training (both sides taking turns on one machine)")
    axes[0][0].legend(frameon=False)
    for each in axes.flat:
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{study['settings']['model']} on {study['device']}, {len(runs)} seeds: thin lines seeds, thick mean"
    )
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _line(records: list[dict[str, Any]], metric: str, by_time: bool) -> tuple[list[float], list[float]]:
    """x and y of one run; rewards smoothed."""
    times = dict(zip((r["step"] for r in records), accumulate(r.get("seconds", 0.0) for r in records)))
    known = [r for r in records if metric in r]
    values = [float(r[metric]) for r in known]
    if metric == "reward":
        values = [sum(part := values[max(0, i - _SMOOTH + 1) : i + 1]) / len(part) for i in range(len(values))]
    return [times[r["step"]] if by_time else r["step"] for r in known], values

"""Numbers of a learning study: reward and accuracy of both sides with intervals over seeds, and seconds of a step."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

# 97.5% quantiles of Student's t by degrees of freedom: three seeds are two
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
PACKAGES = ("torch", "transformers", "trl", "peft")


def interval(values: list[float]) -> tuple[float, float, float]:
    """(mean, low, high): 95% by Student's t over seeds; NaN bounds for a single one."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = _T.get(len(values) - 1, 1.96) * stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def of_run(records: list[dict[str, Any]]) -> dict[str, float]:
    """What one run came to; rewards are means over the first and the last fifth of its steps, and over all."""
    steps = [r for r in records if r["step"] > 0]
    fifth = max(1, len(steps) // 5)
    measured = [r["accuracy"] for r in records if "accuracy" in r]
    rewards = [r["reward"] for r in steps]
    ends = [[r for r in records if "accuracy" in r][i] for i in (0, -1)]
    kinds = [name for name in ends[0] if name.startswith("heldout/")]
    return {
        "reward_first": fmean(rewards[:fifth]),
        "reward_last": fmean(rewards[-fifth:]),
        "reward_mean": fmean(rewards),
        "accuracy_before": measured[0],
        "accuracy_after": measured[-1],
        "accuracy_mean": fmean(measured[1:]),
        "seconds": sum(r["seconds"] for r in steps),
        "step_s_median": median(r["seconds"] for r in steps),
        **{f"{name}/{when}": end[name] for name in kinds for when, end in zip(("before", "after"), ends)},
    }


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds with 95% intervals, and, where both sides ran, Pronghorn less TRL, paired by seed."""
    found = {name: [of_run(run["sides"][name]) for run in runs] for name in runs[0]["sides"]}
    summary: dict[str, Any] = {}
    for name, each in found.items():
        summary[name] = {metric: _rounded(interval([run[metric] for run in each])) for metric in each[0]}
    if {"pronghorn", "trl"} <= set(found):
        pairs = list(zip(found["pronghorn"], found["trl"]))
        compared = ["reward_last", "reward_mean", "accuracy_after", "accuracy_mean"]
        compared += [name for name in pairs[0][0] if name.startswith("heldout/") and name.endswith("/after")]
        for metric in compared:
            summary[f"difference_{metric}"] = _rounded(interval([ours[metric] - trl[metric] for ours, trl in pairs]))
        summary["speedup"] = _rounded(interval([trl["seconds"] / ours["seconds"] for ours, trl in pairs]))
        summary["speedup_median"] = _rounded(
            interval([trl["step_s_median"] / ours["step_s_median"] for ours, trl in pairs])
        )
    return {"summary": summary}


def _rounded(values: tuple[float, float, float]) -> list[float | None]:
    return [None if math.isnan(v) else round(v, 4) for v in values]


def write_results(study: dict[str, Any], path: Path) -> None:
    """The summary as the other benchmarks write theirs."""
    rows: list[dict[str, Any]] = []

    def add(impl: str, metric: str, values: list[float | None]) -> None:
        named = zip(("", "_low", "_high"), values, strict=True)
        rows.extend({"case": "learning", "impl": impl, "metric": f"{metric}{end}", "value": v} for end, v in named)

    for name, found in study["summary"].items():
        if isinstance(found, dict):
            for metric, values in found.items():
                add(name, metric, values)
        else:
            add("pronghorn/trl", name, found)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = {
        "gpu": study["device"],
        **{name: importlib.metadata.version(name) for name in ("torch",)},
        "commit": study.get("commit", ""),
        "date": datetime.date.today().isoformat(),
        "peers": {name: importlib.metadata.version(name) for name in PACKAGES if name != "torch"},
        "settings": study["settings"],
        "rows": rows,
    }
    path.write_text(json.dumps(written, indent=1) + "\n")

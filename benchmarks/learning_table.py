"""The table of ``docs/learning.md`` from a study's JSON: ``python -m benchmarks.learning_table`` (``--check``)."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, STUDY = DOCS / "learning.md", DOCS / "study" / "learning-cpu.json"
BEGIN, END = "<!-- study:begin -->", "<!-- study:end -->"

# metric: (words, form)
_ROWS = {
    "reward_first": ("mean reward, first fifth of the steps", "{:.2f}"),
    "reward_last": ("mean reward, last fifth", "{:.2f}"),
    "reward_mean": ("mean reward, all steps", "{:.2f}"),
    "accuracy_before": ("held-out accuracy before", "{:.1%}"),
    "accuracy_after": ("held-out accuracy after", "{:.1%}"),
    "accuracy_mean": ("held-out accuracy, mean of the evaluations since", "{:.1%}"),
}
# Under the load that the machine had, which differed between seeds: an interval over them would be the load's.
_LOADED = {
    "seconds": ("seconds of all steps, under load", "{:.0f}"),
    "step_s_median": ("seconds of a step, median, under load", "{:.2f}"),
}


def table(study: dict[str, Any]) -> str:
    """Markdown: means over seeds with their 95% intervals, and the difference paired by seed."""
    summary, count = study["summary"], len(study["runs"])
    lines = [
        f"Means over {count} seeds; in brackets 95% intervals by Student's t over the seeds.",
        "",
        "| | Pronghorn | TRL | Pronghorn less TRL, paired |",
        "|---|---|---|---|",
    ]
    for metric, (words, form) in _ROWS.items():
        cells = [_shown(summary[side][metric], form) for side in ("pronghorn", "trl")]
        difference = summary.get(f"difference_{metric}")
        cells.append(_shown(difference, form.replace("{:", "{:+")) if difference else "")
        lines.append(f"| {words} | {' | '.join(cells)} |")
    for metric, (words, form) in _LOADED.items():
        cells = [form.format(summary[side][metric][0]) for side in ("pronghorn", "trl")]
        lines.append(f"| {words} | {' | '.join(cells)} |  |")
    ratio = _shown(summary["speedup"], "{:.2f}")
    return "\n".join([*lines, "", f"TRL's seconds over Pronghorn's, all steps, paired: {ratio}."])


def _shown(values: list[float | None], form: str) -> str:
    mean, low, high = values
    if low is None or high is None:
        return form.format(mean)
    return f"{form.format(mean)} ({form.format(low)} to {form.format(high)})"


def page() -> str:
    """The page with its table brought up to date."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return f"{before}{BEGIN}\n{table(json.loads(STUDY.read_text()))}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    if "--check" in sys.argv:
        raise SystemExit(page() != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page(), encoding="utf-8")

"""The tables of ``docs/learning.md`` from the studies' JSON: ``python -m benchmarks.learning_table`` (``--check``).

The CPU study's table stands between marks in the page. Every other ``docs/study/learning-*.json`` has a section of its
own, made whole from the file and added at the page's end when it is new; what is to be said about it goes below its
mark, which stays.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE, STUDIES = DOCS / "learning.md", DOCS / "study"
FIRST = "learning-cpu"

# metric: (words, form)
_ROWS = {
    "reward_first": ("mean reward, first fifth of the steps", "{:.2f}"),
    "reward_last": ("mean reward, last fifth", "{:.2f}"),
    "reward_mean": ("mean reward, all steps", "{:.2f}"),
    "accuracy_before": ("held-out accuracy before", "{:.1%}"),
    "accuracy_after": ("held-out accuracy after", "{:.1%}"),
    "accuracy_mean": ("held-out accuracy, mean of the evaluations since", "{:.1%}"),
}
_KINDS = {
    "number": "held-out, right number in any format",
    "words": "held-out, one and two steps",
    "chains": "held-out, three to six steps",
    "gsm8k": "GSM8K's test problems",
}
_SECONDS = {"seconds": ("seconds of all steps", "{:.0f}"), "step_s_median": ("seconds of a step, median", "{:.2f}")}


def table(study: dict[str, Any]) -> str:
    """Markdown: means over seeds with their 95% intervals, and the difference paired by seed."""
    summary, count = study["summary"], len(study["runs"])
    said = "95% intervals by Student's t over the seeds"
    lines = [
        f"Means over {count} seeds; in brackets {said}." if count > 1 else "One seed.",
        "",
        "| | Pronghorn | TRL | Pronghorn less TRL, paired |",
        "|---|---|---|---|",
    ]
    rows = dict(_ROWS)
    for kind, words in _KINDS.items():
        rows |= {f"heldout/{kind}/{when}": (f"{words}, {when}", "{:.1%}") for when in ("before", "after")}
    for metric, (words, form) in rows.items():
        if metric not in summary["pronghorn"]:
            continue
        cells = [_shown(summary[side][metric], form) for side in ("pronghorn", "trl")]
        difference = summary.get(f"difference_{metric}")
        cells.append(_shown(difference, form.replace("{:", "{:+")) if difference else "")
        lines.append(f"| {words} | {' | '.join(cells)} |")
    # On a machine with other work, whose load differed between seeds, an interval would be the load's.
    loaded = study["device"] == "cpu"
    for metric, (words, form) in _SECONDS.items():
        values = [summary[side][metric] for side in ("pronghorn", "trl")]
        cells = [form.format(value[0]) if loaded else _shown(value, form) for value in values]
        lines.append(f"| {words}{', under load' if loaded else ''} | {' | '.join(cells)} |  |")
    ratio = f"TRL's seconds over Pronghorn's, all steps, paired: {_shown(summary['speedup'], '{:.2f}')}."
    if not loaded:
        median = _shown(summary["speedup_median"], "{:.2f}")
        ratio += f" Of median steps, which leave the first one's compilations out: {median}."
    return "\n".join([*lines, "", ratio])


def _shown(values: list[float | None], form: str) -> str:
    mean, low, high = values
    if low is None or high is None:
        return form.format(mean)
    return f"{form.format(mean)} ({form.format(low)} to {form.format(high)})"


def section(name: str, study: dict[str, Any]) -> str:
    """A study's heading, settings, table and plot, all from its file."""
    chosen = study["settings"]
    lines = [f"## {chosen['model']}, on one {chosen['machine']}", ""]
    made = study.get("pretraining")
    if made:
        shares = [share for _, share in made["sampled_accuracy"]]
        lines += [
            f"{made['parameters'] / 1e6:.0f}M parameters, trained from random weights on {made['tokens'] / 1e6:.0f}M "
            f"tokens in {made['seconds']:.0f} s ({made['steps']:,} steps, {made['tokens_per_s']:,} tokens/s; "
            f"`python -m benchmarks.pretrain`); sampling then solved {shares[-1]:.0%} of the synthetic problems.",
            "",
        ]
    lines += [
        f"{chosen['steps']} steps of {chosen['prompts']} prompts x {chosen['generations']} completions of up to "
        f"{chosen['max_completion_length']} tokens, LoRA of rank {chosen['lora_rank']}, learning rate "
        f"{chosen['learning_rate']:g}; {chosen['problems']} held-out problems, greedy. Commit {study['commit']}.",
        "",
        table(study),
        "",
        f"![reward and held-out accuracy by step and by second](study/{name}.png)",
        "",
        f"Every step of every run: [`study/{name}.json`](study/{name}.json).",
    ]
    return "\n".join(lines)


def marks(name: str) -> tuple[str, str]:
    key = "study" if name == FIRST else name
    return f"<!-- {key}:begin -->", f"<!-- {key}:end -->"


def page(text: str | None = None, studies: Path = STUDIES) -> str:
    """The page (the file's text by default) with every study's part brought up to date."""
    text = PAGE.read_text(encoding="utf-8") if text is None else text
    for path in sorted(studies.glob("learning-*.json")):
        study = json.loads(path.read_text())
        if not {"pronghorn", "trl"} <= set(study.get("summary", {})):
            continue  # no seed has ended, or one side ran alone
        begin, end = marks(path.stem)
        made = table(study) if path.stem == FIRST else section(path.stem, study)
        if begin not in text:
            text = f"{text.rstrip()}\n\n{begin}\n{end}\n"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{made}\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    if "--check" in sys.argv:
        raise SystemExit(page() != PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(page(), encoding="utf-8")

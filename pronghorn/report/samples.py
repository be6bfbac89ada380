"""The table of sample completions over time; every text that came from a model or a data set is escaped."""

from __future__ import annotations

from html import escape
from typing import Any

from .plots import short_name

_MOST_STEPS, _MOST_PER_STEP = 6, 4


def table(completions: list[dict[str, Any]]) -> str:
    """An HTML table of a few completions from steps spread over the run, the first and the last step included."""
    by_step: dict[Any, list[dict[str, Any]]] = {}
    for completion in completions:
        by_step.setdefault(completion.get("step", "?"), []).append(completion)
    rows = []
    for step in _spread(list(by_step), _MOST_STEPS):
        samples = by_step[step]
        shown = samples[:_MOST_PER_STEP]
        count = f", {len(shown)} of {len(samples)} samples" if len(shown) < len(samples) else ""
        rows.append(f'<tr class="step"><th colspan="3" scope="rowgroup">Step {escape(str(step))}{count}</th></tr>')
        rows += [_row(sample) for sample in shown]
    head = "<thead><tr><th>Prompt</th><th>Completion</th><th>Rewards</th></tr></thead>"
    return f'<div class="wide"><table class="samples">{head}<tbody>{"".join(rows)}</tbody></table></div>'


def as_text(content: Any) -> str:
    """A prompt or completion as text: a string, or the last message of a chat."""
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        return str(content[-1].get("content", ""))
    return str(content) if content is not None else ""


def _row(sample: dict[str, Any]) -> str:
    rewards = sample.get("rewards")
    cells = []
    if isinstance(rewards, dict):
        cells = [
            f"<dt>{escape(short_name(str(name)))}</dt><dd>{_number(value)}</dd>" for name, value in rewards.items()
        ]
        known = [value for value in rewards.values() if isinstance(value, int | float)]
        if len(rewards) > 1 and len(known) == len(rewards):
            cells.append(f'<dt class="total">sum</dt><dd class="total">{_number(sum(known))}</dd>')
    if "advantage" in sample:
        cells.append(f"<dt>advantage</dt><dd>{_number(sample['advantage'])}</dd>")
    return (
        f'<tr><td class="prompt">{escape(as_text(sample.get("prompt")))}</td>'
        f'<td class="completion">{escape(as_text(sample.get("completion")))}</td>'
        f"<td><dl>{''.join(cells)}</dl></td></tr>"
    )


def _spread(steps: list[Any], most: int) -> list[Any]:
    if len(steps) <= most:
        return steps
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]


def _number(value: Any) -> str:
    if value is None:
        return "none"  # the function did not apply to this sample
    return f"{value:+.2f}" if isinstance(value, int | float) else escape(str(value))

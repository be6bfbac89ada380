"""The sample table: what the model was asked, what it said, what it earned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .rollouts import Sample


def as_text(prompt_or_completion: Any) -> str:
    """A prompt or completion in words: text as it is, the last message of a chat."""
    if isinstance(prompt_or_completion, str):
        return prompt_or_completion
    if prompt_or_completion and isinstance(prompt_or_completion[-1], dict):
        return str(prompt_or_completion[-1].get("content", ""))
    return str(prompt_or_completion)


def tail(text: str, characters: int) -> str:
    """The end of ``text``, marked where something was left out."""
    return text if len(text) <= characters else "…" + text[-characters:]


def sample_table(samples: Sequence[Sample], step: int, prompt_characters: int = 240) -> Table:
    """A rich table with one row a sample: end of the prompt, completion, rewards by name, advantage.

    The rewards share a column, a line each, so that five of them still leave room for the text at 80 columns.
    """
    table = Table(title=f"Completions at step {step}", show_lines=True, expand=True)
    table.add_column("prompt", overflow="fold", ratio=4)
    table.add_column("completion", overflow="fold", ratio=5)
    table.add_column("rewards", justify="right", no_wrap=True)
    table.add_column("adv.", justify="right", no_wrap=True)
    for sample in samples:
        lines = [f"{_short(name)} {_number(score)}" for name, score in sample.rewards.items()]
        lines += [f"{name} {value}" for name, value in sorted(sample.extra.items())]
        table.add_row(
            Text(tail(as_text(sample.prompt), prompt_characters)),
            Text(as_text(sample.completion).rstrip()),
            Text("\n".join(lines)),
            f"{sample.advantage:+.2f}",
        )
    return table


def _short(name: str) -> str:
    return name.removesuffix("_reward_func")


def _number(score: float | None) -> str:
    return "none" if score is None else f"{score:6.3g}"


def print_samples(samples: Sequence[Sample], step: int, count: int | None, unique_prompts: bool = False) -> None:
    """Print up to ``count`` samples (None prints all), with ``unique_prompts`` one of each prompt."""
    chosen = list({as_text(s.prompt): s for s in reversed(samples)}.values())[::-1] if unique_prompts else list(samples)
    if count is not None:
        chosen = chosen[:count]
    if chosen:
        Console().print(sample_table(chosen, step))

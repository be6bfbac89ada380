"""What a run shows in the terminal: a progress bar with the numbers that matter, and the closing tables."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import datasets
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback
from transformers.utils import logging as hub_logging

from ..report.stats import wilson_interval
from .evaluate import Evaluation


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' own progress bars and deprecation notices out of a run's output; restored afterwards."""
    bars = hub_logging.is_progress_bar_enabled()
    datasets_bars = datasets.is_progress_bar_enabled()
    hub_logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if bars:
            hub_logging.enable_progress_bar()
        if datasets_bars:
            datasets.enable_progress_bars()


def bar(console: Console, **options: Any) -> Progress:
    """A progress bar in the house style."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        **options,
    )


class StepBar(TrainerCallback):
    """Replaces the trainer's printed dictionaries by one bar; keeps the reward of every step."""

    def __init__(self, console: Console) -> None:
        self.progress = bar(console)
        self.rewards: list[float] = []
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.task = self.progress.add_task("training", total=state.max_steps, note="")
        self.progress.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        if not logs or "reward" not in logs:
            return
        self.rewards.append(float(logs["reward"]))
        note = f"reward {self.rewards[-1]:.2f}  length {logs.get('completions/mean_length', 0):.0f}"
        self.progress.update(self.task, completed=state.global_step, note=note)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)
        self.progress.stop()


def percent(successes: list[bool]) -> str:
    """``43.2% (38.9 to 47.6)``: share and its 95% Wilson interval."""
    low, high = wilson_interval(sum(successes), len(successes))
    return f"{sum(successes) / len(successes):.1%} ({low * 100:.1f} to {high * 100:.1f})"


def accuracy_table(before: Evaluation, after: Evaluation) -> Table:
    """Before and after on the held-out problems."""
    table = Table(title=f"Held-out accuracy, greedy, {len(before.number)} problems (95% interval)")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_row("right answer in the answer tags", percent(before.in_tags), percent(after.in_tags))
    table.add_row("right number in any format", percent(before.number), percent(after.number))
    return table

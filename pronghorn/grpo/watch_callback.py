"""Warnings of :class:`Watch` while a trainer runs: printed, and kept with the metrics for the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback

from ..config.watch import WatchConfig
from .watch import Watch


class WatchCallback(TrainerCallback):
    """Sees every log. A resumed run is read from its checkpoint's log first, and says nothing twice.

    Args:
        config: thresholds.
        keep: takes ``{"step": ..., "warning": text}``.
    """

    def __init__(self, config: WatchConfig, keep: Callable[[dict[str, Any]], None]) -> None:
        self.config, self._keep = config, keep
        self.watch = Watch(config)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch = Watch(self.config)
        for record in state.log_history:
            self.watch.see(record)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not self.config.enabled or not logs:
            return
        for line in self.watch.see(logs):
            print(f"Pronghorn warning at step {state.global_step}: {line}", flush=True)
            self._keep({"step": state.global_step, "warning": line})

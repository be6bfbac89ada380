"""The trainer's state as a reward worker sees it; the log history goes over once, not anew with each call.

The history grows by an entry a log. Whole in every request, it would make the thousandth call of each function pack and
unpack a thousand entries.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

HISTORY = "log_history"

PLAIN = (bool, int, float, str, type(None))
"""Types that pickle and a checkpoint read back as they were; of these exactly, as a subclass may not be."""

Update = tuple[dict[str, Any], "tuple[int, list[Any]] | None"]
"""A state's other attributes; and where in the history the entries begin that come with it, None without a history."""


def plain_state(state: Any) -> dict[str, Any] | None:
    """The attributes of a `TrainerState` that are numbers, strings, or lists and dicts of them: a copy to read.

    Of the history the list is copied, not its entries, which nobody changes once they are logged; they are looked at
    when they are sent.
    """
    if state is None:
        return None
    found = {name: value for name, value in vars(state).items() if name != HISTORY and is_plain(value)}
    history = getattr(state, HISTORY, None)
    return {**found, HISTORY: list(history)} if isinstance(history, list) else found


def is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(is_plain(k) and is_plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(is_plain(v) for v in value)
    return type(value) in PLAIN


class StateSender:
    """The trainer's side, one for each worker: what that worker has of the history."""

    def __init__(self) -> None:
        self._known: list[Any] = []

    def update(self, state: dict[str, Any] | None) -> Update | None:
        """What `StateReceiver.state` needs to know of `state`, of `plain_state`."""
        if state is None:
            return None
        others = {name: value for name, value in state.items() if name != HISTORY}
        if HISTORY not in state:
            return others, None
        known, history = self._known, state[HISTORY]
        # a history is only appended to, unless it is another one: a run that went back to an earlier step
        goes_on = len(known) <= len(history) and (not known or known[-1] is history[len(known) - 1])
        begin = len(known) if goes_on else 0
        fresh = history[begin:]
        return others, (begin, fresh) if is_plain(fresh) else None

    def arrived(self, state: dict[str, Any] | None, update: Update | None) -> None:
        """The worker has answered a request with this `update`."""
        if state is not None and update is not None and update[1] is not None:
            self._known = state[HISTORY]


class StateReceiver:
    """The worker's side."""

    def __init__(self) -> None:
        self._history: list[Any] = []

    def state(self, update: Update | None) -> SimpleNamespace | None:
        """The state that was sent; None for none."""
        if update is None:
            return None
        others, news = update
        if news is None:
            return SimpleNamespace(**others)
        begin, fresh = news
        self._history[begin:] = map(_interned, fresh)
        return SimpleNamespace(**others, **{HISTORY: list(self._history)})


def _interned(entry: Any) -> Any:
    """Metric names come out of every message as strings of their own, which would be most of what a worker keeps."""
    if not isinstance(entry, dict):
        return entry
    return {sys.intern(name) if isinstance(name, str) else name: value for name, value in entry.items()}

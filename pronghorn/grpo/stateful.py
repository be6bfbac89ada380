"""Parts of a run with a state of their own (a curriculum, a replay buffer, counters) that checkpoints hold too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from ..config.errors import ConfigError


class Stateful(Protocol):
    """What :class:`StatefulParts` takes."""

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors, numbers, strings, lists and dicts of them, which later steps leave as they are.

        It is taken before every optimizer step, so that a run which is stopped within one can be saved as it was: give
        copies of what changes in place, and references to what does not.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a state that :meth:`state_dict` gave."""
        ...


@runtime_checkable
class Waits(Protocol):
    """A part whose ``state_dict`` would wait for work under way: it can note its state now and give it later."""

    def noted(self) -> Callable[[], dict[str, Any]]:
        """What gives, whenever it is called, the state as of now."""
        ...


class StatefulParts:
    """The stateful parts of one run by name: ``trainer.stateful.add("curriculum", curriculum)``."""

    def __init__(self) -> None:
        self._parts: dict[str, Stateful] = {}

    def add(self, name: str, part: Stateful) -> None:
        """Save and restore ``part`` with every checkpoint from now on.

        Raises:
            ConfigError: the name is taken.
        """
        if name in self._parts:
            raise ConfigError(f"stateful part {name!r} is there already; give another name")
        self._parts[name] = part

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts.items()}

    def noted(self) -> Callable[[], dict[str, Any]]:
        """As :meth:`state_dict`, of now, made when the result is called: nothing is waited for before."""
        waiting = {name: part.noted() for name, part in self._parts.items() if isinstance(part, Waits)}
        ready = {name: part.state_dict() for name, part in self._parts.items() if name not in waiting}
        return lambda: {**ready, **{name: give() for name, give in waiting.items()}}

    def check(self, states: dict[str, Any], source: str) -> None:
        """Raise :class:`ConfigError` where ``states``, read from ``source``, are not those of the parts that are here.

        Only some of them restored would be another run.
        """
        for name in states.keys() - self._parts.keys():
            raise ConfigError(f"{source} was written with {name!r}, which is off now: turn it on as in that run")
        for name in self._parts.keys() - states.keys():
            raise ConfigError(f"{source} was written without {name!r}, which is on now: turn it off, or start anew")

    def load_state_dict(self, states: dict[str, Any]) -> None:
        for name, part in self._parts.items():
            part.load_state_dict(states[name])

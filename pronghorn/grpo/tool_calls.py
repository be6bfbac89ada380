"""Calling the tools that a policy asks for. What goes wrong in a call is an answer to the policy, and is counted."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers.utils import get_json_schema

from ..config.errors import ConfigError
from ..rewards.loop import BackgroundLoop

Message = dict[str, Any]


class Tools:
    """Python functions, sync or async, by name, with the schemas that chat templates and parsers read.

    Args:
        functions: each with type hints and a Google-style docstring that describes it and its arguments.

    Raises:
        ConfigError: a function whose schema cannot be read, or two of one name.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        self.functions: dict[str, Callable[..., Any]] = {}
        self.schemas: list[dict[str, Any]] = []
        for function in functions:
            name = getattr(function, "__name__", type(function).__name__)
            if name in self.functions:
                raise ConfigError(f"tools has two functions named {name!r}; the model calls by name: rename one")
            try:
                self.schemas.append(get_json_schema(function))
            except Exception as error:
                raise ConfigError(
                    f"tools: {name!r} has no schema ({error}); give it type hints, and a docstring with a description "
                    "and an Args section that describes each argument"
                ) from error
            self.functions[name] = function
        self._loop = BackgroundLoop()

    def answer(self, calls: Sequence[Mapping[str, Any]]) -> tuple[list[Message], int]:
        """A ``tool`` message for each call, in order, and how many of them failed.

        A failed call is answered with ``{"error": ...}``, as in TRL: an exception in the tool, an unknown name, or
        arguments that do not fit. Async tools of one turn run together.
        """
        failures, waiting = 0, []
        answers: list[tuple[str, Any]] = []
        for at, call in enumerate(calls):
            name, result = self._start(call)
            if inspect.isawaitable(result):
                waiting.append((at, result))
            answers.append((name, result))
        for (at, _), result in zip(waiting, self._together([awaitable for _, awaitable in waiting])):
            answers[at] = (answers[at][0], result)
        messages = []
        for name, result in answers:
            if isinstance(result, Exception):
                failures += 1
                result = {"error": str(result)}
            messages.append({"role": "tool", "name": name, "content": str(result)})
        return messages, failures

    def _start(self, call: Mapping[str, Any]) -> tuple[str, Any]:
        """The call's name, and its result, an exception, or a coroutine."""
        if call["type"] != "function":
            return call.get("name", "unknown"), ValueError(f"Unsupported tool call type: {call['type']}")
        name = call["function"]["name"]
        if name not in self.functions:
            return name, ValueError(f"Tool {name} not found.")
        try:
            return name, self.functions[name](**call["function"]["arguments"])
        except Exception as error:  # noqa: BLE001 - the tool's own, told to the policy
            return name, error

    def _together(self, waiting: Sequence[Any]) -> list[Any]:
        if not waiting:
            return []

        async def run() -> list[Any]:
            return await asyncio.gather(*waiting, return_exceptions=True)

        return self._loop.run(run())

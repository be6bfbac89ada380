"""Which adapter answers a request: the live one, none, or one loaded from a folder."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Live(enum.Enum):
    """Type of :data:`LIVE`, an enum so that it keeps its identity through copies and pickles."""

    LIVE = "live"

    def __repr__(self) -> str:
        return "LIVE"


LIVE = Live.LIVE
"""The adapter that is being trained: what answers when no ``lora_request`` is given."""


@dataclass(frozen=True)
class LoraHandle:
    """An adapter loaded beside the live one by ``model.load_lora(dir)``.

    ``name`` is its PEFT adapter name, ``path`` the folder that it came from, ``id`` a number unique in the process.
    """

    name: str
    path: str
    id: int


AdapterChoice = Live | LoraHandle | None

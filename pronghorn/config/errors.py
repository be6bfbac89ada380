"""The error every bad setting raises, and the nearest-name help that goes with an unknown one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting, a file or a combination that cannot work; the text names the field, its value and the remedy."""


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name closest to ``name`` in spelling, or None when none is close."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def reject_unknown(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise :class:`ConfigError` for the first name of ``given`` that is not in ``known``.

    ``where`` names the thing configured (``"GRPOConfig"``), for the message.
    """
    known = list(known)
    for name in given:
        if name not in known:
            close = nearest(name, known)
            hint = f"did you mean {close!r}?" if close else f"known fields: {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: unknown field {name!r}; {hint}")

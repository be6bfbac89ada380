"""Write down, beside a run, with which settings and on what machine it was made."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from ..env import machine
from .run import CONFIG, ENVIRONMENT

_PACKAGES = ("pronghorn", "torch", "transformers", "trl", "peft", "bitsandbytes", "triton")


def record(run_dir: str | Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` (``config``; what JSON has no form for as its ``str``) and ``environment.json``."""
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(dict(config), indent=2, default=str) + "\n", encoding="utf-8")
    (folder / ENVIRONMENT).write_text(json.dumps(environment(), indent=2) + "\n", encoding="utf-8")


def environment() -> dict[str, str]:
    """The device, the system and the versions of what computes."""
    found = {"device": machine().describe(), "python": platform.python_version(), "system": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found

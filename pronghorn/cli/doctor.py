"""``pronghorn doctor``: is this machine fit, and what mends it where it is not."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

import pronghorn

from ..config.errors import ConfigError
from ..doctor.base import Check, run_all, worst
from ..doctor.suite import checkers
from ..env import Settings, visible_device
from .options import Device, one_line_errors

_STYLES = {"ok": "green", "warn": "yellow", "fail": "bold red"}
_NAME_WIDTH = 16


def doctor(
    device: Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
) -> None:
    """Check the driver, the GPUs, Triton, attention, packages, environment, hub and disk.

    Each line is ok, warn or fail, with the command that mends it. Ends with status 1 if any failed.
    """
    with one_line_errors():
        device = _chosen(device)
    console = Console(highlight=False)
    checks: list[Check] = []
    if as_json:
        checks.extend(run_all(checkers(device)))
        answer = {
            "pronghorn": pronghorn.__version__,
            "status": worst(checks),
            "checks": [asdict(check) for check in checks],
        }
        typer.echo(json.dumps(answer, indent=2))
    else:
        with console.status("checking: kernels and attention paths are run, which takes some seconds"):
            for check in run_all(checkers(device)):
                checks.append(check)
                show(console, check)
        console.print(summary(checks))
    if worst(checks) == "fail":
        raise typer.Exit(1)


def show(console: Console, check: Check) -> None:
    """Print one check as a row of status, name and detail, with the remedy beneath it, in one piece to copy."""
    table = Table.grid(padding=(0, 1), expand=False)
    table.add_column(width=4, no_wrap=True)
    table.add_column(width=_NAME_WIDTH, overflow="fold")
    table.add_column(overflow="fold")
    table.add_row(Text(check.status, style=_STYLES[check.status]), Text(check.name), Text(check.detail))
    console.print(table)
    if check.remedy:
        fits = len(check.remedy) + 10 <= console.width
        console.print(Text(f"{'     ' if fits else ''}fix: {check.remedy}", style="cyan"), soft_wrap=True)


def summary(checks: list[Check]) -> Text:
    """The last line: counts, and what they mean."""
    counts = {status: sum(check.status == status for check in checks) for status in _STYLES}
    meaning = {
        "ok": "ready",
        "warn": "ready, but see the warnings",
        "fail": "not ready: mend what failed and run `pronghorn doctor` again",
    }[worst(checks)]
    text = f"\n{counts['ok']} ok, {counts['warn']} warn, {counts['fail']} fail: {meaning}"
    return Text(text, style=_STYLES[worst(checks)])


def _chosen(device: int | None) -> int | None:
    """Leave only the chosen GPU visible to the probes, which are processes of their own, and return its index."""
    if device is None:
        try:
            device = Settings.from_environ().device
        except ConfigError:
            return None  # the doctor reports it as a failed line of its own
    if device is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible_device(device)
    return device

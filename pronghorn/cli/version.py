"""``pronghorn version``."""

from __future__ import annotations

import platform
from importlib import metadata

import typer

import pronghorn


def version() -> None:
    """Print the versions of Pronghorn and of what it stands on."""
    typer.echo(f"pronghorn {pronghorn.__version__}")
    typer.echo(f"python {platform.python_version()}")
    for name in ("torch", "transformers", "trl", "peft", "bitsandbytes", "triton"):
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "not installed"
        typer.echo(f"{name} {found}")

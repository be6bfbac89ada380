"""What several commands share: the --device option, and errors as one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from ..config.errors import ConfigError

Device = Annotated[
    int | None,
    typer.Option("--device", min=0, help="Index of the GPU to use, among the visible ones.", show_default=False),
]


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Print a :class:`ConfigError` as ``error: ...`` and end with status 2; any other exception goes on."""
    try:
        yield
    except ConfigError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from None

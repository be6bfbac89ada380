"""``pronghorn report``: a run folder as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import one_line_errors


def report(
    run_dir: Annotated[Path, typer.Argument(help="Folder with metrics.jsonl, completions.jsonl or summary.json.")],
) -> None:
    """Write RUN_DIR/report.html: plots, sample completions, configuration; one file, no outside requests."""
    with one_line_errors():
        from ..report import build  # imports matplotlib

        typer.echo(str(build(run_dir)))

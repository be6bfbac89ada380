"""A run folder as one self-contained HTML page, and the statistics that it quotes."""

from __future__ import annotations

from pathlib import Path


def build(run_dir: str | Path) -> Path:
    """Write ``<run_dir>/report.html`` and return its path; see :func:`pronghorn.report.page.build`."""
    from .page import build as build_page  # imports matplotlib, which the statistics do not need

    return build_page(run_dir)


__all__ = ["build"]

"""One matplotlib figure as inline SVG whose colours follow the page's light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

# Stand-in colours, replaced in the SVG by the page's CSS variables.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#090909"
SERIES = tuple(f"#0{index}0404" for index in range(1, 9))
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--grid)", PAPER: "var(--paper)"}
_VARIABLES |= {color: f"var(--series-{index})" for index, color in enumerate(SERIES, 1)}

_STYLE = {
    "svg.fonttype": "none",  # text stays text: searchable, and set in the page's own font
    "font.size": 11,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
}


def inline_svg(name: str, title: str, draw: Callable[[Any], None], size: tuple[float, float] = (6.2, 3.1)) -> str:
    """Draw on fresh axes and return an ``<svg>`` element.

    Args:
        name: short and unique in the page; it keeps the element's ids apart from those of other figures.
        title: for screen readers.
        draw: called with the matplotlib axes.
        size: inches.
    """
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.add_subplot())
        buffer = io.StringIO()
        # No date: the same run gives the same page.
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Title": title, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"(url\(|href=\")#", rf"\1#{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, variable)
    return svg.replace("<svg ", '<svg role="img" ', 1)

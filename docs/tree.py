"""Writes the file tree of ``docs/structure.md`` from the modules' own first lines: ``python docs/tree.py``."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "structure.md"
BEGIN, END = "<!-- tree:begin -->", "<!-- tree:end -->"


def first_line(path: Path) -> str:
    """The first sentence of the module's docstring."""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return re.split(r"(?<!et al)\. ", " ".join(doc.split("\n\n")[0].split()))[0].rstrip(".")


def render() -> str:
    lines = ["```"]
    for top in ("pronghorn", "examples", "benchmarks"):
        lines.append(f"{top}/")
        for path in sorted((ROOT / top).rglob("*.py")):
            name = str(path.relative_to(ROOT / top))
            said = first_line(path)
            if said:
                lines.append(f"  {name:36s} {said}")
    return "\n".join([*lines, "```"])


def page() -> str:
    """The whole page with its tree brought up to date."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{render()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page())

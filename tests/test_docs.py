"""The pages keep up with the code: the file tree, the measured tables, the flow in the README."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path

import benchmarks.readme as readme

ROOT = Path(__file__).resolve().parent.parent


def test_the_tree_of_the_structure_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("tree", ROOT / "docs" / "tree.py")
    assert spec and spec.loader
    tree = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tree)
    assert tree.page() == tree.PAGE.read_text(), "run: python docs/tree.py"


def test_the_tables_of_the_readme_come_from_the_results() -> None:
    text = readme.README.read_text()
    between = text.split(readme.BEGIN)[1].split(readme.END)[0].strip()
    assert between == readme.render(), "run: python -m benchmarks.readme"


def test_the_flow_of_the_readme_is_python_of_at_most_thirty_lines() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    ast.parse(code)
    assert code.count("\n") <= 30


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / target).exists(), target

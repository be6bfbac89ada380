"""The house rules that a script can read: which package may import which, and how long things get."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pronghorn"

# What each part may import, besides itself. docs/structure.md draws it.
GROUND = {"config", "env"}
MAY_IMPORT = {
    "config": set(),
    "env": {"config"},
    "stats": set(),
    "kernels": GROUND,
    "quant": GROUND | {"kernels"},
    "optim": GROUND | {"kernels"},
    "weights": GROUND,
    "lora": GROUND | {"kernels", "quant", "weights"},
    "models": GROUND | {"kernels", "quant", "lora"},
    "loader": GROUND | {"kernels", "quant", "weights", "lora", "models"},
    "data": GROUND,
    "rewards": GROUND,
    "report": GROUND | {"stats"},
    "export": GROUND | {"quant", "weights", "lora", "models"},
    "rollout": GROUND | {"data", "kernels", "quant", "lora", "models", "loader"},
    "grpo": GROUND
    | {"stats", "weights", "kernels", "quant", "optim", "lora", "models", "loader", "rollout", "rewards", "data"},
    "sft": GROUND | {"kernels", "quant", "optim", "lora", "models", "loader", "data"},
    "doctor": GROUND | {"kernels"},
}
MAY_IMPORT["api"] = set(MAY_IMPORT) - {"doctor", "report"}
MAY_IMPORT["chat_templates"] = GROUND | {"sft"}
MAY_IMPORT["recipes"] = MAY_IMPORT["api"] | {"api", "report"}
MAY_IMPORT["cli"] = MAY_IMPORT["recipes"] | {"recipes", "doctor"}
MAY_IMPORT["__init__"] = MAY_IMPORT["api"] | {"api"}


def sources() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def is_module(path: Path) -> bool:
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, dotted name below pronghorn) of every import of the package, lazy ones included."""
    found = []
    package = ["pronghorn", *path.relative_to(PACKAGE).with_suffix("").parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            folder = PACKAGE.joinpath(*stem.split(".")[1:])
            names = [stem]
            if stem.split(".")[0] == "pronghorn" and folder.is_dir():  # `from .rollout import base` names a module
                names = [f"{stem}.{a.name}" if is_module(folder / a.name) else stem for a in node.names]
        else:
            continue
        found += [(node.lineno, name.removeprefix("pronghorn.")) for name in names if name.startswith("pronghorn.")]
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in MAY_IMPORT, f"{part} is a new part: give it a place in MAY_IMPORT and in docs/structure.md"
    for line, name in imports(path):
        target = name.split(".")[0]
        assert target == part or target in MAY_IMPORT[part], f"{path}:{line}: {part} may not import {target}"
        if part == "grpo" and target == "rollout":
            assert name == "rollout.base", f"{path}:{line}: grpo sees rollout.base only, not {name}"


def test_the_check_sees_relative_and_lazy_imports() -> None:
    """``from ..kernels.x import y``, ``from ..rollout import base`` and an import inside a function are all found."""
    assert "kernels.linear_cross_entropy" in {name for _, name in imports(PACKAGE / "models" / "causal_lm.py")}
    assert "rollout.base" in {name for _, name in imports(PACKAGE / "grpo" / "sampling_loop.py")}
    assert "lora.io" in {name for _, name in imports(PACKAGE / "api.py")}  # inside save_lora


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_short_and_honest(path: Path) -> None:
    source = path.read_text()
    assert source.count("\n") <= 400, f"{path}: over 400 lines"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno <= 80, f"{path}:{node.lineno}: {node.name} is over 80 lines"
        if isinstance(node, ast.ExceptHandler):
            swallowed = all(isinstance(statement, ast.Pass) for statement in node.body)
            assert node.type is not None and not swallowed, f"{path}:{node.lineno}: an exception is swallowed"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("eval", "exec"), f"{path}:{node.lineno}: {node.func.id}"


# Modules of algorithms, with what in them is none: plain statistics, records, and what belongs to our own layout.
ALGORITHMS: dict[str, set[str]] = {
    "grpo/advantages.py": {"Advantages", "weighted_sum", "nanstd"},
    "grpo/correction.py": {"Correction"},
    "grpo/curriculum.py": set(),
    "grpo/entropy.py": set(),
    "grpo/masks.py": set(),
    "grpo/objectives.py": set(),
    "grpo/old_policy.py": {"comparable"},
    "grpo/reference.py": {"is_fresh"},
    "grpo/replay.py": set(),
    "grpo/spread.py": {"Outcome"},
    "grpo/token_weights.py": set(),
    "rewards/overlong.py": {"get_soft_overlong_punishment"},
    "stats.py": set(),
}
PARTS_OF_A_CLASS = {"grpo/supply.py": {"_refill"}, "grpo/spread.py": {"spread"}}
"""Methods that are an algorithm by themselves."""

PAPER = re.compile(r"arXiv:\d{4}\.\d{5}|https?://\S+|JASA \d+:\d+")


def without_paper(nodes: list[ast.AST], needed: Callable[[str], bool]) -> list[str]:
    """Names of the functions and classes that name no paper in their own docstring."""
    return [
        node.name
        for node in nodes
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and needed(node.name)
        and not PAPER.search(ast.get_docstring(node) or "")
    ]


@pytest.mark.parametrize("name", sorted(set(ALGORITHMS) | set(PARTS_OF_A_CLASS)))
def test_every_algorithm_names_its_paper(name: str) -> None:
    tree = ast.parse((PACKAGE / name).read_text())
    if name in ALGORITHMS:
        others = ALGORITHMS[name]
        assert others <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        found = without_paper([*tree.body], lambda part: not part.startswith("_") and part not in others)
        assert not found, f"{name}: {', '.join(found)} of no paper; name it in its own docstring"
    methods = PARTS_OF_A_CLASS.get(name, set())
    inside = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name in methods]
    assert {node.name for node in inside} == methods
    assert not without_paper([*inside], lambda _: True), f"{name}: {', '.join(methods)}"


def test_import_pronghorn_is_light() -> None:
    """The public names are lazy: importing the package imports no torch."""
    import subprocess
    import sys

    code = "import sys, pronghorn; assert 'torch' not in sys.modules; assert 'FastLanguageModel' in dir(pronghorn)"
    subprocess.run([sys.executable, "-c", code], check=True)

"""The interpreter and the packages against the ranges that the installed Pronghorn declares."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from .base import Check

_DISTRIBUTION = "pronghorn"
_NOT_INSTALLED = "pronghorn runs from a folder and is not installed, so nothing says which versions it needs"


def python_version() -> list[Check]:
    """The interpreter against ``Requires-Python``."""
    version = platform.python_version()
    try:
        wanted = metadata.metadata(_DISTRIBUTION)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return [Check("python", "fail", f"Python {version}; {_NOT_INSTALLED}", "pip install .")]
    where = f"Python {version} at {sys.executable}"
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return [Check("python", "ok", where)]
    return [Check("python", "fail", f"{where}, needs {wanted}", "python3.12 -m venv .venv && .venv/bin/pip install .")]


def versions() -> list[Check]:
    """Each dependency against Pronghorn's range, then against what the other dependencies ask of it."""
    try:
        wanted = requirements(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return [Check("packages", "fail", _NOT_INSTALLED, "pip install .")]
    checks = [check for requirement in wanted if (check := _against(requirement)) is not None]
    if not checks:
        shown = ", ".join(f"{one.name} {metadata.version(one.name)}" for one in wanted)
        checks.append(Check("packages", "ok", shown))
    return checks + _conflicts([requirement.name for requirement in wanted] + ["vllm"])


def requirements(distribution: str) -> list[Requirement]:
    """What ``distribution`` needs on this platform, extras left out.

    Raises:
        importlib.metadata.PackageNotFoundError: it is not installed.
    """
    parsed = [Requirement(text) for text in metadata.requires(distribution) or []]
    return [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]


def _against(requirement: Requirement) -> Check | None:
    name, remedy = f"packages: {requirement.name}", f"pip install '{requirement.name}{requirement.specifier}'"
    try:
        found = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check(name, "fail", f"not installed, needs {requirement.specifier or 'any version'}", remedy)
    if requirement.specifier.contains(found, prereleases=True):
        return None
    return Check(name, "fail", f"{found} is outside {requirement.specifier}", remedy)


def _conflicts(names: list[str]) -> list[Check]:
    """Packages whose own requirements another installed version breaks: what ``pip check`` would say of them."""
    checks: list[Check] = []
    for name in names:
        try:
            needs = requirements(name)
        except metadata.PackageNotFoundError:
            continue  # an absent dependency has its own line; an absent optional package has no needs
        for need in needs:
            try:
                found = metadata.version(need.name)
            except metadata.PackageNotFoundError:
                found = None
            if found is None or not need.specifier.contains(found, prereleases=True):
                state = f"{need.name} {found} is installed" if found else f"{need.name} is not installed"
                detail = f"{name} {metadata.version(name)} needs {need.name}{need.specifier}, but {state}"
                checks.append(
                    Check(f"packages: {need.name}", "warn", detail, f"pip install '{need.name}{need.specifier}'")
                )
    return checks

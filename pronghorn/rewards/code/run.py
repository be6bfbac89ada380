"""``run_code``: a Python program that nobody trusts."""

from __future__ import annotations

from .limits import Limits
from .probe import require_sandbox
from .sandbox import CodeResult, run_in_sandbox


def run_code(code: str, stdin: str = "", limits: Limits | None = None) -> CodeResult:
    """Run `code` as a Python program of the standard library alone (`python -I -S`), isolated from this machine.

    It sees a file system of its own, in which only the Python installation and the system's `/usr` and libraries can
    be read and only `/work` (its current folder) be written; no network, no process of ours, an empty environment.

    Raises:
        SandboxError: it cannot be isolated here, and was not run.
    """
    require_sandbox()
    return run_in_sandbox(code, stdin, limits or Limits())

"""The error of a sandbox that cannot be had."""

from __future__ import annotations

REMEDY = (
    "Code rewards need Linux 5.14 or newer with user namespaces for this user: `sysctl -w "
    "user.max_user_namespaces=10000`; on Debian and Ubuntu also `kernel.unprivileged_userns_clone=1` and "
    "`kernel.apparmor_restrict_unprivileged_userns=0`; in Docker run the container with `--security-opt "
    "seccomp=unconfined --security-opt apparmor=unconfined` (as root also `--cap-add SYS_ADMIN`). Or score the code on "
    "a machine that can isolate it, behind an async reward function. Untrusted code is never run without isolation"
)


class SandboxError(RuntimeError):
    """Untrusted code was not run, since it cannot be isolated here; or its sandbox broke. Never a verdict on the code.

    The message says what is missing and the remedy.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(f"{problem}. {REMEDY}")

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return type(self), (self.problem,)

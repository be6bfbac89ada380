"""The end of a process with all that it started, also what moved to a session of its own."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_ROUNDS = 100


def tie_to_parent(parent: int) -> None:
    """For the process that is to be killed by `kill_tree`: it dies with its parent, and adopts its orphans.

    Adopting (Linux's child subreaper) keeps a process whose own parent has ended in this one's tree. The kernel's
    signal on the parent's death comes even while a function holds the interpreter.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for option, value in ((_PR_SET_PDEATHSIG, signal.SIGKILL), (_PR_SET_CHILD_SUBREAPER, 1)):
        if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0):
            raise OSError(ctypes.get_errno(), f"prctl({option}) failed in a reward worker")
    if os.getppid() != parent:
        os._exit(0)  # the parent ended before the signal was asked for


def kill_tree(process: subprocess.Popen) -> int:
    """Kills `process` (the leader of its group) and everything under it, reaps it; its exit status.

    It is stopped first, so that it starts nothing meanwhile; its children are killed, and those that they leave behind,
    which it adopts, until none is left; then it dies itself. Where `process` has ended already, its group is killed: a
    child that had moved to another session is out of reach then.
    """
    if process.returncode is not None:
        return process.returncode
    with suppress(ProcessLookupError):  # it may have ended; until it is reaped its number is nobody else's
        os.kill(process.pid, signal.SIGSTOP)
    for _ in range(_ROUNDS):
        if not kill_descendants(process.pid):
            break
    with suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, for a group of zombies
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def kill_descendants(pid: int) -> int:
    """Kills every living descendant of `pid`; how many there were. 0 where the system has no /proc."""
    found = [child for child in descendants(pid) if child != pid]
    for child in found:
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return len(found)


def descendants(pid: int) -> list[int]:
    """The living processes under `pid`, zombies left out."""
    children: dict[int, list[int]] = {}
    living = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state ppid ...; the name may hold spaces and parentheses
            state, parent = entry.read_text(errors="replace").rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        child = int(entry.parent.name)
        children.setdefault(int(parent), []).append(child)
        if state not in "ZX":
            living.add(child)
    found, front = [], [pid]
    while front:
        front = [child for parent in front for child in children.get(parent, [])]
        found += front
    return [child for child in found if child in living]

"""The script that builds the sandbox and runs the program in it: `python -I -S jail.py JOB STATUS PARENT`.

Standard library only, and nothing of Pronghorn: it runs alone, in an interpreter of its own, with an empty environment.
JOB is a file descriptor with the job as JSON, STATUS one to which it writes how the program ended, or the step that
failed, as one line of JSON. Four processes, each the parent of the next:

- keeper: outside. Maps the user of the namespace; on SIGTERM ends the rest; reaps all of it before it ends itself.
- builder: in new user, mount, network, IPC, UTS and PID namespaces. Builds the file system and moves into it.
- init: process 1 of the PID namespace: when it ends, the kernel kills every process in there.
- program: limits set, capabilities dropped, system calls filtered; then the interpreter.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

LIBC = ctypes.CDLL(None, use_errno=True)
NAMESPACES = 0x10000000 | 0x00020000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x20000000  # user mnt net ipc uts pid
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, AT_RECURSIVE = 1, 2, 4, 0x8000
MNT_DETACH = 2
SYS_MOUNT_SETATTR = 442
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_PDEATHSIG, PR_DUMPABLE, PR_SECCOMP, PR_CAPBSET_DROP, PR_SUBREAPER, PR_NO_NEW_PRIVS = 1, 4, 22, 24, 36, 38
INSIDE = 1000  # user and group in the sandbox: not 0, so that exec gives no capabilities
NOBODY = 65534  # who that is outside where the trainer is root, to whom limits on processes do not apply
ROOT = "/tmp"  # where the new root is put together, in a mount namespace that nobody else sees


class Step(Exception):
    """A step of building the sandbox failed."""


def check(result: int, what: str) -> int:
    if result < 0:
        raise Step(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def prctl(option: int, value: int, what: str, *more: Any) -> None:
    rest = [*more, 0, 0, 0][:3]
    check(LIBC.prctl(option, ctypes.c_ulong(value), *rest), f"prctl {what}")


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    texts = [text if text is None else text.encode() for text in (source, target, kind, options)]
    result = LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])
    check(result, f"mount of {kind or source} on {target}")


def set_attributes(path: str, attributes: int, recursive: bool) -> None:
    given = struct.pack("<QQQQ", attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    result = LIBC.syscall(SYS_MOUNT_SETATTR, -100, path.encode(), flags, given, ctypes.c_size_t(len(given)))
    check(result, f"making {path} read-only (mount_setattr)")


def die_with(parent: int) -> None:
    """This process is killed when its parent ends."""
    prctl(PR_PDEATHSIG, signal.SIGKILL, "PDEATHSIG")
    if os.getppid() != parent:
        os._exit(1)


def is_mapped(user: int) -> bool:
    """Whether `user` exists here: not in a container of a single user, whose root is nobody's root outside."""
    with open("/proc/self/uid_map") as file:
        ranges = [tuple(int(number) for number in line.split()) for line in file]
    return any(start <= user < start + count for start, _, count in ranges)


def fork(child: Callable[[], None], status: int) -> int:
    """Runs `child` in a new process, which never returns from here; its failure goes to `status`."""
    pid = os.fork()
    if pid:
        return pid
    try:
        child()
        os._exit(0)
    except BaseException as error:  # noqa: BLE001 - told to the trainer, which raises it
        os.write(status, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        os._exit(1)


def keeper(job: dict[str, Any], status: int, parent: int) -> None:
    die_with(parent)
    prctl(PR_SUBREAPER, 1, "SUBREAPER")
    with open("/proc/self/oom_score_adj", "w") as file:  # what runs short of memory is this, not the trainer
        file.write("1000")
    root = os.geteuid() == 0 and is_mapped(NOBODY)
    if root:
        os.setgroups([])
    unshared, mapped = os.pipe(), os.pipe()
    me = os.getpid()
    child = fork(lambda: builder(job, status, me, unshared, mapped), status)

    def end(*_: Any) -> None:
        with suppress(ProcessLookupError):  # it may just have ended by itself
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGTERM, end)
    os.close(unshared[1])
    if os.read(unshared[0], 1):
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{INSIDE} {NOBODY if root else os.geteuid()} 1"),
            ("gid_map", f"{INSIDE} {NOBODY if root else os.getegid()} 1"),
        ):
            try:
                with open(f"/proc/{child}/{name}", "w") as file:
                    file.write(text)
            except OSError as error:
                raise Step(f"mapping the user of the namespace ({name}): {error.strerror}") from error
        os.write(mapped[1], b".")
    while True:
        try:
            os.wait()
        except ChildProcessError:
            return


def builder(job: dict[str, Any], status: int, keeper_pid: int, unshared: Any, mapped: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.umask(0o022)
    check(LIBC.unshare(NAMESPACES), "new namespaces (unshare)")
    os.write(unshared[1], b".")
    os.close(mapped[1])
    if not os.read(mapped[0], 1):
        raise Step("the user of the namespace was not mapped")
    # Opened while still the user outside, whose own folders may be closed to others.
    sources = [(path, os.open(path, os.O_PATH | os.O_CLOEXEC)) for path in job["readable"]]
    os.setresgid(INSIDE, INSIDE, INSIDE)
    os.setresuid(INSIDE, INSIDE, INSIDE)
    die_with(keeper_pid)
    build_root(job, sources)
    me = os.getpid()
    child = fork(lambda: init(job, status, me), status)
    os.waitpid(child, 0)


def build_root(job: dict[str, Any], sources: list[tuple[str, int]]) -> None:
    """A new root in memory: what is readable, a few devices, one folder to write in; nothing else exists."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, f"size={len(job['program']) * 4 + 2**20},mode=755")
    for path, source in sources:
        target = ROOT + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.isdir(f"/proc/self/fd/{source}"):
            os.makedirs(target, exist_ok=True)
        else:
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o644))
        mount(f"/proc/self/fd/{source}", target, None, MS_BIND | MS_REC)
        device = path.startswith("/dev/")
        set_attributes(target, ATTR_RDONLY | ATTR_NOSUID | (0 if device else ATTR_NODEV), True)
        os.close(source)
    for link, to in job["links"]:
        os.symlink(to, ROOT + link)
    with open(f"{ROOT}/program.py", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(job["program"])
    os.mkdir(f"{ROOT}/work")
    options = f"size={job['disk']},nr_inodes={job['files'] + 1},mode=700"
    mount("tmpfs", f"{ROOT}/work", "tmpfs", MS_NOSUID | MS_NODEV, options)
    os.symlink("/work", f"{ROOT}/tmp")
    os.chdir(ROOT)
    check(LIBC.syscall(SYS_PIVOT_ROOT[os.uname().machine], b".", b"."), "moving into the new root (pivot_root)")
    check(LIBC.umount2(b".", MNT_DETACH), "leaving the old root (umount2)")
    os.chdir("/")
    set_attributes("/", ATTR_RDONLY | ATTR_NOSUID | ATTR_NODEV, False)


def init(job: dict[str, Any], status: int, builder_pid: int) -> None:
    prctl(PR_PDEATHSIG, signal.SIGKILL, "PDEATHSIG")  # the parent is of another PID namespace: getppid() is 0
    prctl(PR_DUMPABLE, 0, "DUMPABLE")  # not to be traced by the program
    child = fork(lambda: program(job, status), status)
    os.close(0)
    while True:
        pid, ended = os.wait()
        if pid == child:
            break
    code = os.waitstatus_to_exitcode(ended)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    os.write(status, json.dumps({"exit": code, "cpu": used.ru_utime + used.ru_stime}).encode() + b"\n")


def program(job: dict[str, Any], status: int) -> None:
    prctl(PR_PDEATHSIG, signal.SIGKILL, "PDEATHSIG")
    os.setsid()
    os.chdir("/work")
    os.closerange(3, status)
    os.closerange(status + 1, 4096)
    os.set_inheritable(status, False)
    for name, (soft, hard) in job["rlimits"].items():
        resource.setrlimit(getattr(resource, name), (soft, hard))
    for capability in range(64):
        if LIBC.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0):
            break  # past the last one that this kernel knows
    header, nothing = struct.pack("<Ii", 0x20080522, 0), struct.pack("<6I", 0, 0, 0, 0, 0, 0)
    check(LIBC.capset(header, nothing), "dropping capabilities (capset)")
    prctl(PR_NO_NEW_PRIVS, 1, "NO_NEW_PRIVS")
    code = bytes.fromhex(job["seccomp"])
    instructions = ctypes.create_string_buffer(code, len(code))
    filter_program = struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(instructions))
    prctl(PR_SECCOMP, 2, "SECCOMP", filter_program)
    os.execve(job["argv"][0], job["argv"], job["environment"])


if __name__ == "__main__":
    JOB, STATUS, PARENT = (int(text) for text in sys.argv[1:])
    try:
        with open(JOB, encoding="utf-8") as described:
            given = json.load(described)
        keeper(given, STATUS, PARENT)
    except BaseException as problem:
        os.write(STATUS, json.dumps({"error": f"{type(problem).__name__}: {problem}"}).encode() + b"\n")
        raise

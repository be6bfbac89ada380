"""One run of an untrusted Python program in the sandbox: its input fed, its output bounded, its time watched."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from .errors import SandboxError
from .limits import MIB, Limits
from .seccomp import program as seccomp_program

_JAIL = Path(__file__).with_name("jail.py")
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/libx32", "/bin", "/sbin")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
_THREADS = 32
_OURS = 2  # processes of the sandbox itself that count for its user
_GRACE = 5.0

Status = Literal["ok", "failed", "killed", "timeout", "output"]


@dataclass(frozen=True)
class CodeResult:
    """How a program ended.

    Attributes:
        status: `"ok"` (exit status 0), `"failed"` (another one, an uncaught exception or a lack of memory among
            them), `"killed"` (by a signal), `"timeout"` (wall or processor time), `"output"` (it wrote too much).
        exit_code: its exit status, negative the number of the signal, None where it was ended from outside.
        stdout, stderr: what it wrote, at most `Limits.output_kb` of each; bytes that are no UTF-8 are replaced.
        seconds: wall time.
    """

    status: Status
    exit_code: int | None
    stdout: str
    stderr: str
    seconds: float


def run_in_sandbox(code: str, stdin: str, limits: Limits) -> CodeResult:
    """One run, of which it has not been shown that the sandbox holds: `run.run_code` is for all but its probe.

    Raises:
        SandboxError: the sandbox could not be built; the code did not run.
    """
    started = time.monotonic()
    job = _job(code, limits)
    described = os.memfd_create("pronghorn-job")
    status_read, status_write = os.pipe()
    try:
        with open(described, "w", encoding="utf-8", closefd=False) as file:
            json.dump(job, file)
        os.lseek(described, 0, os.SEEK_SET)
        keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(_JAIL), str(described), str(status_write), str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[described, status_write],
            env={},
            cwd="/",
            start_new_session=True,
        )
        os.close(status_write)
        status_write = -1
        with keeper:  # closes its pipes
            try:
                ended = _watch(keeper, stdin.encode("utf-8", "replace"), limits, started)
            finally:
                _end(keeper)
        told = os.read(status_read, 65536).decode("utf-8", "replace")
    finally:
        for fd in (described, status_read, status_write):
            if fd >= 0:
                os.close(fd)
    return _result(told, ended, limits, time.monotonic() - started)


@dataclass
class _Ended:
    """How watching ended: why the program was stopped from outside, if it was, and what it wrote."""

    why: Status | None
    stdout: bytes
    stderr: bytes


def _watch(keeper: subprocess.Popen, stdin: bytes, limits: Limits, started: float) -> _Ended:
    """Feeds and reads the program until it closes its output, or has used up its time or output."""
    assert keeper.stdin and keeper.stdout and keeper.stderr
    written = {keeper.stdout: bytearray(), keeper.stderr: bytearray()}
    allowed = limits.output_kb * 1024
    why: Status | None = None
    with selectors.DefaultSelector() as selector:
        for output in written:
            selector.register(output, selectors.EVENT_READ)
        os.set_blocking(keeper.stdin.fileno(), False)
        selector.register(keeper.stdin, selectors.EVENT_WRITE)
        rest, reading = memoryview(stdin), len(written)
        while reading and why is None:
            left = started + limits.seconds - time.monotonic()
            if left <= 0:
                why = "timeout"
            for key, _ in selector.select(max(left, 0)):
                stream: IO[bytes] = key.fileobj  # type: ignore[assignment]
                if stream is keeper.stdin:
                    rest = _feed(keeper.stdin, rest, selector)
                    continue
                chunk = os.read(stream.fileno(), 65536)
                if not chunk:
                    selector.unregister(stream)
                    reading -= 1
                written[stream] += chunk
                if len(written[stream]) > allowed:
                    why = "output"
    return _Ended(why, bytes(written[keeper.stdout][:allowed]), bytes(written[keeper.stderr][:allowed]))


def _feed(pipe: IO[bytes], rest: memoryview, selector: selectors.BaseSelector) -> memoryview:
    """Writes what the pipe takes; closes it at the end of the input, or when the program has closed its end."""
    try:
        rest = rest[os.write(pipe.fileno(), rest) :] if rest else rest
    except BrokenPipeError:
        rest = rest[:0]
    if not rest:
        selector.unregister(pipe)
        pipe.close()
    return rest


def _end(keeper: subprocess.Popen) -> None:
    """Ends all processes of the sandbox and waits until the last is gone."""
    with suppress(ProcessLookupError):
        keeper.send_signal(signal.SIGTERM)
    try:
        keeper.wait(_GRACE)
    except subprocess.TimeoutExpired:
        os.killpg(keeper.pid, signal.SIGKILL)
        keeper.wait()


def _result(told: str, ended: _Ended, limits: Limits, seconds: float) -> CodeResult:
    said = [json.loads(line) for line in told.splitlines()]
    problems = [line["error"] for line in said if "error" in line]
    stderr = ended.stderr.decode("utf-8", "replace")
    if problems:
        raise SandboxError(f"the sandbox for untrusted code could not be built: {problems[0]}")
    exit_code, cpu_seconds = next(((line["exit"], line["cpu"]) for line in said if "exit" in line), (None, 0.0))
    if exit_code is None and ended.why is None:
        raise SandboxError(f"the sandbox for untrusted code ended without a word; it wrote {stderr[-500:]!r}")
    status: Status = "ok" if exit_code == 0 else "failed"
    if ended.why is not None:
        status = ended.why
    elif exit_code is not None and exit_code < 0:
        # SIGKILL is what a program gets that ignores SIGXCPU
        spent = -exit_code == signal.SIGXCPU or (-exit_code == signal.SIGKILL and cpu_seconds >= limits.cpu_seconds)
        status = "timeout" if spent else "killed"
    return CodeResult(status, exit_code, ended.stdout.decode("utf-8", "replace"), stderr, seconds)


def _job(code: str, limits: Limits) -> dict[str, Any]:
    """What `jail.py` needs to know."""
    readable, links = [], []
    for path in _SYSTEM:
        if os.path.islink(path):
            links.append((path, os.readlink(path)))
        elif os.path.isdir(path):
            readable.append(path)
    if os.path.exists("/etc/ld.so.cache"):
        readable.append("/etc/ld.so.cache")
    python = os.path.realpath(sys.executable)
    prefix = os.path.realpath(sys.base_prefix)
    if prefix == "/":
        raise SandboxError("Python's prefix is '/': showing it would show the whole file system")
    readable += [prefix] if not any(prefix == p or prefix.startswith(p + "/") for p in readable) else []
    tasks = (_THREADS if limits.processes == 1 else limits.processes) + _OURS
    one = {
        "RLIMIT_AS": limits.memory_mb * MIB,
        "RLIMIT_FSIZE": limits.file_mb * MIB,
        "RLIMIT_NOFILE": limits.files,
        "RLIMIT_NPROC": tasks,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
        "RLIMIT_MSGQUEUE": 0,
    }
    rlimits = {name: (value, value) for name, value in one.items()}
    # SIGXCPU at the first, SIGKILL a second later for a program that ignores it
    rlimits["RLIMIT_CPU"] = (int(limits.cpu_seconds), int(limits.cpu_seconds) + 1)
    return {
        "program": code,
        "argv": [python, "-I", "-S", "-B", "/program.py"],
        "environment": {"PATH": "/usr/bin:/bin", "HOME": "/work", "TMPDIR": "/work", "LANG": "C.UTF-8"},
        "readable": [*readable, *(device for device in _DEVICES if os.path.exists(device))],
        "links": links,
        "disk": limits.disk_mb * MIB,
        "files": limits.files,
        "rlimits": rlimits,
        "seccomp": seccomp_program(limits.processes).hex(),
    }

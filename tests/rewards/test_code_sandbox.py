"""Attacks on the sandbox, each for real: what the program may not do, and that nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pronghorn.config.errors import ConfigError
from pronghorn.rewards.code import CodeResult, Limits, SandboxError, probe, require_sandbox, run_code, sandbox
from pronghorn.rewards.kill import descendants

ROOT = Path(__file__).parents[2]


def can_isolate() -> bool:
    try:
        require_sandbox()
    except SandboxError:
        return False
    return True


isolating = pytest.mark.skipif(not can_isolate(), reason="this machine cannot isolate untrusted code")


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    before = len(descendants(os.getpid())), len(os.listdir("/proc/self/fd")), threading.active_count()
    yield
    assert (len(descendants(os.getpid())), len(os.listdir("/proc/self/fd")), threading.active_count()) == before


def run(code: str, stdin: str = "", **limits: float) -> CodeResult:
    return run_code(code, stdin, Limits(**limits))  # type: ignore[arg-type]


def says(code: str, stdin: str = "", **limits: float) -> str:
    """What a program prints that must come to its end."""
    ran = run(code, stdin, **limits)
    assert ran.status == "ok", ran
    return ran.stdout.strip()


TRY = """
def attempt(do):
    try:
        do()
        print("did it")
    except Exception as error:
        print(type(error).__name__)
"""


@isolating
def test_a_program_runs_with_input_and_exit_status() -> None:
    ran = run("import sys\nprint(sys.stdin.read()[::-1])\nprint('é', file=sys.stderr)\nsys.exit(3)", "abc ü")
    assert (ran.status, ran.exit_code, ran.stdout, ran.stderr) == ("failed", 3, "ü cba\n", "é\n")
    assert run("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)").exit_code == -11
    assert "ZeroDivisionError" in run("1 / 0").stderr
    assert says("import math, json, re, collections, random, threading; print(math.sqrt(4))") == "2.0"
    assert says("import sys; print(len(sys.stdin.read()))", "x" * 300_000) == "300000"
    assert says("print('unread input is no error')", "x" * 300_000)


@isolating
@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import os; os.close(1); os.close(2)\nwhile True: pass",
        "import signal as s\nfor n in set(s.valid_signals()) - {9, 19}: s.signal(n, s.SIG_IGN)\nwhile True: pass",
    ],
)
def test_wall_time(code: str) -> None:
    ran = run(code, seconds=0.5)
    assert ran.status == "timeout" and 0.4 < ran.seconds < 3


@isolating
def test_processor_time_also_of_a_program_that_ignores_the_signal() -> None:
    spin = "while True: pass"
    assert run(spin, seconds=20, cpu_seconds=1).status == "timeout"
    ignoring = f"import signal; signal.signal(signal.SIGXCPU, signal.SIG_IGN)\n{spin}"
    assert run(ignoring, seconds=20, cpu_seconds=1).status == "timeout"


@isolating
def test_memory() -> None:
    for code in (
        "x = bytearray(2 ** 30)",
        "x = []\nwhile True: x.append(bytearray(2 ** 20))",
        "import mmap; x = mmap.mmap(-1, 2 ** 30)",
    ):
        ran = run(code, memory_mb=128)
        assert ran.status == "failed" and ("MemoryError" in ran.stderr or "OSError" in ran.stderr), ran
    assert "PermissionError" in run("import os; os.memfd_create('x')").stderr


@isolating
def test_a_fork_bomb_cannot_start_and_where_processes_are_allowed_is_counted() -> None:
    bomb = "import os\nwhile True: os.fork()"
    assert "PermissionError" in run(bomb).stderr
    assert "PermissionError" in run("import subprocess; subprocess.run(['/bin/true'])").stderr
    count = """
import os, time
children = 0
try:
    while True:
        if os.fork() == 0:
            time.sleep(60)
        children += 1
except BlockingIOError:
    print(children)
"""
    assert int(says(count, processes=8)) == 7
    assert run(bomb, processes=8, seconds=1).status in ("failed", "timeout")


@isolating
def test_threads_are_counted() -> None:
    code = """
import threading
threading.stack_size(65536)  # so that it is not memory that runs out
stop, started = threading.Event(), 0
try:
    while True:
        threading.Thread(target=stop.wait).start()
        started += 1
except RuntimeError:
    print(started)
stop.set()
"""
    assert int(says(code)) == 31


@isolating
def test_a_daemon_ends_with_the_program() -> None:
    code = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for fd in range(3): os.close(fd)
        time.sleep(60)
    os._exit(0)
os.wait()
print("left")
"""
    began = time.monotonic()
    assert says(code, processes=8) == "left"
    assert time.monotonic() - began < 5  # and `_nothing_is_left` looks for it


@isolating
def test_files_can_be_written_in_its_folder_alone(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    code = (
        TRY
        + f"""
import os, tempfile
open("inside", "w").write("x")
tempfile.NamedTemporaryFile().close()
print(os.getcwd(), os.listdir("."))
for path in ({str(outside)!r}, "../x", "/x", "/usr/x", "/program.py", "/dev/x", "/etc/x", {sys.base_prefix + "/x"!r}):
    attempt(lambda: open(path, "a"))
os.symlink({str(outside)!r}, "link")
attempt(lambda: open("link", "w"))
os.symlink({str(tmp_path)!r}, "folder")
attempt(lambda: open("folder/outside", "w"))
attempt(lambda: os.link("/program.py", "hard"))
attempt(lambda: os.chmod("/usr", 0o777))
"""
    )
    said = says(code).splitlines()
    assert said[0] == "/work ['inside']" and len(said) == 13 and "did it" not in said
    assert not outside.exists() and os.listdir(tmp_path) == []


@isolating
def test_files_sizes_and_numbers_are_bounded() -> None:
    assert "File too large" in run("open('x', 'wb').write(bytes(2 * 2 ** 20))", file_mb=1).stderr
    disk = "for i in range(9): open(str(i), 'wb').write(bytes(2 ** 20))"
    assert "No space left" in run(disk, disk_mb=4).stderr
    assert "No space left" in run("for i in range(99): open(str(i), 'w').close()").stderr
    assert "Too many open files" in run("x = [open('/dev/null') for _ in range(99)]").stderr


@isolating
def test_the_home_folder_and_other_files_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("s")
    with tempfile.NamedTemporaryFile(dir=Path.home()) as file:
        paths = [
            file.name,
            str(tmp_path / "secret"),
            "/etc/passwd",
            "/proc/self/environ",
            "/proc/1",
            "/sys",
            "/dev/shm",
        ]
        said = says(TRY + f"import os\nfor path in {paths!r}: attempt(lambda: os.stat(path))")
    assert said.split() == ["FileNotFoundError"] * len(paths)


@isolating
def test_nothing_of_the_trainer_is_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hush")
    with tempfile.TemporaryFile() as file:
        os.set_inheritable(file.fileno(), True)
        code = """
import json, os
fds = []
for fd in range(4096):
    try:
        os.fstat(fd)
        fds.append(fd)
    except OSError:
        pass
print(json.dumps([dict(os.environ), fds, os.getuid(), os.getgid(), os.uname().nodename]))
"""
        environment, fds, uid, gid, _ = json.loads(says(code))
    assert "hush" not in environment.values() and set(environment) == {"PATH", "HOME", "TMPDIR", "LANG"}
    assert fds == [0, 1, 2] and (uid, gid) == (1000, 1000)


@isolating
def test_no_network_and_no_local_socket() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as local:
        name = f"pronghorn-test-{os.getpid()}"
        local.bind("\0" + name)
        for listening in (server, local):
            listening.listen()
            listening.setblocking(False)
        port = server.getsockname()[1]
        code = (
            TRY
            + f"""
import socket
attempt(lambda: socket.create_connection(("127.0.0.1", {port}), timeout=2))
attempt(lambda: socket.socket(socket.AF_UNIX).connect("\\0{name}"))
attempt(lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
attempt(lambda: socket.socket(40, socket.SOCK_STREAM))
attempt(lambda: socket.socketpair())
"""
        )
        assert says(code).split() == [
            "PermissionError",
            "ConnectionRefusedError",
            "PermissionError",
            "PermissionError",
            "did",
            "it",
        ]
        for listening in (server, local):
            with pytest.raises(BlockingIOError):
                listening.accept()


@isolating
def test_the_network_namespace_holds_without_the_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wall alone: system calls allowed, a TCP connection still reaches nothing."""
    allow_all = (0x06).to_bytes(2, "little") + bytes(2) + (0x7FFF0000).to_bytes(4, "little")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        server.setblocking(False)
        monkeypatch.setattr(sandbox, "seccomp_program", lambda processes: allow_all)
        connect = f"import socket; attempt(lambda: socket.create_connection(('127.0.0.1', {port}), timeout=2))"
        more = f"\nimport os\nprint(os.kill(1, 9), os.getpid())\nattempt(lambda: os.kill({os.getpid()}, 9))"
        assert says(TRY + connect + more).splitlines() == ["OSError", "None 2", "ProcessLookupError"]
        with pytest.raises(BlockingIOError):
            server.accept()


@isolating
def test_processes_outside_cannot_be_reached() -> None:
    code = (
        TRY
        + f"""
import os, signal
print(os.getppid(), os.kill(os.getppid(), signal.SIGKILL))
signal.signal(signal.SIGTERM, lambda *_: None)
attempt(lambda: os.kill({os.getpid()}, signal.SIGKILL))
attempt(lambda: os.kill({os.getppid()}, 0))
attempt(lambda: os.kill(-1, signal.SIGTERM))
print("alive")
"""
    )
    said = says(code).splitlines()
    assert said[:3] == ["1 None", "ProcessLookupError", "ProcessLookupError"] and said[-1] == "alive"


@isolating
def test_the_kernel_s_dangerous_calls_are_refused() -> None:
    code = """
import ctypes, errno, os
libc = ctypes.CDLL(None, use_errno=True)
calls = dict(ptrace=101, unshare=272, setns=308, mount=165, umount2=166, pivot_root=155, chroot=161, bpf=321,
             perf_event_open=298, userfaultfd=323, keyctl=250, io_uring_setup=425, memfd_create=319, shmget=29,
             process_vm_readv=310, open_by_handle_at=304, fork=57, vfork=58, init_module=175, kexec_load=246)
def refused(number):
    return libc.syscall(number, 0, 0, 0, 0, 0) == -1 and ctypes.get_errno() == errno.EPERM
print([name for name, number in calls.items() if not refused(number)])
try:
    os.setuid(0)
except OSError as error:
    print(error.errno == errno.EINVAL or error.errno == errno.EPERM)
"""
    if os.uname().machine != "x86_64":
        pytest.skip("the numbers are those of x86_64")
    assert says(code).splitlines() == ["[]", "True"]


@isolating
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_output_is_bounded(stream: str) -> None:
    ran = run(f"import sys\nwhile True: sys.{stream}.write('x' * 65536)", output_kb=16)
    assert ran.status == "output" and len(getattr(ran, stream)) == 16 * 1024 and ran.seconds < 5
    assert run("import os; os.write(1, b'\\xff\\xfe')").stdout == "\ufffd\ufffd"


@isolating
def test_many_at_once() -> None:
    results: list[str] = []
    threads = [threading.Thread(target=lambda i=i: results.append(says(f"print({i})"))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == list("012345")


@isolating
def test_it_ends_with_the_trainer(tmp_path: Path) -> None:
    """`kill -9` of the process that runs it; what listens for its end is a pipe that only it holds open."""
    script = tmp_path / "train.py"
    script.write_text(
        "from pronghorn.rewards.code import Limits, run_code\n"
        "run_code('import time; time.sleep(60)', limits=Limits(seconds=60))\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script], env=env) as trainer:
        until = time.monotonic() + 30
        while len(started := descendants(trainer.pid)) < 4 and time.monotonic() < until:
            time.sleep(0.01)
        trainer.kill()
    assert len(started) == 4, "keeper, builder, init and program"
    until = time.monotonic() + 5
    while (left := [pid for pid in started if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.02)
    assert not left


@isolating
def test_an_ordinary_user_has_it_too() -> None:
    """Where the tests run as root: the same attempts by a program of a user without any right."""
    python = shutil.which("python3", path="/usr/bin")
    if os.geteuid() != 0 or python is None:
        pytest.skip("needs root, and a Python that other users can run")
    code = (
        "import sys; assert sys.version_info >= (3, 11); from pronghorn.rewards.code import run_code; "
        "print(run_code('print(6)').stdout)"
    )
    ran = subprocess.run(
        [python, "-B", "-c", code], capture_output=True, text=True, cwd="/", env={"PYTHONPATH": str(ROOT)}, timeout=60,
        user=12345, group=12345, extra_groups=[],
    )  # fmt: skip
    if "sys.version_info" in ran.stderr or "ModuleNotFoundError" in ran.stderr or "PermissionError" in ran.stderr:
        pytest.skip("the other user's Python is too old, or cannot read this folder")
    assert ran.stdout.strip() == "6", ran.stderr


def test_it_refuses_where_it_cannot_isolate(tmp_path: Path) -> None:
    """For real: a user namespace in which no other may be made. The code must not have run anywhere."""
    mark = tmp_path / "ran"
    script = tmp_path / "script.py"
    script.write_text(
        "from pronghorn.rewards.code import SandboxError, code_execution_reward, run_code\n"
        f"code = {f'open({str(mark)!r}, chr(119))'!r}\n"
        "for do in (code_execution_reward, lambda: run_code(code)):\n"
        "    try:\n        do()\n        print('ran')\n"
        "    except SandboxError as error:\n        print(error)\n"
    )
    forbid = 'echo 0 > /proc/sys/user/max_user_namespaces; exec "$0" "$1"'
    ran = subprocess.run(
        ["unshare", "--user", "--map-root-user", "sh", "-c", forbid, sys.executable, script],
        capture_output=True, text=True, env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}, timeout=60,
    )  # fmt: skip
    if "unshare failed" in ran.stderr:
        pytest.skip("no user namespaces to forbid more in; what is tested holds here anyway")
    said = ran.stdout.splitlines()
    assert len(said) == 2 and all("could not be built: Step: new namespaces" in line for line in said), ran
    assert all("sysctl" in line and "never run without isolation" in line for line in said) and not mark.exists()


def test_it_refuses_other_systems_and_walls_with_holes(monkeypatch: pytest.MonkeyPatch) -> None:
    probe._shown.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(SandboxError, match="cannot be isolated on darwin"):
        run_code("print(1)")
    monkeypatch.setattr(sys, "platform", "linux")

    def leaky(code: str, stdin: str, limits: Limits) -> CodeResult:
        return CodeResult("ok", 0, json.dumps({"start a process": False, "open a network socket": True}), "", 0.1)

    monkeypatch.setattr(probe, "run_in_sandbox", leaky)
    with pytest.raises(SandboxError, match="does not hold: a program in it could open a network socket"):
        run_code("print(1)")


def test_limits_are_checked() -> None:
    for name, value in (("seconds", 0), ("memory_mb", -1), ("processes", 1.5), ("files", 0)):
        with pytest.raises(ConfigError, match=f"Limits: {name}="):
            Limits(**{name: value})  # type: ignore[arg-type]

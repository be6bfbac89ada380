"""Checks and probes: one that raises, hangs or crashes gives a line and holds nothing up."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from pronghorn.doctor import base
from pronghorn.doctor.base import Check, ProbeError, command_output, probe, run_all, worst


def test_lines_come_in_order_and_a_broken_check_becomes_a_fail_line() -> None:
    def slow() -> list[Check]:
        time.sleep(0.2)
        return [Check("slow", "ok", "a"), Check("slow too", "warn", "b")]

    def broken() -> list[Check]:
        raise KeyError("lost")

    lines = list(run_all({"slow": slow, "broken": broken}, timeout_s=5))
    assert [line.name for line in lines] == ["slow", "slow too", "broken"]
    assert lines[2].status == "fail" and lines[2].detail == "KeyError: 'lost'" and lines[2].remedy


def test_a_check_that_hangs_fails_after_the_timeout() -> None:
    never = threading.Event()

    def hangs() -> list[Check]:
        never.wait(30)
        return []

    start = time.monotonic()
    lines = list(run_all({"hangs": hangs, "fine": lambda: [Check("fine", "ok", "")]}, timeout_s=0.3))
    never.set()
    assert time.monotonic() - start < 5
    assert [(line.name, line.status) for line in lines] == [("hangs", "fail"), ("fine", "ok")]


def test_worst() -> None:
    ok, warn, fail = (Check("x", status, "") for status in ("ok", "warn", "fail"))  # type: ignore[arg-type]
    assert (worst([]), worst([ok]), worst([ok, warn]), worst([warn, fail, ok])) == ("ok", "ok", "warn", "fail")


@pytest.fixture
def made_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Write the body of ``main`` of a probe and run it."""
    folder = tmp_path / "pronghorn" / "doctor" / "probes"
    folder.mkdir(parents=True)
    for part in (folder, folder.parent, folder.parent.parent):
        (part / "__init__.py").write_text("")
    start = base._PROBE_START.replace("sys.path.append(", "sys.path.insert(0, ")
    monkeypatch.setattr(base, "_PROBE_START", start)
    monkeypatch.setattr(base, "_PACKAGE_PARENT", tmp_path)

    def run(body: str, timeout_s: float = 20.0) -> dict[str, object]:
        (folder / "made.py").write_text(f"def main():\n    {body}\n")
        return probe("made", timeout_s=timeout_s)

    return run


def test_a_probe_answers_with_its_last_line(made_probe) -> None:
    assert made_probe('print("noise"); print(\'{"a": 1}\')') == {"a": 1}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise OSError('libcudart.so.13: cannot open')", "OSError: libcudart.so.13: cannot open"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by SIGSEGV"),
        ("import sys; sys.exit(3)", "exit status 3"),
        ("print('not json')", "no JSON"),
        ("print('[1]')", "not an object"),
    ],
)
def test_a_probe_that_does_not_end_well_says_how(made_probe, body: str, message: str) -> None:
    with pytest.raises(ProbeError, match=message.replace("(", r"\(")):
        made_probe(body)


def test_a_probe_that_hangs_is_stopped(made_probe) -> None:
    start = time.monotonic()
    with pytest.raises(ProbeError, match="no answer within"):
        made_probe("import time; time.sleep(60)", timeout_s=0.5)
    assert time.monotonic() - start < 10


def test_command_output_absent_failing_and_hanging() -> None:
    assert command_output(["no-such-program-anywhere"]) is None
    assert command_output(["echo", "hello"]) == "hello\n"
    with pytest.raises(ProbeError, match="status 3: broken driver"):
        command_output(["sh", "-c", "echo broken driver >&2; exit 3"])
    with pytest.raises(ProbeError, match="no answer within"):
        command_output(["sleep", "30"], timeout_s=0.3)

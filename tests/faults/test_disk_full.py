"""A disk that fills up: one clear error, a whole checkpoint left, and a run that goes on from it once there is room."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from pronghorn.grpo.checkpoint import is_whole, whole_checkpoints
from pronghorn.grpo.disk import DiskFull, append_whole, room_on_disk
from pronghorn.grpo.metrics import History
from tests.faults.test_kill import assert_same, finish, result
from tests.faults.victim import STEPS, made, start

SIZE = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "pronghorn-test", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"mounting a file system is not allowed here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    finish(folder)
    return folder


def fill(folder: Path, leave: int) -> Path:
    """Take all but ``leave`` bytes of a disk."""
    ballast = folder / "ballast"
    stat = os.statvfs(folder)
    ballast.write_bytes(b"\0" * max(stat.f_bavail * stat.f_frsize - leave, 0))
    return ballast


class FillAt(TrainerCallback):
    """Leaves so many bytes of the disk as a step begins."""

    def __init__(self, folder: Path, step: int, leave: int) -> None:
        self.folder, self.step, self.leave = folder, step, leave

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            fill(self.folder, self.leave)


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("share", [0.15, 0.5, 0.9])
def test_a_disk_that_fills_up_within_a_save(small_disk: Path, whole: Path, share: float) -> None:
    """Room for a part of the third checkpoint, so that another file of it fails each time."""
    size = folder_size(whole / "run" / f"checkpoint-{STEPS}")
    folder = small_disk / "run"
    trainer = made(folder, save_total_limit=1)
    trainer.add_callback(FillAt(small_disk, 2, int(share * size)))
    with pytest.raises(DiskFull, match="is full: checkpoint-3 could not be written; checkpoint-2 is whole: free space"):
        trainer.train()
    assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-2"]
    assert not list(folder.glob(".*"))
    (small_disk / "ballast").unlink()
    again = made(folder)
    again.train(resume_from_checkpoint=True)
    assert_same(result(small_disk), result(whole))


def test_all_amounts_of_room(small_disk: Path) -> None:
    """From nothing to enough: the earlier checkpoint stands, and the new one does or leaves nothing behind."""
    folder = small_disk / "run"
    trainer = made(folder, max_steps=2, save_steps=1)
    trainer.train()
    size = folder_size(folder / "checkpoint-2")
    shutil.rmtree(folder / "checkpoint-2")
    outcomes = []
    for leave in range(0, size + 30 * 4096, max(size // 24, 4096)):  # files take whole pages
        ballast = fill(small_disk, leave)
        try:
            trainer._save_checkpoint(trainer.model, None)
            outcomes.append("written")
            assert is_whole(folder / "checkpoint-2")
            shutil.rmtree(folder / "checkpoint-2")
        except DiskFull:
            outcomes.append("full")
        ballast.unlink()
        assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-1"]
        assert not list(folder.glob(".*")), leave
    assert outcomes[0] == "full" and outcomes[-1] == "written" and outcomes.count("full") > 10
    assert outcomes == sorted(outcomes)  # once there is room, there is


def test_a_disk_that_fills_up_with_metrics(small_disk: Path) -> None:
    """One error that names file and remedy; the file keeps whole lines, so the run resumes with its history."""
    history = History(small_disk / "metrics.jsonl")
    history.start()
    record = {"step": 1, "text": "x" * 3000}
    fill(small_disk, 40_000)

    def go_on() -> None:
        for _ in range(40):
            history.append(record, record)

    with pytest.raises(DiskFull, match="metrics.jsonl could not be written; free space, then go on with train") as full:
        go_on()
    assert full.value.errno == errno.ENOSPC
    lines = history.path.read_text().splitlines()
    assert len(lines) > 4 and len(lines) % 2 == 0 and all(json.loads(line) == record for line in lines)
    (small_disk / "ballast").unlink()
    history.start(1)
    history.append({"step": 2})
    assert len(history.path.read_text().splitlines()) == len(lines) + 1


def test_a_run_whose_metrics_find_no_room(small_disk: Path, whole: Path) -> None:
    folder = small_disk / "run"
    trainer = made(folder)
    trainer.add_callback(FillAt(small_disk, 3, 0))
    with pytest.raises(DiskFull, match="could not be written"):
        trainer.train()
    assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-2", "checkpoint-3"]
    (small_disk / "ballast").unlink()
    made(folder).train(resume_from_checkpoint=True)
    assert_same(result(small_disk), result(whole))


class NoRoom(TrainerCallback):
    """From a step's begin on, the nth call of a function finds no room, and every later one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, step: int, nth: int) -> None:
        self.step, self.left, self.armed = step, nth, False
        self._call = getattr(module, name)
        monkeypatch.setattr(module, name, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= self.armed
        if not self.armed or self.left > 0:
            return self._call(*args, **kwargs)
        if self._call is torch.save:  # half of the file finds room
            self._call(*args, **kwargs)
            os.truncate(args[1], Path(args[1]).stat().st_size // 2)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.armed = self.armed or state.global_step == self.step


@pytest.mark.parametrize(
    "module, name, nth, what",
    [
        (os, "write", 1, "completions.jsonl"),
        (os, "write", 2, "metrics.jsonl"),
        (os, "fsync", 1, "checkpoint-3"),  # of what was written before: a disk may say so late
        (os, "fsync", 6, "checkpoint-3"),
        (torch, "save", 1, "checkpoint-3"),
        (torch, "save", 4, "checkpoint-3"),
        (os, "rename", 1, "checkpoint-3"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_call_that_finds_no_room(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, nth: int, what: str
) -> None:
    """Without a file system of its own: what a full one would say, from one call of the third save on."""
    folder = tmp_path / "run"
    trainer = made(folder, save_total_limit=1)
    full = NoRoom(monkeypatch, module, name, 2, nth)
    trainer.add_callback(full)
    with pytest.raises(DiskFull, match=f"{what} could not be written; .*free space") as raised:
        trainer.train()
    assert raised.value.errno == errno.ENOSPC and full.left <= 0
    assert [path.name for path in whole_checkpoints(folder)] == ["checkpoint-2"]
    assert not list(folder.glob(".*"))
    full.armed = False
    made(folder).train(resume_from_checkpoint=True)
    assert_same(result(tmp_path), result(whole))


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """Without a disk of its own: the system refuses bytes beyond a limit for each file (EFBIG)."""
    folder = tmp_path / "limited"
    child = start(folder, file_limit=60_000)
    child.join(120)
    assert child.exitcode == 1
    run = folder / "run"
    assert not [path for path in run.iterdir() if path.name.startswith(("checkpoint-", "."))]
    finish(folder)
    assert whole_checkpoints(run)


def test_an_append_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lines"
    append_whole(path, b"one\n")
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:2])))
    append_whole(path, b"two, in pieces\n")
    calls = []

    def half(descriptor: int, data: Any) -> int:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, bytes(data[:2]))

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(OSError, match="No space"):
        append_whole(path, b"three\n")
    assert path.read_bytes() == b"one\ntwo, in pieces\n"


def test_other_errors_pass_as_they_are(tmp_path: Path) -> None:
    for error in (RuntimeError("shapes differ"), PermissionError(errno.EACCES, "no"), ValueError("x")):
        with pytest.raises(type(error)) as raised, room_on_disk(tmp_path, "a file", "free space"):
            raise error
        assert raised.value is error

"""The order of a checkpoint's writes: cut off before any of them, a whole one stands; each is on disk before the next
relies on it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pronghorn.grpo import checkpoint as checkpoints
from pronghorn.grpo.checkpoint import MANIFEST, clean, is_whole, rotate, to_resume, whole_checkpoints, writing

CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class Cut(BaseException):
    """The process ends here."""


class Cutter:
    """An audit hook (they cannot be taken off again, so there is one) that ends the process before change ``at``."""

    def __init__(self) -> None:
        self.at, self.count, self.watching = 0, 0, False
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.watching or event not in CHANGES:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        self.count += 1
        if self.count == self.at:
            os._exit(7)

    def run(self, work: Callable[[], None], at: int) -> tuple[bool, int]:
        """``work`` in a forked process that ends before its change number ``at``: whether it did, and its changes."""
        child = os.fork()
        if child == 0:
            self.at, self.count, self.watching = at, 0, True
            work()
            os._exit(0)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status) == 7, status


cutter = Cutter()


def make(output_dir: Path, step: int, text: str = "x") -> None:
    with writing(output_dir / f"checkpoint-{step}") as folder:
        (folder / "weights").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "more").write_text("y" * 100)


def cut_everywhere(tmp_path: Path, before: Callable[[Path], None], work: Callable[[Path], None]) -> list[list[str]]:
    """What stands after ``work`` was cut before each of its changes, and after the next start has cleaned up."""
    found = []
    for at in range(1, 200):
        folder = tmp_path / str(at)
        before(folder)
        cut, _ = cutter.run(lambda folder=folder: work(folder), at)  # type: ignore[misc]
        named = [path for path in folder.iterdir() if path.name.startswith("checkpoint-")]
        assert all(is_whole(path) for path in named), (at, named)
        clean(folder)
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]
        found.append([path.name for path in whole_checkpoints(folder)])
        assert to_resume(str(folder), True, overwrite=False) == whole_checkpoints(folder)[-1]
        if not cut:
            return found
    raise AssertionError("it never ended")


def test_a_save_with_rotation_cut_anywhere(tmp_path: Path) -> None:
    def save(folder: Path) -> None:
        make(folder, 2)
        rotate(folder, 1, keep=None)

    found = cut_everywhere(tmp_path, lambda folder: make(folder, 1), save)
    assert found[0] == ["checkpoint-1"] and found[-1] == ["checkpoint-2"] and len(found) > 12
    assert set(map(tuple, found)) == {("checkpoint-1",), ("checkpoint-1", "checkpoint-2"), ("checkpoint-2",)}


def test_a_replacement_cut_anywhere(tmp_path: Path) -> None:
    texts = []

    def check(folder: Path) -> None:
        make(folder, 1, "first")

    found = cut_everywhere(tmp_path, check, lambda folder: make(folder, 1, "second"))
    assert found == [["checkpoint-1"]] * len(found) and len(found) > 8
    texts = [(tmp_path / str(at) / "checkpoint-1" / "weights").read_text() for at in range(1, len(found) + 1)]
    assert texts == sorted(texts) and set(texts) == {"first", "second"}  # one or the other, never back


def test_cleaning_up_cut_anywhere(tmp_path: Path) -> None:
    """The start after a crash may crash as well."""

    def crashed(folder: Path) -> None:
        make(folder, 1)
        make(folder, 3)
        (folder / "checkpoint-1").rename(folder / ".replaced-checkpoint-1")
        (folder / ".unfinished-checkpoint-1").mkdir()
        (folder / ".removed-checkpoint-0").mkdir()
        (folder / ".removed-checkpoint-0" / "left").write_text("x")

    found = cut_everywhere(tmp_path, crashed, clean)
    assert found == [["checkpoint-1", "checkpoint-3"]] * len(found) and len(found) > 3


def test_all_is_on_disk_before_the_next_relies_on_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync comes after a file's last write and before the rename, the folder's after it and before the old one goes.

    What a power failure loses is what was not synced; that order is the guarantee.
    """
    events: list[tuple[str, str]] = []
    sync, rename, remove = os.fsync, Path.rename, checkpoints._remove

    def name(path: Any) -> str:
        return str(Path(path).relative_to(tmp_path))

    def fsync(descriptor: int) -> None:
        events.append(("sync", name(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    def renamed(self: Path, target: Any) -> Path:
        events.append(("rename", name(target)))
        return rename(self, target)

    def removed(folder: Path) -> None:
        events.append(("remove", name(folder)))
        remove(folder)

    make(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    monkeypatch.setattr(checkpoints, "_remove", removed)
    make(tmp_path, 2)
    rotate(tmp_path, 1, keep=None)
    folder = ".unfinished-checkpoint-2"
    order = [
        ("sync", f"{folder}/sub/more"), ("sync", f"{folder}/weights"), ("sync", f"{folder}/{MANIFEST}"),
        ("sync", f"{folder}/sub"), ("sync", folder), ("rename", "checkpoint-2"), ("sync", "."),
        ("remove", "checkpoint-1"), ("rename", ".removed-checkpoint-1"),
    ]  # fmt: skip
    assert events == order


def test_what_a_run_that_went_back_writes_is_newer_than_the_later_steps_of_before(tmp_path: Path) -> None:
    """Resumed from step 2 of 6, it must neither be rotated away as the oldest nor lose to step 6 at the next resume."""
    for step in (2, 4, 6):
        make(tmp_path, step)
    make(tmp_path, 3)
    assert to_resume(str(tmp_path), True, overwrite=False) == tmp_path / "checkpoint-3"
    rotate(tmp_path, 1, keep=None)
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["checkpoint-3"]


@pytest.mark.parametrize("manifest", ["null", "[]", "{}", '{"files": []}', '{"files": {}}', "\0\0"])
def test_a_damaged_manifest_is_no_whole_checkpoint(tmp_path: Path, manifest: str) -> None:
    make(tmp_path, 1)
    (tmp_path / "checkpoint-1" / MANIFEST).write_text(manifest)
    assert not is_whole(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-2").write_text("a file")
    assert whole_checkpoints(tmp_path) == []

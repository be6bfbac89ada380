"""Checkpoints that are whole or not there: written beside, synced, marked, renamed, and only then old ones removed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config.errors import ConfigError

MANIFEST = "pronghorn_checkpoint.json"
"""Lists every file of the checkpoint with its size; written last, so that its presence marks a whole one."""

_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED, _REPLACED = ".unfinished-", ".replaced-"


def is_whole(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` holds every file that its manifest lists, at full size."""
    return missing(folder) is None


def missing(folder: str | os.PathLike[str]) -> str | None:
    """What keeps ``folder`` from being a whole checkpoint, or None."""
    folder = Path(folder)
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (ValueError, KeyError):
        return f"its {MANIFEST} cannot be read"
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or cut short"
    return None


def step_of(folder: str | os.PathLike[str]) -> int:
    """The optimizer step in the name ``checkpoint-<step>``; -1 for another name."""
    match = _NAME.fullmatch(Path(folder).name)
    return int(match[1]) if match else -1


def whole_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The whole checkpoints in ``output_dir``, oldest first."""
    if not Path(output_dir).is_dir():
        return []
    found = [path for path in Path(output_dir).iterdir() if step_of(path) >= 0 and is_whole(path)]
    return sorted(found, key=step_of)


def clean(output_dir: str | os.PathLike[str]) -> None:
    """Remove what interrupted saves left in ``output_dir``, and put back a checkpoint that was being replaced."""
    if not Path(output_dir).is_dir():
        return
    for path in Path(output_dir).iterdir():
        if path.name.startswith(_UNFINISHED):
            shutil.rmtree(path)
        elif path.name.startswith(_REPLACED):
            original = path.with_name(path.name.removeprefix(_REPLACED))
            if is_whole(original):
                shutil.rmtree(path)
            else:
                shutil.rmtree(original, ignore_errors=True)
                path.rename(original)


@contextmanager
def writing(final: Path) -> Iterator[Path]:
    """A folder to write a checkpoint into; it becomes ``final`` when the block ends well, and is removed when not."""
    unfinished = final.with_name(_UNFINISHED + final.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        _seal(unfinished)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    replaced = final.with_name(_REPLACED + final.name)
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _seal(folder: Path) -> None:
    """Sync every file to disk, then write the manifest and sync it too."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    manifest = folder / MANIFEST
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    manifest.write_text(json.dumps({"files": sizes}, indent=1), encoding="utf-8")
    _sync(manifest)
    for directory in [path for path in folder.rglob("*") if path.is_dir()]:
        _sync(directory)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rotate(output_dir: str | os.PathLike[str], limit: int | None, keep: str | None) -> None:
    """Remove the oldest whole checkpoints beyond ``limit``; never the newest, nor ``keep`` (the best one)."""
    if limit is None or limit <= 0:
        return
    checkpoints = whole_checkpoints(output_dir)
    protected = {checkpoints[-1].resolve()} if checkpoints else set()
    if keep is not None:
        protected.add(Path(keep).resolve())
    surplus = len(checkpoints) - max(limit, len(protected))
    for path in [path for path in checkpoints if path.resolve() not in protected][: max(surplus, 0)]:
        shutil.rmtree(path)


def to_resume(output_dir: str, asked: str | bool | None, overwrite: bool) -> Path | None:
    """The checkpoint that training starts from, None to start anew.

    Args:
        asked: True for the newest whole checkpoint in ``output_dir``, a folder for that one, None or False for none.
        overwrite: delete the checkpoints of an earlier run instead of refusing the folder.

    Raises:
        ConfigError: a folder that is not a whole checkpoint; none to resume from; or checkpoints of an earlier run
            where none was asked for.
    """
    clean(output_dir)
    found = whole_checkpoints(output_dir)
    if asked is True:
        if not found:
            raise ConfigError(
                f"resume_from_checkpoint=True: output_dir={output_dir!r} holds no whole checkpoint; "
                "leave it out to start anew, or name a folder"
            )
        return found[-1]
    if asked:
        fault = missing(asked)
        if fault:
            raise ConfigError(
                f"resume_from_checkpoint={str(asked)!r} is no whole checkpoint: {fault}; give one of "
                f"{[str(path) for path in found] or 'those that an uninterrupted save left'}"
            )
        return Path(asked)
    if found and not overwrite:
        raise ConfigError(
            f"output_dir={output_dir!r} holds {len(found)} whole checkpoint(s) of a run, the last is {found[-1].name}; "
            "call train(resume_from_checkpoint=True) to go on, choose another output_dir, or set "
            "overwrite_output_dir=True to delete them and start anew"
        )
    for path in found:
        shutil.rmtree(path)
    return None

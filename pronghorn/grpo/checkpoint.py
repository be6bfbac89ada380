"""Checkpoints that are whole or not there: written beside, synced, marked, renamed, and only then old ones removed.

What stands at any instant, whatever ends the process there: a folder named ``checkpoint-<step>`` is whole or gone.
Work in progress has names that begin with a dot, which nobody takes for a checkpoint; :func:`clean` settles them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..config.errors import ConfigError
from ..weights.folder import sync

MANIFEST = "pronghorn_checkpoint.json"
"""Lists every file of the checkpoint with its size; written last, so that its presence marks a whole one."""

_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED, _REPLACED, _REMOVED = ".unfinished-", ".replaced-", ".removed-"


def is_whole(folder: str | os.PathLike[str]) -> bool:
    """Whether ``folder`` holds every file that its manifest lists, at full size."""
    return missing(folder) is None


def missing(folder: str | os.PathLike[str]) -> str | None:
    """What keeps ``folder`` from being a whole checkpoint, or None."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return f"it has no {MANIFEST}"
    files = _manifest(folder).get("files")
    if not isinstance(files, dict) or not files:
        return f"its {MANIFEST} cannot be read"
    for name, size in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            return f"{name} is missing or cut short"
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    """The manifest, empty where there is none or it is damaged."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def step_of(folder: str | os.PathLike[str]) -> int:
    """The optimizer step in the name ``checkpoint-<step>``; -1 for another name."""
    match = _NAME.fullmatch(Path(folder).name)
    return int(match[1]) if match else -1


def whole_checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """The whole checkpoints in ``output_dir`` in the order in which they were written.

    That is the order of their steps, unless a run went back to an earlier checkpoint: then what it wrote since is
    newer than the later steps of before.
    """
    if not Path(output_dir).is_dir():
        return []
    found = [path for path in Path(output_dir).iterdir() if step_of(path) >= 0 and is_whole(path)]
    return sorted(found, key=lambda path: (_number(path), step_of(path)))


def _number(folder: Path) -> int:
    """Which checkpoint of its ``output_dir`` this was, counted from 1; 0 where the manifest does not say."""
    return int(_manifest(folder).get("number", 0))


def clean(output_dir: str | os.PathLike[str]) -> None:
    """Remove what interrupted saves left in ``output_dir``, and put back a checkpoint that was being replaced."""
    if not Path(output_dir).is_dir():
        return
    for path in sorted(Path(output_dir).iterdir()):
        if path.name.startswith((_UNFINISHED, _REMOVED)):
            shutil.rmtree(path)
        elif path.name.startswith(_REPLACED):
            _settle(path)


def _settle(replaced: Path) -> None:
    """Either the successor stands and ``replaced`` goes, or it takes its place again."""
    original = replaced.with_name(replaced.name.removeprefix(_REPLACED))
    if is_whole(original) or not is_whole(replaced):
        shutil.rmtree(replaced)
        return
    if original.exists():
        _remove(original)
    replaced.rename(original)
    sync(original.parent)


def _remove(folder: Path) -> None:
    """Remove a checkpoint: it loses its name first, so that a removal that is cut short leaves no part of it."""
    doomed = folder.with_name(_REMOVED + folder.name)
    if doomed.exists():
        shutil.rmtree(doomed)
    folder.rename(doomed)
    shutil.rmtree(doomed)


@contextmanager
def writing(final: Path) -> Iterator[Path]:
    """A folder to write a checkpoint into; it becomes ``final`` when the block ends well, and is removed when not."""
    unfinished, replaced = (final.with_name(prefix + final.name) for prefix in (_UNFINISHED, _REPLACED))
    _make_parents(final.parent)
    if replaced.exists():
        _settle(replaced)
    if unfinished.exists():
        shutil.rmtree(unfinished)
    unfinished.mkdir()
    try:
        yield unfinished
        _seal(unfinished, 1 + max((_number(path) for path in whole_checkpoints(final.parent)), default=0))
        if final.exists():
            final.rename(replaced)
        unfinished.rename(final)
    except BaseException:
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    sync(final.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _make_parents(folder: Path) -> None:
    """Make ``folder``, each new level on disk in the one above it."""
    if not folder.is_dir():
        _make_parents(folder.parent)
        folder.mkdir(exist_ok=True)
        sync(folder.parent)


def _seal(folder: Path, number: int) -> None:
    """Sync every file to disk, then write the manifest and sync it too, then the folders."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        sync(path)
    manifest = folder / MANIFEST
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    manifest.write_text(json.dumps({"number": number, "files": sizes}, indent=1), encoding="utf-8")
    sync(manifest)
    for directory in [path for path in folder.rglob("*") if path.is_dir()]:
        sync(directory)
    sync(folder)


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
        _remove(path)


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
        _remove(path)
    return None

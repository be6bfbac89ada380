"""Folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..config.errors import ConfigError


@contextmanager
def whole_folder(target: str | os.PathLike[str], replaceable: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield an empty folder beside ``target``; on success it takes ``target``'s place, on an exception it is removed.

    Everything is on disk before the rename. An existing folder is replaced only where ``replaceable(folder)`` says
    that it is an earlier one of the same kind; it stays until its successor is whole.

    Raises:
        ConfigError: ``target`` is a file, or a folder with other things in it.
    """
    final = Path(target).expanduser().absolute()
    check_target(final, replaceable)
    final.parent.mkdir(parents=True, exist_ok=True)
    building = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.building"
    building.mkdir()
    try:
        yield building
        for path in sorted(building.rglob("*")):
            sync(path)
        sync(building)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    _swap(building, final)


def check_target(target: str | os.PathLike[str], replaceable: Callable[[Path], bool]) -> None:
    """Raise :class:`ConfigError` when ``target`` exists and may not be replaced."""
    final = Path(target).expanduser().absolute()
    if final.exists() and not final.is_dir():
        raise ConfigError(f"folder={str(target)!r} is a file; give another path")
    if final.is_dir() and any(final.iterdir()) and not replaceable(final):
        raise ConfigError(
            f"folder={str(target)!r} already holds other files, which would be lost; give an empty or new folder"
        )


def _swap(building: Path, final: Path) -> None:
    """Rename ``building`` to ``final``, over an earlier folder, which is put back should the rename fail."""
    retired = None
    if final.exists():
        retired = final.parent / f".{final.name}.{uuid.uuid4().hex[:8]}.retired"
        final.rename(retired)
    try:
        building.rename(final)
    except OSError:
        if retired is not None:
            retired.rename(final)
        shutil.rmtree(building, ignore_errors=True)
        raise
    sync(final.parent)
    if retired is not None:
        shutil.rmtree(retired)


def sync(path: Path) -> None:
    """Flush a file or a folder's entries to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

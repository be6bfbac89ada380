"""A full disk as one clear error, whichever library was writing when it filled up."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ROOM = 1 << 16
"""Bytes left at which a disk counts as full: torch says only that a position in its file was unexpected."""


class DiskFull(OSError):
    """A write failed for want of space; ``errno`` is ENOSPC."""


@contextmanager
def room_on_disk(folder: Path, what: str, remedy: str) -> Iterator[None]:
    """A write inside that fails for want of space raises :class:`DiskFull` with ``what`` and ``remedy`` in its text.

    Other failures pass as they are. ``folder`` is where the write went.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        if not _is_full(folder, error):
            raise
        raise DiskFull(
            errno.ENOSPC, f"the disk of {str(folder)!r} is full: {what} could not be written; {remedy}"
        ) from error


def _is_full(folder: Path, error: BaseException) -> bool:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in _FULL:
            return True
        # safetensors and tokenizers, written in Rust, give the number in their text alone
        if any(f"(os error {number})" in str(cause) for number in _FULL):
            return True
        cause = cause.__cause__ or cause.__context__
    return isinstance(error, RuntimeError) and folder.is_dir() and shutil.disk_usage(folder).free < _NO_ROOM


def append_whole(path: Path, data: bytes) -> None:
    """Append ``data`` to a file: all of it, or on an error nothing.

    Raises:
        OSError: the write failed; the file is as it was.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        before = os.fstat(descriptor).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
        except BaseException:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)

"""Tensors out of safetensors files, one after another, read and hashed by several threads ahead of the consumer."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from ..config.errors import ConfigError
from .shards import Entry, Shard, read_shard

# Enough to keep disk, hash and copy busy at once; more only holds more memory.
_MOST_THREADS = 8
_CHUNK = 1 << 22


def threads() -> int:
    """How many threads read: one a core, eight at most."""
    return max(1, min(_MOST_THREADS, os.cpu_count() or 1))


class Fingerprints:
    """Collects tensors' sha256 digests, and turns a shard's into one fingerprint.

    A fingerprint is ``v1:<bytes>:<sha256 of the header>:<sha256 over the tensors' sha256 in byte order>``: any change
    of any byte changes it, and tensors can be hashed in parallel.
    """

    def __init__(self) -> None:
        self._digests: dict[tuple[Path, str], bytes] = {}

    def add(self, shard: Shard, entry: Entry, digest: bytes) -> None:
        self._digests[shard.path, entry.name] = digest

    def of(self, shard: Shard) -> str:
        """The fingerprint of a shard all of whose tensors were read (KeyError otherwise)."""
        content = hashlib.sha256(b"".join(self._digests[shard.path, entry.name] for entry in shard.entries))
        return f"v1:{shard.size}:{shard.header_sha256}:{content.hexdigest()}"


def stream(
    shards: Iterable[Shard],
    device: torch.device | str = "cpu",
    fingerprints: Fingerprints | None = None,
) -> Iterator[tuple[Shard, Entry, torch.Tensor]]:
    """Yield every tensor of ``shards``, in byte order, on ``device``, each in memory of its own.

    Threads read ahead by a few tensors, hash what they read where ``fingerprints`` is given, and copy it to the
    device; the consumer's work overlaps with the reading. Nothing outlives the consumer's own references.

    Raises:
        ConfigError: a file that ended early.
    """
    jobs = [(shard, entry) for shard in shards for entry in shard.entries]
    count = threads()
    pool = ThreadPoolExecutor(count, thread_name_prefix="weights")
    pending: deque[tuple[Shard, Entry, Future[tuple[torch.Tensor, bytes | None]]]] = deque()
    try:
        for shard, entry in jobs:
            pending.append((shard, entry, pool.submit(_read, shard, entry, device, fingerprints is not None)))
            if len(pending) > count:
                yield _finish(pending.popleft(), fingerprints)
        while pending:
            yield _finish(pending.popleft(), fingerprints)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def fingerprint(path: Path) -> str:
    """The fingerprint of one file, read in full."""
    shard, found = read_shard(path), Fingerprints()
    for _ in stream([shard], fingerprints=found):
        pass
    return found.of(shard)


def _finish(
    job: tuple[Shard, Entry, Future[tuple[torch.Tensor, bytes | None]]], fingerprints: Fingerprints | None
) -> tuple[Shard, Entry, torch.Tensor]:
    shard, entry, future = job
    tensor, digest = future.result()
    if fingerprints is not None and digest is not None:
        fingerprints.add(shard, entry, digest)
    return shard, entry, tensor


def _read(shard: Shard, entry: Entry, device: torch.device | str, hashed: bool) -> tuple[torch.Tensor, bytes | None]:
    """One tensor's bytes, as a tensor on ``device``, with their sha256."""
    data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
    view = data.numpy().data if len(data) else memoryview(bytearray())
    digest = hashlib.sha256()
    with shard.path.open("rb", buffering=0) as file:
        file.seek(entry.begin)
        done = 0
        while done < len(view):
            got = file.readinto(view[done : done + _CHUNK])
            if not got:
                raise ConfigError(f"file={str(shard.path)!r} ended at byte {entry.begin + done}; it is being changed")
            if hashed:
                digest.update(view[done : done + got])
            done += got
    tensor = data.view(entry.dtype).reshape(entry.shape) if len(data) else torch.empty(entry.shape, dtype=entry.dtype)
    return tensor.to(device), digest.digest() if hashed else None

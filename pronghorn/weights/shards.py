"""Safetensors files by their headers: which tensors lie where, checked against the file's size, nothing read yet."""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config.errors import ConfigError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class Entry:
    """One tensor in a file: dtype and shape, and its bytes at ``[begin, end)`` from the file's start."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its tensors in the order of their bytes, its metadata, sha256 of its header."""

    path: Path
    entries: tuple[Entry, ...]
    metadata: dict[str, str]
    header_sha256: str
    size: int


def shard_names(folder: Path, must_exist: bool = True) -> list[str]:
    """File names of the folder's weights, from the index where there is one.

    Raises:
        ConfigError: no safetensors weights, a file that the index names is absent, or a damaged index.
    """
    index = folder / INDEX
    if not index.is_file():
        if must_exist and not (folder / SINGLE).is_file():
            others = sorted(p.name for p in folder.glob("*.bin")) + sorted(p.name for p in folder.glob("*.gguf"))
            hint = f"; it has {others[0]}, but only safetensors load" if others else ""
            raise ConfigError(f"folder={str(folder)!r} has neither {SINGLE} nor {INDEX}{hint}")
        return [SINGLE]
    names = sorted(set(weight_map(folder).values()))
    absent = [name for name in names if not (folder / name).is_file()]
    if must_exist and absent:
        raise ConfigError(
            f"folder={str(folder)!r} is partial: {INDEX} names {absent[0]!r}, which is absent "
            f"({len(absent)} of {len(names)} files missing); copy or download it again"
        )
    return names


def weight_map(folder: Path) -> dict[str, str]:
    """Tensor name to file name, as the index says."""
    try:
        mapping = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ConfigError(f"file={str(folder / INDEX)!r} is damaged ({error}); copy or download it again") from error
    for name in set(mapping.values()):
        if Path(name).name != name:
            raise ConfigError(f"file={str(folder / INDEX)!r} names {name!r}, which lies outside its folder")
    return dict(mapping)


def read_shards(folder: Path) -> list[Shard]:
    """The headers of all weight files of ``folder``.

    Raises:
        ConfigError: absent or truncated files, or a tensor that the index promises and its file lacks.
    """
    shards = [read_shard(folder / name) for name in shard_names(folder)]
    if (folder / INDEX).is_file():
        held = {(shard.path.name, entry.name) for shard in shards for entry in shard.entries}
        for tensor, name in weight_map(folder).items():
            if (name, tensor) not in held:
                raise ConfigError(
                    f"folder={str(folder)!r}: {INDEX} says that {tensor!r} is in {name!r}, but it is not there"
                )
    return shards


def read_shard(path: Path) -> Shard:
    """The header of one safetensors file, checked against the length of the file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise _truncated(path, f"its header should take {length} bytes, the file has {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        metadata = header.pop("__metadata__", None) or {}
        entries = [_entry(name, item, 8 + length) for name, item in header.items()]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise _truncated(path, f"its header cannot be read: {error}") from error
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    for entry in entries:
        if entry.end - entry.begin != math.prod(entry.shape) * entry.dtype.itemsize:
            raise _truncated(path, f"{entry.name!r} of shape {entry.shape} does not take its bytes")
    end = max((entry.end for entry in entries), default=8 + length)
    if end != size:
        raise _truncated(path, f"its tensors should end at byte {end}, the file has {size}")
    return Shard(path, tuple(entries), metadata, hashlib.sha256(prefix + raw).hexdigest(), size)


def _entry(name: str, item: dict[str, Any], start: int) -> Entry:
    if item["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has dtype {item['dtype']!r}")
    begin, end = item["data_offsets"]
    return Entry(name, DTYPES[item["dtype"]], tuple(item["shape"]), start + begin, start + end)


def _truncated(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"file={os.fspath(path)!r} is truncated or damaged: {reason}; copy or download it again")

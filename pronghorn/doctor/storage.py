"""Disk space where models and runs go, and shared memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from .base import Check, gib

_GIB = 1024**3
_ROOMY = 40 * _GIB  # an 8B model in 16 bits is 16 GB: once in the cache, once merged, with room for checkpoints
_LEAST = 1 * _GIB
_SHM_ROOMY = 1 * _GIB
_SHM = Path("/dev/shm")


def disk() -> list[Check]:
    """Free space and the right to write, in the hub's cache and in the working folder."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return [_folder("disk: hub cache", Path(HF_HUB_CACHE)), _folder("disk: here", Path.cwd())]


def shared_memory() -> list[Check]:
    """The size of /dev/shm, which data loader workers use; 64 MiB is what a container gets unless told."""
    if not _SHM.is_dir():
        return []
    usage = shutil.disk_usage(_SHM)
    detail = f"{gib(usage.free)} of {gib(usage.total)} free"
    if usage.free >= _SHM_ROOMY:
        return [Check("/dev/shm", "ok", detail)]
    remedy = "docker run --shm-size=8g ... (or keep dataloader_num_workers=0)"
    return [Check("/dev/shm", "warn", f"{detail}; data loader workers may crash", remedy)]


def _folder(name: str, folder: Path) -> Check:
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{gib(free)} free at {folder}"
    elsewhere = "export HF_HOME=/a/larger/disk" if "cache" in name else "run from a folder on a larger disk"
    if not os.access(existing, os.W_OK):
        return Check(name, "warn", f"{detail}, not writable", elsewhere.replace("a/larger/disk", "a/writable/folder"))
    if free < _LEAST:
        return Check(name, "fail", f"{detail}: nothing can be saved", elsewhere)
    if free < _ROOMY:
        return Check(name, "warn", f"{detail}; an 8B model takes 16 GB, and 16 more merged", elsewhere)
    return Check(name, "ok", detail)

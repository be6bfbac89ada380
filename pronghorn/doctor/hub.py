"""The model hub, or a cache in its place."""

from __future__ import annotations

from pathlib import Path

from .base import Check, ProbeError, probe

_PROBE_TIMEOUT_S = 10.0  # the request itself has 3 s; a name server that does not answer is not bound by that


def hub() -> list[Check]:
    """Whether the hub answers; if not, or where HF_HUB_OFFLINE is set, which models the cache holds."""
    from huggingface_hub.constants import ENDPOINT, HF_HUB_CACHE, HF_HUB_OFFLINE

    models = cached_models(Path(HF_HUB_CACHE))
    held = f"{len(models)} in {HF_HUB_CACHE}: {_some(models)}" if models else f"none in {HF_HUB_CACHE}"
    cache = Check("cached models", "ok", held)
    nothing = "pass a model folder's path"
    if HF_HUB_OFFLINE:
        if models:
            return [Check("hub", "ok", "HF_HUB_OFFLINE is set: only the cache is used"), cache]
        detail = "HF_HUB_OFFLINE is set and the cache is empty: only model folders load (the quickstart needs no hub)"
        return [Check("hub", "warn", detail, f"unset HF_HUB_OFFLINE, or {nothing}")]
    try:
        status = int(probe("hub", timeout_s=_PROBE_TIMEOUT_S)["status"])
    except ProbeError as error:
        reason = f"{ENDPOINT} does not answer ({error})"
    else:
        if status < 400:
            return [Check("hub", "ok", f"{ENDPOINT} answers"), cache]
        reason = f"{ENDPOINT} answers with status {status}"
    if models:
        return [Check("hub", "warn", f"{reason}; the cache stands in", "export HF_HUB_OFFLINE=1"), cache]
    detail = f"{reason} and {HF_HUB_CACHE} holds no model; the quickstart needs neither"
    return [Check("hub", "warn", detail, f"export HF_ENDPOINT=<mirror>, or {nothing}")]


def cached_models(cache: Path) -> list[str]:
    """Names of the models with at least one snapshot in the hub cache, sorted."""
    if not cache.is_dir():
        return []
    folders = [folder for folder in cache.glob("models--*") if any((folder / "snapshots").glob("*"))]
    return sorted(folder.name.removeprefix("models--").replace("--", "/") for folder in folders)


def _some(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

"""From a model's name to a local folder: a folder as it is, or a hub repository's snapshot."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..config.errors import ConfigError
from .shards import shard_names

_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*(/[\w.-]+)?$")
_SMALL_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*"]
_ELSEWHERE = ["original/*", "onnx/*", "*.gguf", "runs/*"]


@dataclass(frozen=True)
class Located:
    """A model's files on this machine.

    Attributes:
        name: what the user asked for.
        folder: where the files are.
        revision: the hub commit, None for a plain folder.
    """

    name: str
    folder: Path
    revision: str | None


def locate(
    name: str,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
    code: bool = False,
) -> Located:
    """Find ``name`` with its configuration and tokenizer, but not yet its weights.

    Args:
        name: a folder, or a hub repository (``owner/name``).
        token, revision, local_files_only: as in ``huggingface_hub.snapshot_download``.
        code: fetch Python files too (``trust_remote_code``).

    Raises:
        ConfigError: an absent folder, or a repository that cannot be had.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if revision is not None:
            raise ConfigError(f"revision={revision!r} has no meaning for the folder {name!r}; leave it out")
        return Located(name, path.resolve(), None)
    if path.exists():
        raise ConfigError(f"model_name={name!r} is a file; give the folder that holds config.json and the weights")
    if not _HUB_NAME.match(name):
        raise ConfigError(f"model_name={name!r}: there is no such folder, and it is no hub name (owner/name)")
    patterns = [*_SMALL_FILES, "*.py"] if code else _SMALL_FILES
    folder = _download(name, patterns, token=token, revision=revision, local_files_only=local_files_only)
    return Located(name, folder, folder.name if folder.parent.name == "snapshots" else None)


def fetch_weights(located: Located, *, token: str | bool | None = None, local_files_only: bool = False) -> None:
    """Download the safetensors files of a hub model into its snapshot; a folder needs nothing."""
    if located.revision is None:
        return
    names = shard_names(located.folder, must_exist=False)
    if all((located.folder / name).is_file() for name in names):
        return
    _download(located.name, names, token=token, revision=located.revision, local_files_only=local_files_only)


def _download(name: str, patterns: list[str], **options: Any) -> Path:
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=_ELSEWHERE, **options))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"model_name={name!r} is no folder here, and could not be had from the hub ({type(error).__name__}: "
            f"{reason}); check the name, the network, and for a gated model pass token="
        ) from error

"""``push_to_hub_merged``: the same folder, uploaded."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch import nn

from .save import save_merged


def push_to_hub_merged(
    model: nn.Module,
    repo_id: str,
    tokenizer: Any,
    save_method: str = "merged_16bit",
    token: str | bool | None = None,
    private: bool | None = None,
    base: str | None = None,
    dequantize_base: bool = False,
) -> str:
    """Merge as ``save_pretrained_merged`` does and upload the folder in one commit.

    Args:
        repo_id: ``owner/name``; made if it does not exist.
        token: a hub token; None uses the one logged in.
        private: whether a new repository is private; None takes the account's default.

    Returns:
        The address of the commit.
    """
    with tempfile.TemporaryDirectory(prefix="pronghorn-") as scratch:
        folder = Path(scratch) / "model"
        save_merged(model, tokenizer, folder, save_method, base=base, dequantize_base=dequantize_base)
        api = HfApi(token=token)
        created = api.create_repo(repo_id, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=created.repo_id, folder_path=folder, commit_message=f"Upload {save_method} model from Pronghorn"
        )
    return str(commit)

"""What goes beside the weights: config, generation config, the model card, and the record of how it was made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pronghorn

from ..models import Source

RECORD = "pronghorn_export.json"


def write_config(original: Path, folder: Path, **changed: Any) -> None:
    """config.json as the original has it, without its quantization, with ``changed`` on top."""
    config = json.loads((original / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)
    config |= changed
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def write_generation_config(original: Path, folder: Path, model: Any, pad_token_id: int | None) -> None:
    """generation_config.json as the original has it (all its end-of-sequence ids), with the pad token that was used."""
    path = original / "generation_config.json"
    if path.is_file():
        settings = json.loads(path.read_text(encoding="utf-8"))
    else:
        settings = model.generation_config.to_diff_dict()
    if pad_token_id is not None:
        settings["pad_token_id"] = pad_token_id
    text = json.dumps(settings, indent=2, sort_keys=True, default=str)
    (folder / "generation_config.json").write_text(text + "\n", encoding="utf-8")


def write_card(folder: Path, source: Source, method: str, adapter: str, note: str) -> None:
    """README.md with the hub's front matter: the base model and revision, the adapter, how the two became one."""
    how = {
        "merged_16bit": "merged in float32 into the 16-bit weights and rounded once",
        "merged_4bit": "merged in float32 into the 16-bit weights and quantized again to NF4 (bitsandbytes)",
        "lora": "saved alone, for PEFT",
    }[method]
    base = f"base_model: {source.name}\n" if source.revision is not None else ""
    library = "peft" if method == "lora" else "transformers"
    revision = f" at revision `{source.revision}`" if source.revision else ""
    lines = [
        "---", f"{base}library_name: {library}", "pipeline_tag: text-generation", "tags:", "- pronghorn", "---", "",
        f"# {Path(source.name).name}, fine-tuned with Pronghorn", "",
        f"- Base model: `{source.name}`{revision}.", f"- Training: {adapter}.", f"- Weights: {how}.",
    ]  # fmt: skip
    if note:
        lines.append(f"- {note}")
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_record(folder: Path, source: Source, method: str, adapter: str, note: str) -> None:
    """The record of the export, machine-readable; it also marks the folder as one that a new export may replace."""
    record = {
        "pronghorn": pronghorn.__version__,
        "save_method": method,
        "source": {"name": source.name, "revision": source.revision, "files": source.shards},
        "training": adapter,
        "note": note,
        "files": sorted({*(path.name for path in folder.iterdir()), RECORD}),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def is_export(folder: Path) -> bool:
    """Whether ``folder`` holds an export of Pronghorn's and nothing else."""
    path = folder / RECORD
    if not path.is_file():
        return False
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
        return False
    return {entry.name for entry in folder.iterdir()} <= set(files)

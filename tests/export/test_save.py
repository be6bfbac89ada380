"""Export folders: replaced only by their own kind, whole or absent; the adapter alone; the upload."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from pronghorn.config.errors import ConfigError
from pronghorn.config.load import LoadConfig
from pronghorn.export import hub, push_to_hub_merged, save, save_merged
from pronghorn.loader import from_pretrained, get_peft_model
from tests.helpers import perturb, relative_error, tiny_llama


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Any, Any]:
    model, tokenizer = from_pretrained(LoadConfig(str(tiny_llama(tmp_path, max_shard_size="100KB"))))
    model = get_peft_model(model, r=4)
    perturb(model)
    return model, tokenizer


def test_an_earlier_export_is_replaced_and_nothing_else_is(pair: tuple[Any, Any], tmp_path: Path) -> None:
    target = tmp_path / "merged"
    save_merged(*pair, target)
    first = {p.name: p.read_bytes() for p in target.glob("*.safetensors")}
    perturb(pair[0])
    save_merged(*pair, target)
    assert any(p.read_bytes() != first[p.name] for p in target.glob("*.safetensors"))
    (target / "notes.txt").write_text("mine")
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    with pytest.raises(ConfigError, match="already holds other files"):
        save_merged(*pair, target)
    with pytest.raises(ConfigError, match="already holds other files"):
        save_merged(*pair, tmp_path / "tiny-llama")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        save_merged(*pair, tmp_path / "file")
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    (tmp_path / "empty").mkdir()
    save_merged(*pair, tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()


def test_an_interrupted_export_leaves_the_earlier_one(
    pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "merged"
    save_merged(*pair, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    listed = sorted(os.listdir(tmp_path))
    perturb(pair[0])

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(save.card, "write_card", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_merged(*pair, target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert sorted(os.listdir(tmp_path)) == listed


def test_the_adapter_alone_is_plain_peft(pair: tuple[Any, Any], tmp_path: Path) -> None:
    save_merged(*pair, tmp_path / "adapter", save_method="lora")
    save_merged(*pair, tmp_path / "adapter", save_method="lora")
    assert "library_name: peft" in (tmp_path / "adapter" / "README.md").read_text()
    plain = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "tiny-llama"), tmp_path / "adapter"
    )
    got = plain.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    want = pair[0].base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight
    assert torch.equal(got, want)


def test_a_model_without_training_saves_as_it_was(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16)
    model, tokenizer = from_pretrained(LoadConfig(str(folder)))
    save_merged(model, tokenizer, tmp_path / "copy")
    ids = torch.arange(4, 20).unsqueeze(0)
    logits = [
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.float32)(ids).logits for f in (folder, tmp_path / "copy")
    ]
    assert relative_error(logits[0], logits[1]) == 0


def test_an_unknown_method_is_refused(pair: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'merged_16bit'"):
        save_merged(*pair, tmp_path / "x", save_method="merged_16bits")


def test_the_upload_is_the_folder(pair: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []

    class FakeApi:
        def __init__(self, token: Any = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
            calls.append(("create", (repo_id, private, exist_ok)))
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> str:
            calls.append(("upload", (repo_id, sorted(p.name for p in folder_path.iterdir()))))
            return "https://hub/commit/1"

    monkeypatch.setattr(hub, "HfApi", FakeApi)
    address = push_to_hub_merged(pair[0], "tiny", pair[1], token="t", private=True)
    assert address == "https://hub/commit/1"
    save_merged(*pair, tmp_path / "merged")
    assert calls == [
        ("token", "t"), ("create", ("tiny", True, True)),
        ("upload", ("me/tiny", sorted(p.name for p in (tmp_path / "merged").iterdir()))),
    ]  # fmt: skip

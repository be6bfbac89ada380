"""Whole checkpoints or none: interrupted saves, rotation, what is offered for resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from pronghorn.config.errors import ConfigError
from pronghorn.grpo import checkpoint as checkpoints
from pronghorn.grpo.checkpoint import MANIFEST, clean, is_whole, rotate, to_resume, whole_checkpoints, writing
from tests.grpo.support import adapter_weights, llama, pronghorn_model, trainer


def _make(output_dir: Path, step: int, text: str = "x") -> Path:
    final = output_dir / f"checkpoint-{step}"
    with writing(final) as folder:
        (folder / "weights").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "more").write_text("y")
    return final


def test_a_save_that_fails_leaves_nothing_and_the_old_one(tmp_path: Path) -> None:
    old = _make(tmp_path, 1)

    def interrupted() -> None:
        with writing(tmp_path / "checkpoint-2") as folder:
            (folder / "weights").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == [old.name] and is_whole(old)


def test_replacing_a_checkpoint_survives_a_crash_between_the_renames(tmp_path: Path) -> None:
    _make(tmp_path, 1, "first")
    again = _make(tmp_path, 1, "second")
    assert (again / "weights").read_text() == "second"
    again.rename(tmp_path / ".replaced-checkpoint-1")  # crashed after the first rename
    (tmp_path / ".unfinished-checkpoint-1").mkdir()
    clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-1"] and is_whole(again)


@pytest.mark.parametrize("damage", ["no manifest", "cut short", "file gone", "torn manifest"])
def test_a_partial_folder_is_never_offered(tmp_path: Path, damage: str) -> None:
    good, bad = _make(tmp_path, 3), _make(tmp_path, 12)
    assert whole_checkpoints(tmp_path) == [good, bad]
    if damage == "no manifest":
        (bad / MANIFEST).unlink()
    elif damage == "cut short":
        (bad / "weights").write_text("")
    elif damage == "file gone":
        (bad / "sub" / "more").unlink()
    else:
        (bad / MANIFEST).write_text('{"files"')
    assert whole_checkpoints(tmp_path) == [good]
    assert to_resume(str(tmp_path), True, overwrite=False) == good
    with pytest.raises(ConfigError, match="checkpoint-12' is no whole checkpoint: .*checkpoint-3"):
        to_resume(str(tmp_path), str(bad), overwrite=False)


def test_rotation_counts_whole_ones_and_keeps_newest_and_best(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        _make(tmp_path, step)
    (tmp_path / "checkpoint-99").mkdir()  # partial: neither counted nor removed
    rotate(tmp_path, 2, keep=str(tmp_path / "checkpoint-1"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-10", "checkpoint-99"]
    rotate(tmp_path, None, keep=None)
    assert len(whole_checkpoints(tmp_path)) == 2


def test_a_folder_with_a_run_in_it_is_refused_unless_resume_or_overwrite_is_asked(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    made.train()
    assert is_whole(tmp_path / "checkpoint-1")
    fresh = trainer(tmp_path, max_steps=1)
    with pytest.raises(ConfigError, match="holds 1 whole checkpoint.*resume_from_checkpoint=True.*another output_dir"):
        fresh.train()
    assert fresh.sampling.engine.calls == []  # refused before any work
    with pytest.raises(ConfigError, match="is at step 1 and max_steps=1: nothing is left"):
        fresh.train(resume_from_checkpoint=True)
    trainer(tmp_path, max_steps=1, overwrite_output_dir=True).train()
    assert whole_checkpoints(tmp_path) == []
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        trainer(tmp_path, max_steps=1).train(resume_from_checkpoint=True)


def test_a_crash_while_saving_leaves_the_last_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)
    save = type(made)._save_rng_state

    def broken(self: Any, folder: str) -> None:
        if "checkpoint-2" in folder:
            raise OSError("No space left on device")
        save(self, folder)

    monkeypatch.setattr(type(made), "_save_rng_state", broken)
    with pytest.raises(OSError, match="No space"):
        made.train()
    assert [p.name for p in whole_checkpoints(tmp_path)] == ["checkpoint-1"]
    assert not list(tmp_path.glob(".unfinished*"))
    monkeypatch.undo()
    again = trainer(tmp_path, max_steps=3, save_strategy="steps", save_steps=1, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert [p.name for p in whole_checkpoints(tmp_path)] == ["checkpoint-3"]


def test_the_old_one_goes_only_when_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    real = checkpoints._remove

    def watch(folder: Path) -> None:
        seen.append([p.name for p in whole_checkpoints(tmp_path)])
        real(folder)

    monkeypatch.setattr(checkpoints, "_remove", watch)
    trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, save_total_limit=1).train()
    assert seen == [["checkpoint-1", "checkpoint-2"]]


def test_a_checkpoint_is_a_plain_peft_adapter(tmp_path: Path) -> None:
    made = trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    made.train()
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "checkpoint-1"))
    expected = adapter_weights(made.model)
    assert {n: w.dtype for n, w in adapter_weights(loaded).items()} == dict.fromkeys(expected, torch.float32)
    for name, weight in adapter_weights(loaded).items():
        assert torch.equal(weight, expected[name]), name
    state = json.loads((tmp_path / "checkpoint-1" / "trainer_state.json").read_text())
    assert state["global_step"] == 1


def test_settings_that_move_the_cursor_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ConfigError, match="written with seed=3, now it is 4"):
        trainer(tmp_path, max_steps=2, seed=4).train(resume_from_checkpoint=True)


def test_an_adapter_of_another_shape_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    other = pronghorn_model(num_hidden_layers=3)
    with pytest.raises((ConfigError, RuntimeError), match="does not fit this model's adapter: missing"):
        trainer(tmp_path, other, max_steps=2).train(resume_from_checkpoint=True)

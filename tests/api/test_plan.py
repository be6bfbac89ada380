"""``pronghorn.plan`` and ``pronghorn plan``: a step foreseen from a config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import pronghorn
from pronghorn import ConfigError
from pronghorn.cli.main import app
from tests.helpers import tiny_llama
from tests.models.plan.support import config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that holds the config.json of an 8B Llama and nothing else."""
    path = tmp_path_factory.mktemp("8b")
    config(max_position_embeddings=131072).save_pretrained(path)
    return str(path)


def test_from_a_folder_a_file_and_a_config_alike(folder: str) -> None:
    settings: dict[str, Any] = {"batch_size": 2, "seq_length": 2048, "gpu": "H200", "r": 32}
    plans = [pronghorn.plan(model, **settings) for model in (folder, Path(folder) / "config.json", config())]
    assert plans[0] == plans[1] == plans[2]
    assert plans[0].tokens == 4096 and len(plans[0].layers) == 32 and plans[0].mode == "auto"
    assert 5.6 < plans[0].peak_bytes / 2**30 < 139.8 and 0.1 < plans[0].step_seconds < 1


def test_from_a_live_model_whose_own_adapters_count(tmp_path: Path) -> None:
    model, _ = pronghorn.FastLanguageModel.from_pretrained(str(tiny_llama(tmp_path)), max_seq_length=64)
    small = pronghorn.FastLanguageModel.get_peft_model(model, r=2)
    live = pronghorn.plan(small, batch_size=2, seq_length=64, gpu="L4", r=64)
    assert len(live.layers) == 2 and live.estimated
    assert live.peak_bytes < pronghorn.plan(small.config, batch_size=2, seq_length=64, gpu="L4", r=64).peak_bytes


def test_memory_that_is_lent_and_modes(folder: str) -> None:
    free, lent = (pronghorn.plan(folder, batch_size=8, gpu="H200", memory_gb=gb) for gb in (None, 20))
    assert lent.peak_bytes < 20 * 2**30 < free.peak_bytes and lent.step_seconds > free.step_seconds
    assert lent.total_bytes == 20 * 2**30
    off, memory = (
        pronghorn.plan(folder, batch_size=8, gpu="H200", use_gradient_checkpointing=m) for m in (False, True)
    )
    assert memory.mode == "memory" and off.mode == "off" and memory.peak_bytes < off.peak_bytes
    assert pronghorn.plan(folder, gpu="H200", memory_gb=8, host_memory_gb=0).host_bytes == 0


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"gpu": "H300"}, ["gpu='H300'", "did you mean 'H200'"]),
        ({"gpu": "H200", "batch_size": 0}, ["batch_size=0", "1 or more"]),
        ({"gpu": "H200", "seq_length": 1.5}, ["seq_length=1.5", "whole number"]),
        ({"gpu": "H200", "memory_gb": -1}, ["memory_gb=-1", "GB"]),
        ({"gpu": "H200", "batchsize": 2}, ["'batchsize'", "'batch_size'"]),
        ({"gpu": "H200", "use_gradient_checkpointing": "on"}, ["use_gradient_checkpointing='on'", "'auto'"]),
        ({"gpu": "H200", "full_finetuning": True}, ["full_finetuning=True", "load_in_4bit=False"]),
        ({"gpu": "4090", "batch_size": 64, "seq_length": 65536}, ["batch_size=64 x seq_length=65536", "lower batch"]),
        ({"gpu": "4090", "seq_length": 2_000_000}, ["seq_length=2000000", "lower seq_length to"]),
        ({"gpu": "T4", "load_in_4bit": False}, ["T4", "give load_in_4bit=True"]),
        ({"gpu": "4090", "batch_size": 8, "use_gradient_checkpointing": "off"}, ["'off'", "'auto' or 'memory'"]),
    ],
)
def test_errors_name_field_value_and_remedy(folder: str, settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        pronghorn.plan(folder, **settings)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("asked", [{"batch_size": 64, "seq_length": 65536}, {"seq_length": 2_000_000}])
def test_what_the_error_says_to_lower_to_fits(folder: str, asked: dict[str, int]) -> None:
    with pytest.raises(ConfigError) as caught:
        pronghorn.plan(folder, gpu="4090", **asked)
    remedy = str(caught.value).rpartition("lower ")[2].split(" to ")
    lowered = {**asked, remedy[0]: int(remedy[1])}
    assert pronghorn.plan(folder, gpu="4090", **lowered).fits
    with pytest.raises(ConfigError):
        pronghorn.plan(folder, gpu="4090", **{**lowered, remedy[0]: lowered[remedy[0]] + 64})


def test_something_that_is_no_model(folder: str) -> None:
    with pytest.raises(ConfigError, match="model=int"):
        pronghorn.plan(3, gpu="H200")
    with pytest.raises(ConfigError, match="no such folder"):
        pronghorn.plan(folder + "/absent/", gpu="H200")


def test_the_command_prints_the_three_modes(folder: str) -> None:
    arguments = ["plan", folder, "--batch-size", "2", "--gpu", "H200", "--r", "32"]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert [line.split()[1] for line in result.output.splitlines() if line.startswith("│")][:1] == ["auto"]
    assert all(f"│ {mode}" in result.output for mode in ("auto", "memory", "off"))
    failed = CliRunner().invoke(app, ["plan", folder, "--gpu", "H300"])
    assert failed.exit_code == 2 and "did you mean 'H200'" in failed.output


def test_measured_cases_are_compared_by_mode_batch_and_base() -> None:
    from benchmarks.plan import compare

    measured = {"peak_gb": 10.0, "step_s": 0.5}
    cases = ["sft/nf4/2x2048/same-memory", "sft/bf16/1x4096/free-memory", "sft/nf4/2x2048/elsewhere"]
    rows = [
        {"case": case, "impl": impl, "metric": metric, "value": value}
        for case in cases for impl in ("pronghorn", "hf") for metric, value in measured.items()
    ]  # fmt: skip
    found = list(compare({"gpu": "NVIDIA H200", "rows": rows}, config()))
    assert [(row.case, row.figure) for row in found] == [(c, f) for c in cases[:2] for f in ("peak_gb", "step_s")]
    plan = pronghorn.plan(config(), batch_size=2, gpu="H200", r=32, use_gradient_checkpointing="memory")
    assert found[0].foreseen == plan.peak_bytes / 2**30 and found[1].off == plan.step_seconds / 0.5 - 1
    assert found[2].foreseen > 20  # the base in 16 bits, everything kept

"""What the machine is said to be, and how a GPU is chosen."""

from __future__ import annotations

import os

import pytest
import torch

from pronghorn import env
from pronghorn.config.errors import ConfigError
from pronghorn.env import Machine, Settings, is_bfloat16_supported, machine, select_device, visible_device

GIB = 1024**3
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")


@without_gpu
def test_the_cpu_is_described_and_has_no_bf16() -> None:
    here = machine()
    assert here.device == torch.device("cpu") and here.capability is None
    assert 0 < here.free_bytes <= here.total_bytes
    assert here.total_bytes == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert "cpu" in here.describe() and "float32" in here.describe() and "\n" not in here.describe()
    assert is_bfloat16_supported() is False


@without_gpu
def test_asking_for_a_gpu_that_is_not_there_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"device=0: no GPU is visible.*pronghorn doctor"):
        machine(0)
    monkeypatch.setenv("PRONGHORN_DEVICE", "1")
    with pytest.raises(ConfigError, match="device=1: no GPU is visible"):
        machine()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(ConfigError, match="device=1: torch .* sees no such GPU"):
        select_device(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7", "a refused choice leaves the variable as it was"


class FakeCuda:
    """Two GPUs: a Hopper and a Turing."""

    names = ("NVIDIA H200", "Tesla T4")
    capabilities = ((9, 0), (7, 5))

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((10 + index) * GIB, 16 * GIB))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: self.capabilities[index])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: self.names[index])


def test_a_gpu_is_described_by_name_and_bf16_follows_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda().install(monkeypatch)
    monkeypatch.delenv("PRONGHORN_DEVICE", raising=False)
    hopper = Machine(torch.device("cuda", 0), "NVIDIA H200", (9, 0), 16 * GIB, 10 * GIB, bf16=True)
    assert machine() == hopper
    assert hopper.describe() == "NVIDIA H200 (cuda:0, sm_90, 10.0 of 16.0 GiB free, bf16)"
    assert machine(1).describe() == "Tesla T4 (cuda:1, sm_75, 11.0 of 16.0 GiB free, fp16, no bf16)"
    assert is_bfloat16_supported() is True
    monkeypatch.setenv("PRONGHORN_DEVICE", "1")
    assert is_bfloat16_supported() is False
    with pytest.raises(ConfigError, match=r"device=2: 2 GPU\(s\) visible; give an index from 0 to 1"):
        machine(2)


@pytest.mark.parametrize(
    ("before", "index", "after"),
    [(None, 0, "0"), (None, 3, "3"), ("2,5", 1, "5"), (" GPU-aa , GPU-bb ", 0, "GPU-aa"), ("0,", 0, "0")],
)
def test_visible_device(monkeypatch: pytest.MonkeyPatch, before: str | None, index: int, after: str) -> None:
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    assert visible_device(index) == after


@pytest.mark.parametrize(("before", "index"), [("2,5", 2), ("", 0), ("1", -1), (None, -1)])
def test_visible_device_refuses_an_index_outside_the_list(
    monkeypatch: pytest.MonkeyPatch, before: str | None, index: int
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if before is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    with pytest.raises(ConfigError, match="CUDA_VISIBLE_DEVICES"):
        visible_device(index)


def test_select_device_leaves_one_gpu_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(os.environ["CUDA_VISIBLE_DEVICES"].split(",")))
    select_device(1)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7"
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(ConfigError, match="already running"):
        select_device(0)


def test_settings_are_typed_and_unknown_names_are_refused() -> None:
    assert Settings.from_environ({}) == Settings(device=None)
    assert Settings.from_environ({"PRONGHORN_DEVICE": " 3 ", "OTHER": "x"}) == Settings(device=3)
    assert Settings.from_environ({"PRONGHORN_DEVICE": ""}) == Settings(device=None)
    with pytest.raises(ConfigError, match="'PRONGHORN_DEVCE'; did you mean 'PRONGHORN_DEVICE'"):
        Settings.from_environ({"PRONGHORN_DEVCE": "0"})
    for wrong in ("cuda:0", "-1", "1.5"):
        with pytest.raises(ConfigError, match="is no GPU index"):
            Settings.from_environ({"PRONGHORN_DEVICE": wrong})


def test_no_other_file_reads_pronghorn_variables() -> None:
    """env.py is their one home."""
    from pathlib import Path

    package = Path(env.__file__).parent
    for path in package.rglob("*.py"):
        if path.name != "env.py":
            source = path.read_text()
            assert 'environ["PRONGHORN_' not in source and 'environ.get("PRONGHORN_' not in source, path

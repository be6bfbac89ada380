"""The hub or a cache in its place, and disk space: warnings, not failures, while something still works."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path
from typing import Any

import huggingface_hub.constants as constants
import pytest

from pronghorn.doctor import hub, storage
from pronghorn.doctor.base import ProbeError

Usage = namedtuple("Usage", "total used free")
GIB = 1024**3


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path


def add_model(cache: Path) -> None:
    (cache / "models--meta-llama--Llama-3.1-8B" / "snapshots" / "0e9e39f").mkdir(parents=True)
    (cache / "models--half--fetched").mkdir()  # no snapshot: not usable


def statuses(monkeypatch: pytest.MonkeyPatch, reply: int | Exception) -> dict[str, str]:
    def probe(name: str, timeout_s: float) -> dict[str, Any]:
        if isinstance(reply, Exception):
            raise reply
        return {"endpoint": "e", "status": reply}

    monkeypatch.setattr(hub, "probe", probe)
    return {check.name: check.status for check in hub.hub()}


def test_reachable(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(monkeypatch, 200) == {"hub": "ok", "cached models": "ok"}


def test_unreachable_or_refusing_warns(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert statuses(monkeypatch, ProbeError("ConnectError: no route")) == {"hub": "warn"}
    assert statuses(monkeypatch, 503) == {"hub": "warn"}
    add_model(cache)
    assert hub.cached_models(cache) == ["meta-llama/Llama-3.1-8B"]
    assert statuses(monkeypatch, ProbeError("x")) == {"hub": "warn", "cached models": "ok"}
    assert hub.hub()[0].remedy == "export HF_HUB_OFFLINE=1"


def test_offline_asks_nothing_of_the_network(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "probe", lambda *a, **k: pytest.fail("the hub was asked"))
    assert [check.status for check in hub.hub()] == ["warn"]
    add_model(cache)
    assert [check.status for check in hub.hub()] == ["ok", "ok"]


@pytest.mark.parametrize(("free", "status"), [(100 * GIB, "ok"), (10 * GIB, "warn"), (GIB // 2, "fail")])
def test_disk(cache: Path, monkeypatch: pytest.MonkeyPatch, free: int, status: str) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache / "not" / "there" / "yet"))
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Usage(200 * GIB, 0, free))
    assert [check.status for check in storage.disk()] == [status, status]


def test_shared_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "_SHM", tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: Usage(64 * 2**20, 0, 64 * 2**20))
    (check,) = storage.shared_memory()
    assert check.status == "warn" and "--shm-size" in (check.remedy or "")
    monkeypatch.setattr(storage, "_SHM", tmp_path / "absent")
    assert storage.shared_memory() == []

"""The cache of compiled CUDA C++: written once, whole, whoever asks."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from pronghorn.kernels import cuda_source


def test_threads_that_ask_for_the_same_compile_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Mapping[str, int]]] = []

    def slow(source: str, defines: Mapping[str, int], capability: tuple[int, int]) -> bytes:
        asked.append((source, dict(defines)))
        time.sleep(0.05)
        return f"{source} {sorted(defines.items())} {capability}".encode()

    monkeypatch.setattr(cuda_source, "compile_cubin", slow)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found: list[bytes] = []
    kinds = [{"R": 1}, {"R": 2}] * 4
    threads = [
        threading.Thread(target=lambda d=d: found.append(cuda_source.cached_cubin("text", d, (9, 0)))) for d in kinds
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(defines["R"] for _, defines in asked) == [1, 2]
    assert len(found) == 8 and len(set(found)) == 2
    assert len(list((tmp_path / "pronghorn").iterdir())) == 2
    assert cuda_source.cached_cubin("text", {"R": 1}, (8, 0)) not in found

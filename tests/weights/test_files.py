"""Reading, hashing and writing safetensors files against the safetensors library."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pronghorn.config.errors import ConfigError
from pronghorn.weights.folder import whole_folder
from pronghorn.weights.shards import DTYPES, read_shard
from pronghorn.weights.stream import Fingerprints, fingerprint, stream
from pronghorn.weights.writer import Planned, write_shard


def some(dtypes: list[torch.dtype]) -> dict[str, torch.Tensor]:
    tensors = {f"t{i}": (torch.randn(3, i + 1) * 9).to(dtype) for i, dtype in enumerate(dtypes)}
    return {**tensors, "empty": torch.zeros(0, 4), "scalar": torch.tensor(2.5)}


def same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bytes(a.reshape(-1).view(torch.uint8)) == bytes(
        b.reshape(-1).view(torch.uint8)
    )  # fmt: skip


def test_every_dtype_streams_and_is_written_as_safetensors_does(tmp_path: Path) -> None:
    tensors = some([d for d in DTYPES.values() if d != torch.bool])
    save_file(tensors, tmp_path / "a.safetensors", metadata={"format": "pt", "k": "v"})
    shard = read_shard(tmp_path / "a.safetensors")
    assert shard.metadata == {"format": "pt", "k": "v"}
    got = {entry.name: tensor for _, entry, tensor in stream([shard])}
    assert got.keys() == tensors.keys()
    assert all(same_bytes(got[name], tensors[name]) for name in tensors)
    plan = [Planned(name, t.dtype, tuple(t.shape)) for name, t in tensors.items()]
    write_shard(tmp_path / "b.safetensors", plan, tensors.values())
    again = load_file(tmp_path / "b.safetensors")
    assert all(same_bytes(again[name], tensors[name]) for name in tensors)
    assert read_shard(tmp_path / "b.safetensors").size == (tmp_path / "b.safetensors").stat().st_size


def test_the_writer_refuses_what_was_not_planned(tmp_path: Path) -> None:
    plan = [Planned("a", torch.float32, (2,))]
    with pytest.raises(ValueError, match="planned torch.float32"):
        write_shard(tmp_path / "x", plan, [torch.zeros(3)])
    with pytest.raises(ValueError, match="shorter|longer"):
        write_shard(tmp_path / "x", plan, [])


def test_fingerprints_depend_on_every_byte_and_not_on_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_file(some([torch.float32, torch.bfloat16]), path)
    first = fingerprint(path)
    monkeypatch.setattr("pronghorn.weights.stream.threads", lambda: 1)
    assert fingerprint(path) == first
    data = path.read_bytes()
    start = read_shard(path).entries[0].begin
    for position in range(start, len(data)):
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        assert fingerprint(path) != first
    path.write_bytes(data)
    assert fingerprint(path) == first


def test_a_reader_that_stops_early_leaves_no_thread(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({f"t{i}": torch.zeros(100) for i in range(50)}, path)
    before = threading.active_count()
    reading = stream([read_shard(path)], fingerprints=Fingerprints())
    next(reading)
    reading.close()
    assert threading.active_count() == before


def test_a_file_cut_while_it_is_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"t": torch.zeros(100)}, path)
    shard = read_shard(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match="being changed"):
        list(stream([shard]))


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"t": torch.zeros(4, 4)}, path)
    path.write_bytes(path.read_bytes().replace(b"[4,4]", b"[4,5]"))
    with pytest.raises(ConfigError, match="does not take its bytes"):
        read_shard(path)


def test_a_folder_is_whole_or_absent(tmp_path: Path) -> None:
    def never(folder: Path) -> bool:
        return False

    def half_written() -> None:
        with whole_folder(tmp_path / "a", never) as building:
            (building / "x").write_text("1")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half_written()
    assert list(tmp_path.iterdir()) == []
    with whole_folder(tmp_path / "deep" / "a", never) as building:
        (building / "x").write_text("1")
        assert not (tmp_path / "deep" / "a").exists()
    assert (tmp_path / "deep" / "a" / "x").read_text() == "1"
    with pytest.raises(ConfigError, match="already holds other files"), whole_folder(tmp_path / "deep" / "a", never):
        pass
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a"]

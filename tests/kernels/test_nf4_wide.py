"""Which rows, outputs and adapters the wide 4-bit product takes, and that its blocks fit."""

from __future__ import annotations

import pytest
import torch

from pronghorn.kernels import launch, nf4_matmul, nf4_wide_cuda
from pronghorn.kernels.nf4 import quantize_nf4
from pronghorn.kernels.nf4_matmul_cuda import HOPPER_SHARED
from pronghorn.kernels.nf4_wide_cuda import wide_tile_for
from pronghorn.quant.nf4 import NF4Tensor

GATE_UP = [14336, 14336]


def test_the_tile_is_for_rows_between_and_many_outputs() -> None:
    gate_up = [wide_tile_for(M, GATE_UP, 4096, [32, 32]) for M in (16, 17, 32, 33, 64, 65)]
    assert [tile and (tile.groups, tile.rows) for tile in gate_up] == [
        None, (16, 32), (16, 32), (16, 64), (16, 64), None,
    ]  # fmt: skip
    assert wide_tile_for(64, [4096], 4096, [32]) and not wide_tile_for(32, [4096], 4096, [32])
    assert wide_tile_for(64, [4096], 14336, [32]) and not wide_tile_for(32, [8192], 14336, [32]), "a long sum"


@pytest.mark.parametrize(
    "outputs", [GATE_UP, [4096], [4096, 1024, 1024], [17408, 17408], [57344], [33792], [6160], [16880, 16904]]
)
def test_all_processors_have_as_many_outputs(outputs: list[int]) -> None:
    tile = wide_tile_for(64, outputs, 4096, [32])
    assert tile is not None and 0 <= tile.idle < 4 and tile.groups % 4 == 0 and tile.groups <= 16

    def turns(per_block: int) -> int:
        return -(-sum(-(-o // per_block) for o in outputs) // 132)

    assert turns(tile.outputs) == turns(256), "no more turns than with the largest blocks"
    assert tile.outputs == 16 or turns(tile.outputs - 16) > turns(256), "and none could be smaller"


def test_an_8b_llamas_blocks_are_as_many_as_processors() -> None:
    for outputs, per_block, blocks in ((GATE_UP, 224, 128), ([4096], 32, 128), ([4096, 1024, 1024], 48, 130)):
        tile = wide_tile_for(64, outputs, 4096, [32])
        assert tile is not None and tile.outputs == per_block
        assert sum(-(-o // per_block) for o in outputs) == blocks


def test_adapters_have_one_rank_that_a_stage_holds() -> None:
    for ranks, taken in (([0, 0], True), ([0, 64], True), ([64, 64], True), ([16, 32], False), ([80, 80], False)):
        assert (wide_tile_for(64, GATE_UP, 4096, ranks) is not None) == taken


def test_a_block_fits_or_there_is_none() -> None:
    for K in (256, 4096, 8192, 16384, 28672):
        for nested in (True, False):
            for rows in (32, 64):
                tile = wide_tile_for(rows, [57344], K, [16], nested)
                assert tile is None or (tile.shared_bytes(K, nested) <= HOPPER_SHARED and tile.stages >= 3)
                assert tile is not None or K * (1 if nested else 4) > 8192


def test_weights_in_16_bits_begin_where_codes_are_slower(monkeypatch) -> None:
    codes, scales = quantize_nf4(torch.randn(16, 256))

    def member(outputs: int, rank: int) -> nf4_matmul.Member:
        weight = NF4Tensor(codes, scales, None, None, (outputs, 256))
        return nf4_matmul.Member(weight, torch.empty(outputs, rank), 0, None)

    assert nf4_matmul.rows_by_codes([member(28672, 32)]) == 32, "no copy engine"
    monkeypatch.setattr(launch, "has_copy_engine", lambda tensor: True)
    monkeypatch.setattr(nf4_wide_cuda, "processors_of", lambda device: 132)
    assert nf4_matmul.rows_by_codes([member(28672, 32)]) == nf4_matmul.rows_by_codes([member(34816, 32)]) == 64
    assert nf4_matmul.rows_by_codes([member(28672, 80)]) == 32
    monkeypatch.setattr(nf4_wide_cuda, "_codes_aligned", lambda members: False)
    assert nf4_matmul.rows_by_codes([member(28672, 32)]) == 32

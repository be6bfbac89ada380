"""The GPU side of the product with NF4 weights: launch configurations and the call of ``nf4_matmul.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from importlib.resources import files
from typing import NamedTuple

import torch

from pronghorn.kernels.cuda_source import CudaKernel, pointer
from pronghorn.kernels.launch import current_recording
from pronghorn.kernels.nf4_code import dynamic_code, nf4_code
from pronghorn.kernels.reference.nf4_matmul import Member

_P, _I = ctypes.c_void_p, ctypes.c_int


class _Member(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("codes", "scales", "nested", "offset", "levels", "b", "bias")),
        *((name, _I) for name in ("outputs", "column", "at", "rank")),
    )


class _Args(ctypes.Structure):
    _fields_ = (
        ("member", _Member * 3),
        *((name, _P) for name in ("x", "low", "y", "nf4")),
        *((name, _I) for name in ("members", "rows", "K", "x_stride", "low_stride", "y_stride")),
    )


STATIC_SHARED = 32768
"""Bytes of the table of levels, beside the dynamic shared memory of a block."""


SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""KiB of shared memory that a block can have, by compute capability; 99 on the others from 8.0 on."""

HOPPER_SHARED = SHARED[9, 0] * 1024


class Tile(NamedTuple):
    """A launch configuration: the macros of ``nf4_matmul.cu`` of the same names."""

    warps: int
    ring: bool
    tiles: int
    chunk: int
    stages: int
    blocks_per_sm: int

    @property
    def outputs(self) -> int:
        """Outputs of a block."""
        return 16 if self.ring else self.warps * 16

    def shared_bytes(self, K: int, nested: bool) -> int:
        """Dynamic shared memory of a block."""
        codes = self.warps * 16 * (self.chunk // 2 + 16)
        x = self.tiles * 8 * (self.chunk * 2 + 32)
        stages = self.stages * (codes if self.ring else codes + x)
        handed = self.warps * self.tiles * 512 if self.ring else 0
        return 1024 + self.outputs * (K // 64) * (1 if nested else 4) + stages + handed


def tile_for(M: int, outputs: int, K: int = 0, nested: bool = True, shared: int = HOPPER_SHARED) -> Tile | None:
    """The tile for M rows of K columns and so many outputs in blocks of ``shared`` bytes; None where none fits.

    Many outputs keep every multiprocessor busy with a warp for each 16 of them, and blocks of 8 warps read x once. Few
    outputs do not: there, the warps of a block share the work on the same 16. Where a GPU's blocks have less memory
    than Hopper's, first the stages get fewer, then smaller, then the warps fewer, then the rows.
    """
    tile = _wanted(M, outputs)
    while STATIC_SHARED + tile.shared_bytes(K, nested) > shared:
        if tile.stages > (1 if tile.ring else 2):
            tile = tile._replace(stages=tile.stages - 1)
        elif tile.chunk > 128 and (tile.ring or tile.tiles * 128 % (tile.warps * 32) == 0):
            tile = tile._replace(chunk=128)
        elif tile.warps > 1:
            tile = tile._replace(warps=tile.warps // 2)
        elif tile.tiles > 1:
            tile = tile._replace(tiles=tile.tiles // 2)
        else:
            return None
    return tile


def _wanted(M: int, outputs: int) -> Tile:
    """The tile on Hopper."""
    many = outputs >= 8192
    if M <= 8:
        return Tile(8, False, 1, 256, 3, 2) if many else Tile(4, True, 1, 256, 2, 3)
    if M <= 16:
        return Tile(8, False, 2, 128, 3, 2) if many else Tile(6, True, 2, 128, 2, 2)
    if M <= 32:
        if outputs > 4096:
            return Tile(8, False, 4, 128, 3, 2) if many else Tile(4, False, 4, 256, 3, 1)
        return Tile(4, True, 4, 128, 2, 2)
    return Tile(4, False, 8, 128, 3, 2) if many else Tile(4, False, 8, 256, 3, 1)


@lru_cache(maxsize=8)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block can have on ``device``, by the CUDA programming guide's table."""
    return SHARED.get(torch.cuda.get_device_capability(device), 99) * 1024


@lru_cache(maxsize=1)
def _source() -> str:
    return files("pronghorn.kernels").joinpath("nf4_matmul.cu").read_text()


def _defines(tile: Tile, nested: bool, rank16: int, half: bool, overlap: bool) -> dict[str, int]:
    return {
        "WARPS": tile.warps, "RING": int(tile.ring), "TILES": tile.tiles, "CHUNK": tile.chunk, "STAGES": tile.stages,
        "BLOCKS_PER_SM": tile.blocks_per_sm, "NESTED": int(nested), "RANK16": rank16, "F16": int(half),
        "OVERLAP": int(overlap),
    }  # fmt: skip


@lru_cache(maxsize=256)
def _kernel(
    tile: Tile, K: int, nested: bool, rank16: int, half: bool, overlap: bool, device: torch.device
) -> CudaKernel:
    defines = _defines(tile, nested, rank16, half, overlap)
    return CudaKernel(_source(), "nf4_matmul", defines, device, tile.shared_bytes(K, nested))


def nf4_matmul(
    x_MI: torch.Tensor,
    members: Sequence[Member],
    low_MR: torch.Tensor | None,
    out_MO: torch.Tensor,
    tile: Tile | None = None,
    overlap: bool = False,
) -> None:
    """As ``reference.nf4_matmul.nf4_matmul``.

    Args:
        tile: instead of :func:`tile_for`'s choice, for measurements.
        overlap: the kernel launched just before makes ``low_MR``, and nothing else that is read here: run beside it
            (on Hopper; elsewhere after it, as usual). It was launched as usual, or lets others begin only behind its
            own wait (:func:`pronghorn.kernels.launch.chained`): x is read before this one waits.
    """
    (M, K), device = x_MI.shape, x_MI.device
    if M == 0:
        return
    nested = members[0].weight.nested_absmax is not None
    tile = tile or tile_for(M, out_MO.shape[1], K, nested, shared_memory(device))
    if tile is None:
        raise ValueError(f"no tile for {K} inputs fits into {shared_memory(device)} bytes of shared memory")
    args = _Args(
        x=pointer(x_MI), low=pointer(low_MR), y=pointer(out_MO), nf4=pointer(nf4_code(device)),
        members=len(members), rows=M, K=K,
        x_stride=x_MI.stride(0), low_stride=0 if low_MR is None else low_MR.stride(0), y_stride=out_MO.stride(0),
    )  # fmt: skip
    column = rank16 = blocks = 0
    for i, m in enumerate(members):
        w = m.weight
        levels = dynamic_code(device) if w.nested_code is None else w.nested_code
        args.member[i] = _Member(
            codes=pointer(w.codes), scales=pointer(w.scales), nested=pointer(w.nested_absmax),
            offset=pointer(w.offset), levels=pointer(levels), b=pointer(m.b_Or), bias=pointer(m.bias_O),
            outputs=w.shape[0], column=column, at=m.at, rank=0 if m.b_Or is None else m.b_Or.shape[1],
        )  # fmt: skip
        rank16 = max(rank16, args.member[i].rank // 16)
        column += w.shape[0]
        blocks += -(-w.shape[0] // tile.outputs)
    half = x_MI.dtype == torch.float16
    overlap = overlap and rank16 > 0 and torch.cuda.get_device_capability(device) >= (9, 0)
    recorded = current_recording()
    if recorded is not None:
        defines = _defines(tile, nested, rank16, half, overlap)
        recorded.source(_source(), defines, torch.cuda.get_device_capability(device))
        return
    kernel = _kernel(tile, K, nested, rank16, half, overlap, device)
    kernel((blocks, -(-M // (tile.tiles * 8)), 1), tile.warps * 32, args, overlap)

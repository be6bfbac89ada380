"""The product with NF4 weights for 17 to 64 rows on Hopper: launch configurations and the call of ``nf4_wide.cu``.

**Why another kernel than** ``nf4_matmul.cu``. With more rows that one is bound by shared memory, where each warp reads
all of x for its own outputs. Hopper's wide instruction (``wgmma``) takes x out of shared memory once for the 64
outputs of four warps, and weights on its left out of registers, where a thread has just made them; it runs beside the
making of the next. Gate and up of an 8B Llama at 64 rows: 45 microseconds for 75, where reading the weight in 16 bits
takes cuBLAS 62.

**What it took** (``docs/log.md``). x and codes are brought by the copy engine, whose bytes a counter in shared memory
awaits. Copies by threads have to be shown to the instruction by a fence, and that waits for all that the thread reads,
a microsecond each time; codes read into registers are waited for when the compiler likes, all at once. No product may
be asked for under a condition, or the compiler lets each wait for the one before. The registers that a product reads
have to be kept until it is waited for, or the compiler may make the next weights in them. And each multiprocessor has
as many outputs: a block has as few warps with outputs as let all of them have one, and the last one to three of its
warps, which the wide instruction counts four by four, may have none.

**What bounds it** is shared memory, by the GPU's counters: for 1,024 weights the table of levels takes 32 turns of its
port, and the instruction 16, for as long as 32. (Levels by permutations, as ``nf4_matmul.cu`` has some, cost more than
they spare here.)

**Bits.** The instruction sums its 16 products as ``mma`` does, in the order of the inputs, and so does the adapter's
rank, which follows them as one more stage of x: the same bits as ``nf4_matmul.cu`` (``tests/gpu/test_nf4_wide.py``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from pronghorn.kernels import low_blocks
from pronghorn.kernels.cuda_source import CudaKernel, Map, map_of, map_of_words, source
from pronghorn.kernels.few_rows import HOPPER_PROCESSORS
from pronghorn.kernels.launch import begins_early, current_recording
from pronghorn.kernels.nf4_code import dynamic_code
from pronghorn.kernels.nf4_matmul_cuda import HOPPER_SHARED, TABLE_BYTES, Args, arguments, processors_of
from pronghorn.kernels.reference.nf4_matmul import Member

_HOPPER = (9, 0)
_WARPS = 16  # at most, as many outputs each
_RANKS = 64  # at most: a stage of x has so many columns of low, of which a block is brought
_LOW_BLOCKS, _LOW_SHARED = 4, 160 * 1024  # of x A^T in the launch; gate and up of an 8B Llama leave so many processors
_SPAN = 2  # stages of 64 or 256 columns were no faster (docs/log.md)
_LEAST_OUTPUTS = {32: 6144, 64: 4096}
"""Outputs of a group from which on it is faster than ``nf4_matmul.cu``, by the tile's rows, at 4,096 inputs. With 32
rows as many as inputs, too: a block's warps are too few for a long sum of few outputs."""


class WideArgs(ctypes.Structure):
    """The kernel's parameter; its alignment of 64 bytes ends it at a multiple of as many."""

    _fields_ = (("x", Map), ("low", Map), ("codes", Map * 3), ("a", Map), ("args", Args), ("_rest", ctypes.c_char * 64))


class WideTile(NamedTuple):
    """A launch configuration: the macros of ``nf4_wide.cu`` of the same names; ``groups`` are a block's warps."""

    groups: int
    rows: int
    idle: int
    stages: int
    span: int

    @property
    def pair(self) -> int:
        """Tiles of 8 outputs of a warp."""
        return 2

    @property
    def short(self) -> int:
        """Not 0: a block has outputs of one member."""
        return 1

    @property
    def outputs(self) -> int:
        """Outputs of a block."""
        return (self.groups - self.idle) * 16

    def shared_bytes(self, K: int, nested: bool) -> int:
        """Shared memory of a block; outputs lie where x's stages were."""
        row = K // 64 * (1 if nested else 4)
        scales = -(-self.outputs * (row + (0 if row // 16 % 2 else 16)) // 128) * 128
        before = -(-(TABLE_BYTES + scales + self.stages * 16) // 1024) * 1024
        stage = -(-(self.rows * self.span * 128 + self.outputs * self.span * 32) // 1024) * 1024
        return before + max(self.stages * stage, self.rows * (self.outputs * 2 + 16))


def wide_tile_for(
    M: int,
    outputs: Sequence[int],
    K: int,
    ranks: Sequence[int],
    nested: bool = True,
    shared: int = HOPPER_SHARED,
    processors: int = HOPPER_PROCESSORS,
) -> WideTile | None:
    """The tile for M rows of K columns; None where ``nf4_matmul.cu`` is the faster, or this does not take it: adapters
    of two ranks or large ones, or so many scales (32-bit ones of many inputs) that three stages do not fit beside them.

    Args:
        outputs: of each member.
        ranks: of the members' adapters, 0 without one.
    """
    rows, total = 32 if M <= 32 else 64, sum(outputs)
    least = max(_LEAST_OUTPUTS[rows], K if rows == 32 else 0)
    if not 16 < M <= 64 or total < least or len(set(ranks) - {0}) > 1 or max(ranks) > _RANKS:
        return None
    warps = _warps(outputs, processors)
    groups = -(-warps // 4) * 4
    for stages in (4, 3):  # with two the thread that fills one would wait for it
        tile = WideTile(groups, rows, groups - warps, stages, _SPAN)
        if tile.shared_bytes(K, nested) <= shared:
            return tile
    return None


def _warps(outputs: Sequence[int], processors: int) -> int:
    """Warps of a block with 16 outputs each, of one member: as few as need no more turns (blocks that a multiprocessor
    has one after another), as turns are then as full as they can be.
    """

    def turns(warps: int) -> int:
        return -(-sum(-(-o // (16 * warps)) for o in outputs) // processors)

    return next(warps for warps in range(1, _WARPS + 1) if turns(warps) == turns(_WARPS))


def chosen(
    x_MI: torch.Tensor, members: Sequence[Member], low_MR: torch.Tensor | None, out_MO: torch.Tensor
) -> WideTile | None:
    """The tile for these operands on a Hopper GPU; None where they are for ``nf4_matmul.cu``."""
    return tile_of(x_MI.shape[0], members) if _aligned(x_MI, low_MR, out_MO) else None


def tile_of(M: int, members: Sequence[Member]) -> WideTile | None:
    """The tile for M rows and these weights on a Hopper GPU, wherever x lies."""
    if not _codes_aligned(members):
        return None
    weight = members[0].weight
    ranks, outputs = [m.rank for m in members], [m.weight.shape[0] for m in members]
    nested, processors = weight.nested_absmax is not None, processors_of(weight.codes.device)
    return wide_tile_for(M, outputs, weight.shape[1], ranks, nested, processors=processors)


def makes_low(tile: WideTile, members: Sequence[Member], a_RI: torch.Tensor) -> bool:
    """Whether a launch is to make ``x A^T`` itself: blocks of it write that to ``low_MR``, in whole steps of 16 ranks,
    and the others wait for it. Its A has contiguous rows aligned to 16 bytes, and its blocks need no more turns of the
    multiprocessors. In a chain x is read once the kernel before has ended, so that one may let this begin before it
    waits itself; nothing that a kernel of the chain writes is read before.
    """
    aligned = a_RI.is_contiguous() and a_RI.data_ptr() % 16 == 0
    blocks = sum(-(-m.weight.shape[0] // tile.outputs) for m in members)
    processors = processors_of(a_RI.device)
    fits = -(-(blocks + _LOW_BLOCKS) // processors) == -(-blocks // processors)
    return aligned and fits and tile.groups >= 8 and a_RI.shape[0] <= low_blocks.MOST_RANKS


def _aligned(*tensors: torch.Tensor | None) -> bool:
    """Whether rows begin at multiples of 16 bytes."""
    return all(t.data_ptr() % 16 == 0 and t.stride(0) % 8 == 0 for t in tensors if t is not None)


def _codes_aligned(members: Sequence[Member]) -> bool:
    """Whether the copy engine can bring their codes."""
    return all(m.weight.codes.data_ptr() % 16 == 0 for m in members)


@lru_cache(maxsize=1)
def _source() -> str:
    return source("nf4_weights.cu", "low_blocks.cu", "nf4_wide.cu")


def _defines(tile: WideTile, nested: bool, rank16: int, half: bool, chain: bool, ranks: int = 0) -> dict[str, int]:
    """``ranks``: of the ``x A^T`` that is made in the launch, 0 where it is not."""
    macros = {name.upper(): value for name, value in tile._asdict().items()}
    given = {"RING": 1, "PAIR": 2, "NESTED": nested, "RANK16": rank16, "F16": half, "CHAIN": chain}
    low = low_blocks.defines_of(ranks, _LOW_BLOCKS, _LOW_SHARED, tile.rows) if ranks else {"LOW": 0}
    return macros | {name: int(value) for name, value in given.items()} | {"MULTIPLIES_WIDE": 1} | low


@lru_cache(maxsize=64)
def _kernel(
    tile: WideTile, K: int, nested: bool, rank16: int, half: bool, chain: bool, ranks: int, device: torch.device
) -> CudaKernel:
    defines = _defines(tile, nested, rank16, half, chain, ranks)
    low = low_blocks.bytes_of(defines) if ranks else 0
    return CudaKernel(_source(), "nf4_wide", defines, device, max(tile.shared_bytes(K, nested), low))


def nf4_wide(
    x_MI: torch.Tensor,
    members: Sequence[Member],
    low_MR: torch.Tensor | None,
    out_MO: torch.Tensor,
    tile: WideTile,
    overlap: bool = False,
    a_RI: torch.Tensor | None = None,
) -> None:
    """As ``nf4_matmul_cuda.nf4_matmul``, for up to ``tile.rows`` rows and adapters of one rank, up to 64; rows of x,
    low and out begin at multiples of 16 bytes. With ``a_RI`` see :func:`makes_low`.
    """
    (M, K), device = x_MI.shape, x_MI.device
    ranks, nested = {m.rank for m in members} - {0}, members[0].weight.nested_absmax is not None
    if tile.rows < M or len(ranks) > 1 or max(ranks, default=0) > _RANKS:
        raise ValueError(
            f"{M} rows, ranks {sorted(ranks)}, {tile}; give up to {tile.rows} rows and one rank of up to {_RANKS}"
        )
    if not 0 <= tile.idle < 4 or tile.span not in (1, 2, 4) or tile.stages < (2 if tile.span == 4 else 3):
        raise ValueError(
            f"{tile}: give 0 to 3 idle warps, a span of 1, 2 or 4, and 3 stages, with a span of 4 at least 2"
        )
    if tile.groups % 4 or not _aligned(x_MI, low_MR, out_MO) or not _codes_aligned(members):
        raise ValueError(f"{tile}: give groups in fours, and x, low, out and codes with rows at multiples of 16 bytes")
    if a_RI is not None and (low_MR is None or not makes_low(tile, members, a_RI)):
        raise ValueError(f"{tile} and A of {tuple(a_RI.shape)}: give what `makes_low` says, and low to write to")
    rank16, half = max(ranks, default=0) // 16, x_MI.dtype == torch.float16
    chain = begins_early(x_MI) if a_RI is not None else overlap and rank16 > 0
    R = 0 if a_RI is None else a_RI.shape[0]
    recorded = current_recording()
    if recorded is not None:
        recorded.source(_source(), _defines(tile, nested, rank16, half, chain, R), _HOPPER)
        return
    counts = parts = None
    if R:
        stream = torch.cuda.current_stream(device).cuda_stream if x_MI.is_cuda else 0
        parts, counts = low_blocks.workspace(device, stream, low_blocks.whole_ranks(R))
    args, blocks = arguments(x_MI, members, low_MR, out_MO, tile, dynamic_code(device), a_RI, counts, parts)
    kernel = _kernel(tile, K, nested, rank16, half, chain, R, device)
    low = map_of(low_MR, tile.rows) if rank16 and low_MR is not None else Map()
    block = (tile.outputs // 8, tile.span * 64)
    codes = (Map * 3)(*(map_of_words(m.weight.codes.data_ptr(), m.weight.shape[0] // 8, K, block) for m in members))
    a = Map() if a_RI is None else map_of(a_RI, low_blocks.whole_ranks(R))
    more = _LOW_BLOCKS if R else 0
    kernel((more + blocks, 1, 1), tile.groups * 32, WideArgs(map_of(x_MI, tile.rows), low, codes, a, args), chain)

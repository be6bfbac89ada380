"""The GPU side of the product with NF4 weights: launch configurations and the call of ``nf4_matmul.cu``."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import NamedTuple, Protocol

import torch

from pronghorn.kernels.cuda_source import SHARED, CudaKernel, pointer, processors_of, shared_memory, source
from pronghorn.kernels.few_rows import HOPPER_PROCESSORS
from pronghorn.kernels.launch import begins_early, current_recording
from pronghorn.kernels.nf4_code import NF4_LEVELS, dynamic_code
from pronghorn.kernels.nf4_matmul import LOW_ROWS
from pronghorn.kernels.reference.low_rank import SPLITS, run_length
from pronghorn.kernels.reference.nf4_matmul import Member

_P, _I = ctypes.c_void_p, ctypes.c_int


class _Member(ctypes.Structure):
    _fields_ = (
        *((name, _P) for name in ("codes", "scales", "nested", "offset", "levels", "b", "bias")),
        *((name, _I) for name in ("outputs", "column", "at", "rank")),
    )


class Args(ctypes.Structure):
    """The structure of the same name in ``nf4_weights.cu``."""

    _fields_ = (
        ("member", _Member * 3),
        *((name, _P) for name in ("x", "low", "y")),
        ("nf4", ctypes.c_float * 16),
        *((name, _I) for name in ("members", "rows", "K", "x_stride", "low_stride", "y_stride")),
        *(("a", _P), ("ranks", _I), ("counts", _P), ("parts", _P), ("joined", _I)),
    )


HOPPER_SHARED = SHARED[9, 0] * 1024
TABLE_BYTES = 65536 + 1024  # bytes: the levels of each byte of codes, and those of the scales' codes
_COUNTERS = 256
_MOST_GROUPS = 14
_LOW_BLOCKS = 4
"""Blocks that make ``x A^T``: with 128 for the outputs of an 8B Llama's projections all have a multiprocessor."""
_RING = {1: 8, 2: 4, 3: 4, 4: 3}
"""Warps that take turns, by the groups of a block; 2 up to 7 groups, then 1. With 2 groups and over 16 rows, 6."""

_PERMUTED = 0x22
"""Two of the eight tiles of a warp's chunk: what looks the others' levels up in shared memory is then about as full as
the arithmetic. (More, or where warps take turns, or with more rows: slower.)"""


class Tile(NamedTuple):
    """A launch configuration: the macros of ``nf4_matmul.cu`` of the same names."""

    groups: int
    ring: int
    pair: int
    rows: int
    panel: int
    stages: int
    chunk: int
    short: int = 0
    permuted: int = 0

    @property
    def outputs(self) -> int:
        """Outputs of a block."""
        return (self.groups * self.pair - self.short) * 8

    @property
    def warps(self) -> int:
        return self.groups * self.ring

    def shared_bytes(self, K: int, nested: bool) -> int:
        """Shared memory of a block."""
        scales = -(-self.outputs * (K // 64) * (1 if nested else 4) // 128) * 128
        x = _COUNTERS + self.stages * self.rows * (self.panel * 2 + 16)
        sums = self.pair // 2 if self.rows == 8 else self.pair * self.rows // 16
        return TABLE_BYTES + scales + x + (self.warps * sums * 512 if self.ring > 1 else 0)


def tile_for(
    M: int,
    outputs: int,
    K: int,
    nested: bool = True,
    shared: int = HOPPER_SHARED,
    processors: int = HOPPER_PROCESSORS,
) -> Tile | None:
    """The tile for M rows of K columns and so many outputs, in blocks of ``shared`` bytes; None where none fits.

    As many groups of 16 outputs in a block as give each multiprocessor one block. Few of them would leave it without
    work to do between one product and the next, so warps take turns there, with x in shared memory once for all. Many
    rows of many outputs are read by few warps with many outputs each, since then what bounds it is reading x. Where a
    GPU's blocks have less memory, panels and stages get smaller first, then the groups fewer, then the rows fewer, at
    last both.
    """
    groups = max(min(-(-outputs // (16 * processors)), _MOST_GROUPS), 1)
    for least in (max(groups // 4, 1), 0):
        for rows in (64, 32, 16, 8):
            if rows < 2 * min(M, 64) or rows == 8:
                for tile in _tiles(rows, groups, least, K):
                    if tile.shared_bytes(K, nested) <= shared:
                        return tile
    return None


def _tiles(rows: int, groups: int, least: int, K: int) -> Iterator[Tile]:
    """What suits so many rows and at most so many groups of 16 outputs, the best first."""
    pair = 2
    if rows > 8 and groups > 7:
        groups, pair = -(-groups // 2), 4
    while groups >= max(least, 1):
        if groups <= 7 and pair == 2:
            ring = 6 if groups == 2 and rows > 16 else _RING.get(groups, 2)
            chunk = 256 if groups <= 2 and rows <= 16 else 128
            for panel, stages in _stages(min(1024, 16384 // rows), (4, 3, 2)):
                yield Tile(groups, ring, pair, rows, panel, stages, chunk)
        alone, short = _balanced(max(groups, 4)) if rows == 8 else (max(groups, 4), 0)
        permuted = _PERMUTED if rows == 8 else 0
        yield Tile(alone, 1, pair, rows, K, 1, 256, short, permuted)
        for panel, stages in _stages(1024, (3, 2)) if rows <= 32 else [(256, 3), (256, 2)]:
            yield Tile(alone, 1, pair, rows, panel, stages, 256, short, permuted)
        groups //= 2
    if least == 0:
        yield Tile(1, 1, 1, rows, 256, 2, 256)


def _balanced(groups: int) -> tuple[int, int]:
    """Groups, and how many of them have 8 outputs in place of 16, for as many outputs on each of the four schedulers.

    They share the load/store unit evenly, so the fullest one would be the last to end.
    """
    tiles = -(-groups // 2)  # of 8 outputs, for each scheduler
    return 4 * -(-tiles // 2), 4 * (tiles % 2)


def _stages(panel: int, many: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Columns of a stage of x, at most ``panel``, and the number of stages, the best first."""
    while panel >= 256:
        yield from ((panel, stages) for stages in many)
        panel //= 2


@lru_cache(maxsize=1)
def _source() -> str:
    return source("nf4_weights.cu", "nf4_low.cu", "nf4_matmul.cu")


class Low(NamedTuple):
    """How ``x A^T`` is made: by how many blocks, from how many columns at a time."""

    blocks: int = 0
    columns: int = 0

    def shared_bytes(self, ranks: int, warps: int) -> int:
        """Shared memory of a block: 8 rows for each of its runs, and 16 ranks for each warp that has a task."""
        runs = SPLITS // self.blocks
        return 8 * (runs + 2 * min(warps, runs * -(-ranks // 16))) * (self.columns * 2 + 16)


def low_for(ranks: int, K: int, warps: int, shared: int = HOPPER_SHARED) -> Low:
    """As many columns at a time as a run has, 512 at most, or as fit into ``shared`` bytes."""
    for columns in (512, 256, 128, 64):
        low = Low(_LOW_BLOCKS, columns)
        if columns <= run_length(K) and low.shared_bytes(ranks, warps) <= shared:
            break
    return low


def _defines(tile: Tile, nested: bool, rank16: int, half: bool, chain: bool, low: Low) -> dict[str, int]:
    macros = {name.upper(): value for name, value in tile._asdict().items()}
    given = {"NESTED": nested, "RANK16": rank16, "F16": half, "CHAIN": chain}
    given |= {"LOW": low.blocks, "LOW_COLUMNS": low.columns}
    return macros | {name: int(value) for name, value in given.items()}


@lru_cache(maxsize=256)
def _kernel(
    tile: Tile, K: int, nested: bool, rank16: int, half: bool, chain: bool, low: Low, ranks: int, device: torch.device
) -> CudaKernel:
    defines = _defines(tile, nested, rank16, half, chain, low)
    shared_bytes = max(tile.shared_bytes(K, nested), low.shared_bytes(ranks, tile.warps) if ranks else 0)
    return CudaKernel(_source(), "nf4_matmul", defines, device, shared_bytes)


class Blocks(Protocol):
    """What a launch configuration says about a block's outputs; those that are ``short`` are of one member."""

    @property
    def outputs(self) -> int: ...

    @property
    def pair(self) -> int: ...

    @property
    def short(self) -> int: ...


def joins(members: Sequence[Member], tile: Blocks) -> bool:
    """Whether blocks take outputs one after another, whosever they are: no group of warps would have those of two
    members, and all scales have the same levels. A block for each member's rest could be one more than there is room
    for at once.
    """
    levels = {pointer(m.weight.nested_code) for m in members}
    whole = all(m.weight.shape[0] % (tile.pair * 8) == 0 for m in members[:-1])
    return len(members) > 1 and whole and not tile.short and len(levels) == 1


def arguments(
    x_MI: torch.Tensor,
    members: Sequence[Member],
    low_MR: torch.Tensor | None,
    out_MO: torch.Tensor,
    tile: Blocks,
    levels: torch.Tensor,
    a_RI: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    parts: torch.Tensor | None = None,
) -> tuple[Args, int]:
    """What the kernel is given, and its blocks of outputs. It holds addresses: the tensors have to live.

    ``levels``: the 256 of a scale, where a weight has none of its own. ``a_RI``, ``counts`` and room for ``parts``: to
    make ``low_MR`` of.
    """
    M, K = x_MI.shape
    args = Args(
        x=pointer(x_MI), low=pointer(low_MR), y=pointer(out_MO), nf4=(ctypes.c_float * 16)(*NF4_LEVELS),
        members=len(members), rows=M, K=K,
        x_stride=x_MI.stride(0), low_stride=0 if low_MR is None else low_MR.stride(0), y_stride=out_MO.stride(0),
        a=pointer(a_RI), ranks=0 if a_RI is None else a_RI.shape[0], counts=pointer(counts), parts=pointer(parts),
        joined=joins(members, tile),
    )  # fmt: skip
    column = blocks = 0
    for i, m in enumerate(members):
        w = m.weight
        args.member[i] = _Member(
            codes=pointer(w.codes), scales=pointer(w.scales), nested=pointer(w.nested_absmax),
            offset=pointer(w.offset), levels=pointer(levels if w.nested_code is None else w.nested_code),
            b=pointer(m.b_Or), bias=pointer(m.bias_O), outputs=w.shape[0], column=column, at=m.at,
            rank=m.rank,
        )  # fmt: skip
        column += w.shape[0]
        blocks += -(-w.shape[0] // tile.outputs)
    return args, -(-column // tile.outputs) if args.joined else blocks


@cache
def _workspace(device: torch.device, stream: int, tiles: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For ``x A^T``: counts of blocks that have made their part, and of who knows it, 0 again behind each launch; and
    sums of the runs. Made once, so that a CUDA graph may hold them, for each stream, as another rollout may be drawn on
    another. ``tiles`` of 16 ranks is a power of two, so that few are made.
    """
    counts = torch.zeros(64, dtype=torch.int32, device=device)
    return counts, torch.empty(SPLITS * tiles * 128, dtype=torch.float32, device=device)


def nf4_matmul(
    x_MI: torch.Tensor,
    members: Sequence[Member],
    low_MR: torch.Tensor | None,
    out_MO: torch.Tensor,
    tile: Tile | None = None,
    overlap: bool = False,
    a_RI: torch.Tensor | None = None,
) -> None:
    """As ``reference.nf4_matmul.nf4_matmul``.

    Args:
        tile: instead of :func:`tile_for`'s choice, for measurements.
        overlap: the kernel launched just before makes ``low_MR``, and nothing else that is read here: run beside it
            (on Hopper; elsewhere after it, as usual). It was launched as usual, or lets others begin only behind its
            own wait (:func:`pronghorn.kernels.launch.chained`): x is read before this one waits.
        a_RI: A, for up to ``LOW_ROWS`` rows: blocks of this launch write ``x A^T`` to ``low_MR``, in whole tiles of 16
            ranks, and the others wait for it. In a chain x is read once the kernel before has ended, so that one may
            let this begin before it waits itself; nothing that a kernel of the chain writes is read before.
    """
    (M, K), device = x_MI.shape, x_MI.device
    if M == 0:
        return
    nested = members[0].weight.nested_absmax is not None
    tile = tile or tile_for(M, out_MO.shape[1], K, nested, shared_memory(device), processors_of(device))
    if tile is None:
        raise ValueError(f"no tile for {K} inputs fits into {shared_memory(device)} bytes of shared memory")
    if a_RI is not None and (M > LOW_ROWS or tile.rows != LOW_ROWS):
        raise ValueError(f"x A^T of {M} rows by {tile}: up to {LOW_ROWS}, by a tile of as many")
    if tile.stages == 1 and tile.panel < K:
        raise ValueError(f"{tile}: one stage holds all of x or none; {K} inputs need two stages, or a panel of {K}")
    low, ranks = Low(), 0
    room: tuple[torch.Tensor, ...] = ()
    if a_RI is not None:
        ranks = a_RI.shape[0]
        low = low_for(ranks, K, tile.warps, shared_memory(device))
        stream = torch.cuda.current_stream(device).cuda_stream if x_MI.is_cuda else 0
        room = _workspace(device, stream, 1 << (-(-ranks // 16) - 1).bit_length())
    args, blocks = arguments(x_MI, members, low_MR, out_MO, tile, dynamic_code(device), a_RI, *room)
    rank16 = max(member.rank // 16 for member in args.member)
    half = x_MI.dtype == torch.float16
    if a_RI is not None:
        chain = begins_early(x_MI)
    else:
        chain = overlap and rank16 > 0 and torch.cuda.get_device_capability(device) >= (9, 0)
    recorded = current_recording()
    if recorded is not None:
        defines = _defines(tile, nested, rank16, half, chain, low)
        recorded.source(_source(), defines, torch.cuda.get_device_capability(device))
        return
    kernel = _kernel(tile, K, nested, rank16, half, chain, low, ranks, device)
    kernel((low.blocks + blocks, -(-M // tile.rows), 1), tile.warps * 32, args, chain)

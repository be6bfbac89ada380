"""A product with 16-bit weights and adapters in one launch (Hopper): the call of ``adapted_matmul.cu``.

**What bounds such a product** (``docs/log.md``). At 64 rows reading the weight: a kernel that does nothing but ask for
the same blocks takes 34 of the 36 microseconds of an 8B Llama's down projection, x costs two, products are hidden. At
256 rows, 128 and 64 outputs a block, it is 59: 52 without products, 49 without x, 40 without the weight, and 37 with
neither, as each product of the tensor core waits for the one before. Blocks in a cluster that bring x to each other,
and x by registers, change nothing. Who asks the copy engine may be the bound, too: one thread for W and one for x, each
for a whole step at once, where one asked for halves of both, was 1.2 microseconds of down.

**What is saved** is beside it: ``x A^T`` by the first blocks of the same launch, on multiprocessors that have no
outputs, where it was a kernel that the product, or cuBLAS, waited for; and weights are on their way before the kernel
that makes x has ended. And of what is read: up to 64 rows a part of the weight, spread evenly over its columns, comes
as the 4-bit codes that it was made of, and is made again, in shared memory, where the instruction reads it as it reads
the rest (``eighths_for``). Eight warps do that, beside those that multiply; half of it is as much as they can.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import NamedTuple

import torch

from pronghorn.kernels import low_blocks
from pronghorn.kernels.cuda_source import CudaKernel, Map, map_of, map_of_groups, pointer, processors_of, source
from pronghorn.kernels.few_rows import HOPPER_PROCESSORS
from pronghorn.kernels.launch import begins_early, current_recording
from pronghorn.kernels.low_blocks import whole_ranks, workspace
from pronghorn.kernels.nf4_code import NF4_LEVELS
from pronghorn.kernels.reference.low_rank import SPLITS

_OUTPUTS = (32, 48, 64, 96)  # of a block, that the instruction is written for
_SHARED = 224 * 1024  # of stages
_CODES = 12  # steps whose codes are in shared memory, or on their way
_P, _I = ctypes.c_void_p, ctypes.c_int


class Args(ctypes.Structure):
    """As in ``adapted_matmul.cu``, whose parameter is a multiple of 64 bytes."""

    _fields_ = (
        *((name, Map) for name in ("x", "a", "xs", "w")), *((name, _P) for name in ("y", "low", "parts", "flags")),
        *((name, _I) for name in (
            "y_stride", "low_stride", "rows", "outputs", "inputs", "width", "ranks", "row_blocks",
        )),
        ("codes", _P), ("nf4", ctypes.c_float * 16), ("_rest", ctypes.c_char * 56),
    )  # fmt: skip


class Coded(NamedTuple):
    """A part of a weight as codes: of ``eighths`` of eight steps of 128 columns, in the order in which blocks read
    them, of each 8 outputs two tiles of codes (``nf4_layout.py``) and their float32 scales ``[2, 8]``.

    ``packed``: uint8 ``[steps, O / 8, 576]``.
    """

    packed: torch.Tensor
    eighths: int


class Tile(NamedTuple):
    """Groups of four computing warps with 64 rows each, outputs of a block, stages of 128 columns; blocks that make
    ``x A^T`` of 64 rows; of eight steps of 128 columns, how many are read as codes.
    """

    groups: int
    outputs: int
    stages: int
    low: int = 1
    eighths: int = 0

    @property
    def rows(self) -> int:
        return self.groups * 64

    @property
    def warps(self) -> int:
        return self.groups * 4 + 2 + (9 if self.eighths else 0)

    @property
    def ring_bytes(self) -> int:
        """Shared memory of the stages."""
        return self.stages * (self.rows + self.outputs) * 256


def tile_for(rows: int, outputs: int, processors: int = HOPPER_PROCESSORS, eighths: int = 0) -> Tile | None:
    """The tile for so many rows and outputs; None where another way is meant to be faster: where there are more blocks
    than multiprocessors, or far fewer.

    More than some 72 KB of weights on their way to each multiprocessor only let the blocks wait that make ``x A^T`` (q,
    k and v, 64 rows: 20.2 microseconds with 8 stages, 18.4 with 6).

    Args:
        eighths: of the weight's steps, as many are there as codes (:func:`eighths_for`). With more than 64 rows none is
            read so: what weights cost is little then, and to make them is not (256 rows, down: 61 and 90 microseconds).
    """
    groups, lows = (1 if rows <= 64 else 2), -(-rows // 64)
    for each in _OUTPUTS:
        blocks = -(-outputs // each) * -(-rows // (groups * 64))
        if blocks + lows <= processors:
            if 3 * blocks < 2 * processors:
                return None
            low = next(n for n in (4, 2, 1) if blocks + n * lows <= processors)
            most = 9 if groups > 1 or each <= 32 else 6
            stages = min(_SHARED // ((groups * 64 + each) * 256), most)
            if eighths and groups == 1 and each <= 48:  # else there is no room for a ring of codes
                return Tile(groups, each, min(stages, 8), low, eighths)
            return Tile(groups, each, stages, low)
    return None


def eighths_for(outputs: int, inputs: int, processors: int = HOPPER_PROCESSORS) -> int:
    """Of eight steps of 128 columns, how many 17 to 64 rows are meant to read as codes; 0 where a weight in 16 bits is
    as fast. Microseconds behind a norm, for an 8B Llama's projections at 64 rows, of 0, 2, 4, and 6: down 37.2, 36.0,
    38.0, 42.3; q, k and v 18.5, 17.2, 16.4, 18.4. O gains nothing, and other tiles were not measured.
    """
    tile = tile_for(64, outputs, processors)
    if tile is None:
        return 0
    return 4 if tile.outputs == 48 else 2 if tile.outputs == 32 and inputs >= 8192 else 0


@lru_cache(maxsize=1)
def _source() -> str:
    return source("low_blocks.cu", "adapted_matmul.cu")


def defines_of(tile: Tile, ranks: int, dtype: torch.dtype, chain: bool) -> dict[str, int]:
    """The kernel's macros."""
    return {
        "GROUPS": tile.groups, "OUTPUTS_WIDE": tile.outputs, "STAGES": tile.stages, "CODED": tile.eighths,
        "CODES": _CODES,
        "F16": int(dtype == torch.float16), "CHAIN": int(chain), "MULTIPLIES_WIDE": 1,
        **low_blocks.defines_of(ranks, tile.low, tile.ring_bytes),
    }  # fmt: skip


def shared_bytes(tile: Tile, defines: dict[str, int]) -> int:
    """Shared memory of a block: of one that has outputs, or that makes a part of ``x A^T``."""
    own = tile.ring_bytes + tile.stages * 16
    if tile.eighths:
        own += _CODES * (-(-tile.outputs * 72 // 128) * 128 + 24) + tile.stages * 8
        own = -(-own // 128) * 128 + 2048  # the levels of a code
    return max(own, low_blocks.bytes_of(defines))


@lru_cache(maxsize=64)
def _kernel(defines: tuple[tuple[str, int], ...], device: torch.device, bytes_: int) -> CudaKernel:
    return CudaKernel(_source(), "adapted_matmul", dict(defines), device, bytes_)


def adapted_matmul(
    table_TK: torch.Tensor,
    rows: int,
    weight_OK: torch.Tensor,
    a_RI: torch.Tensor,
    out_MO: torch.Tensor,
    coded: Coded | None = None,
    tile: Tile | None = None,
) -> None:
    """As ``reference.adapted_matmul.adapted_matmul``; ``tile`` in place of :func:`tile_for`'s, for measurements.

    In a chain it reads the weights and A before the kernel before has ended, and nothing else; it lets no other begin
    before.
    """
    (R, inputs), O, device = a_RI.shape, weight_OK.shape[0], table_TK.device  # noqa: E741 - a shape letter
    tile = tile or tile_for(rows, O, processors_of(device), coded.eighths if coded else 0)
    if tile is None:
        raise ValueError(f"no tile for {rows} rows and {O} outputs; ask `takes` first")
    if tile.stages < 2 or SPLITS % tile.low:
        raise ValueError(
            f"{tile}: give two stages or more, as one is free when the next is read, and low of 1, 2, 4 or 8"
        )
    chain = begins_early(table_TK)
    defines = defines_of(tile, R, table_TK.dtype, chain)
    if (recorded := current_recording()) is not None:
        recorded.source(_source(), defines, torch.cuda.get_device_capability(device))
        return
    row_blocks = -(-rows // tile.rows)
    stream = torch.cuda.current_stream(device).cuda_stream if table_TK.is_cuda else 0
    parts, flags = workspace(device, stream, whole_ranks(R))
    args = Args(
        x=map_of(table_TK, 64), a=map_of(a_RI, whole_ranks(R)),
        xs=map_of_groups(table_TK, tile.rows, 2), w=map_of_groups(weight_OK, tile.outputs, 2),
        y=pointer(out_MO), low=pointer(table_TK[:, inputs:]), parts=pointer(parts), flags=pointer(flags),
        y_stride=out_MO.stride(0), low_stride=table_TK.stride(0), rows=rows, outputs=O, inputs=inputs,
        width=weight_OK.shape[1], ranks=R, row_blocks=row_blocks,
        codes=pointer(coded.packed if coded else None), nf4=(ctypes.c_float * 16)(*NF4_LEVELS),
    )  # fmt: skip
    blocks = -(-rows // 64) * tile.low + -(-O // tile.outputs) * row_blocks
    _kernel(tuple(defines.items()), device, shared_bytes(tile, defines))((blocks, 1, 1), tile.warps * 32, args, chain)

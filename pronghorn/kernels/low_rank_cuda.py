"""``x A^T`` of many rows on Hopper: the call of ``low_rank.cu``.

To read x is what it costs, and to read it once: a block has 64 rows and all ranks, a stage of x and A is one request
each to the copy engine, and as many stages are on their way as fit into shared memory. Several blocks share the runs of
64 rows where rows alone are not enough for the multiprocessors; their sums then go through memory.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch

from pronghorn.kernels import launch, low_blocks
from pronghorn.kernels.cuda_source import CudaKernel, Map, map_of, pointer, source
from pronghorn.kernels.few_rows import HOPPER_PROCESSORS
from pronghorn.kernels.launch import begins_early, current_recording
from pronghorn.kernels.low_blocks import MOST_RANKS, whole_ranks
from pronghorn.kernels.reference.low_rank import SPLITS

LEAST_ROWS = 2049

_SHARED = 225 * 1024  # of stages
_WARPS = 5
_P, _I = ctypes.c_void_p, ctypes.c_int


class Args(ctypes.Structure):
    """As in ``low_rank.cu``, whose parameter is a multiple of 64 bytes."""

    _fields_ = (
        *((name, Map) for name in ("x", "a")), *((name, _P) for name in ("low", "also", "parts", "flags")),
        *((name, _I) for name in ("low_stride", "also_stride", "rows", "ranks", "inputs")),
        ("_rest", ctypes.c_char * 12),
    )  # fmt: skip


def takes(x_TI: torch.Tensor, a_RI: torch.Tensor, *outs: torch.Tensor | None) -> bool:
    """Whether it is meant for these, and can: on Hopper, rows that begin at multiples of 16 bytes, an even number of
    ranks, and outputs whose rows begin at multiples of four.
    """
    T, R = x_TI.shape[0], a_RI.shape[0]
    if not LEAST_ROWS <= T or R > MOST_RANKS or R % 2 or not launch.has_copy_engine(x_TI):
        return False
    size = x_TI.element_size()
    read = all(t.data_ptr() % 16 == 0 and t.stride(0) * size % 16 == 0 for t in (x_TI, a_RI))
    return read and all(t.data_ptr() % 4 == 0 and t.stride(0) % 2 == 0 for t in outs if t is not None)


def blocks_for(T: int, R: int) -> int:
    """Blocks that share 64 rows: as many as leave each a multiprocessor; half as many for many ranks, whose sums are
    much to write and read (4,096 rows of 4,096 inputs and 96 ranks: 12.0 microseconds by one, 15.4 by two).
    """
    most = HOPPER_PROCESSORS // -(-T // 64)
    blocks = next(n for n in (8, 4, 2, 1) if n <= max(most, 1))
    return max(1, blocks // 2) if R > 64 else blocks


def defines_of(R: int, blocks: int, dtype: torch.dtype, twice: bool, chain: bool) -> dict[str, int]:
    """The kernel's macros."""
    given = {"F16": int(dtype == torch.float16), "CHAIN": int(chain), "MULTIPLIES_WIDE": 1}
    return given | low_blocks.defines_of(R, blocks, _SHARED) | ({"TWICE": 1} if twice else {})


@lru_cache(maxsize=1)
def _source() -> str:
    return source("low_blocks.cu", "low_rank.cu")


@lru_cache(maxsize=64)
def _kernel(defines: tuple[tuple[str, int], ...], device: torch.device, bytes_: int) -> CudaKernel:
    return CudaKernel(_source(), "low_rank", dict(defines), device, bytes_)


def low_rank(
    x_TI: torch.Tensor,
    a_RI: torch.Tensor,
    out_TR: torch.Tensor,
    also_TR: torch.Tensor | None = None,
    blocks: int | None = None,
) -> None:
    """See :func:`pronghorn.kernels.low_rank.low_rank`; ``blocks`` (1, 2, 4 or 8) in place of :func:`blocks_for`'s, for
    tests and measurements. In a chain it begins while the kernel before runs, and reads A alone until that has ended.
    """
    (T, inputs), R, device = x_TI.shape, a_RI.shape[0], x_TI.device
    blocks = blocks or blocks_for(T, R)
    if SPLITS % blocks:
        raise ValueError(f"blocks={blocks}; give 1, 2, 4 or 8, as they share {SPLITS} runs evenly")
    chain = begins_early(x_TI)
    defines = defines_of(R, blocks, x_TI.dtype, also_TR is not None, chain)
    if (recorded := current_recording()) is not None:
        recorded.source(_source(), defines, torch.cuda.get_device_capability(device))
        return
    parts = flags = None
    if blocks > 1:
        stream = torch.cuda.current_stream(device).cuda_stream if x_TI.is_cuda else 0
        parts, flags = low_blocks.workspace(device, stream, whole_ranks(R), low_blocks.room_for(T))
    args = Args(
        x=map_of(x_TI, 64), a=map_of(a_RI, whole_ranks(R)),
        low=pointer(out_TR), also=pointer(also_TR), parts=pointer(parts), flags=pointer(flags),
        low_stride=out_TR.stride(0), also_stride=0 if also_TR is None else also_TR.stride(0),
        rows=T, ranks=R, inputs=inputs,
    )  # fmt: skip
    grid = (-(-T // 64) * blocks, 1, 1)
    _kernel(tuple(defines.items()), device, low_blocks.bytes_of(defines))(grid, _WARPS * 32, args, chain)

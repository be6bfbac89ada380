"""The GPU side of a decode step's attention: a kernel for few rows, one for many, and which of them takes what."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import torch

from pronghorn.kernels.cuda_source import CudaKernel, Map, map_of_groups, pointer, processors_of, shared_memory, source
from pronghorn.kernels.decode_attention import workspace_elements
from pronghorn.kernels.decode_attention_triton import segments_of
from pronghorn.kernels.launch import chain_of, current_recording, has_copy_engine
from pronghorn.kernels.ordered_rows import SEGMENT, TILE

_P, _I = ctypes.c_void_p, ctypes.c_int

FEW_ROWS, FEW_BLOCKS = 16, 384
"""Rows, and blocks (rows, kv heads and segments of the table multiplied), that the kernel for few takes. A block has a
multiprocessor for itself: where more blocks have keys than there are of these, that for many rows is the faster one,
but for a single row (8,000 tokens: 20.9 microseconds and 23.6). How many have, only the GPU knows."""

MANY_ROWS, MAX_HEADS, MAX_ELEMENTS, STAGES, BLOCKS = 1024, 8, 128, 3, 2
_RESERVED, _MULTIPROCESSOR = 1024, 228 * 1024
"""Bytes of shared memory that a block has besides its own, and that a multiprocessor has where the kernel for many
runs, which so many ``BLOCKS`` share."""


class _Args(ctypes.Structure):
    """As in ``step_attention_parts.cu``."""

    _fields_ = (
        *((name, _P) for name in ("q", "k_new", "v_new", "cos", "sin", "k", "v", "table", "lengths", "o")),
        *((name, _P) for name in ("part", "stats", "arrived")),
        *((name, _I) for name in ("q_stride", "k_stride", "v_stride", "cos_stride", "sin_stride", "table_stride")),
        *((name, _I) for name in ("o_stride", "N", "P", "K", "segments", "rows")),
        ("scale", ctypes.c_float),
    )


class _ManyArgs(ctypes.Structure):
    """As in ``step_attention_many.cu``, whose parameter is a multiple of 64 bytes."""

    _fields_ = (("of_k", Map), ("of_v", Map), ("args", _Args), ("_rest", ctypes.c_char * 64))


class Shape(NamedTuple):
    """What decides on a kernel, and its macros: rows, query and kv heads, elements of a head, how many of them are
    rotated, bytes of an angle, tokens of a table and of a block.
    """

    B: int
    H: int
    K: int
    E: int
    rotary: int
    angle: int
    tokens: int
    page: int


class Way(NamedTuple):
    """One of the two kernels: its file, warps of a block, bytes of shared memory for a shape, its own macros."""

    file: str
    warps: int
    shared_bytes: Callable[[Shape], int]
    macros: dict[str, int]


def _few_bytes(shape: Shape) -> int:
    """The places of ``step_attention.cu``."""
    row = shape.E * 2 + 16
    return 2 * SEGMENT * row + 8 * row + 8 * (SEGMENT * 2 + 16) + FEW.warps * 8 * 4 + shape.rotary * 4 + 16


def _many_bytes(shape: Shape) -> int:
    """The places of ``step_attention_many.cu``."""
    inputs = shape.H // shape.K * (shape.E * 2 + 16) + 2 * shape.E * 2 + shape.rotary * shape.angle
    words = TILE // 16 * 8 + MANY_ROWS + 16 + 4 * STAGES
    return STAGES * 2 * TILE * shape.E * 2 + 2 * inputs + 8 * (TILE * 2 + 16) + 4 * words


FEW = Way("step_attention.cu", 8, _few_bytes, {})
MANY = Way(
    "step_attention_many.cu", 5, _many_bytes, {"STAGES": STAGES, "MOST": MANY_ROWS, "COPY_ENGINE": 1, "SHARE": BLOCKS}
)


def _shape_of(q_BHE: torch.Tensor, k_cache: torch.Tensor, cos_PE: torch.Tensor, table_tokens: int) -> Shape:
    (B, H, E), (_, page, K, _) = q_BHE.shape, k_cache.shape
    return Shape(B, H, K, E, cos_PE.shape[1], cos_PE.element_size(), table_tokens, page)


def _neither(
    q_BHE: torch.Tensor, shape: Shape, angles: tuple[torch.Tensor, ...], pages: tuple[torch.Tensor, ...]
) -> str:
    """Why neither kernel takes such rows, whatever their number."""
    if q_BHE.dtype not in (torch.bfloat16, torch.float16):
        return f"{q_BHE.dtype} in place of bfloat16 or float16"
    group, E = shape.H // shape.K, shape.E
    if E % 16 or E > MAX_ELEMENTS or group > MAX_HEADS:
        return f"{group} query heads of {E} elements: up to {MAX_HEADS} of up to {MAX_ELEMENTS}, in multiples of 16"
    for of in angles:
        if of.dtype not in (q_BHE.dtype, torch.float32) or of.dtype != angles[0].dtype:
            return f"angles in {angles[0].dtype} and {of.dtype}"
    if any(t.data_ptr() % 16 for t in pages) or pages[0].stride(0) % 8:
        return "values, or a cache, that are not aligned to 16 bytes"
    if not shape.tokens or not len(angles[0]):
        return "a table of no blocks, or of no angles"
    if q_BHE.is_cuda and (torch.version.hip or torch.cuda.get_device_capability(q_BHE.device) < (8, 0)):
        return "a GPU older than compute capability 8.0"
    return ""


def not_few(q_BHE: torch.Tensor, shape: Shape) -> str:
    """Why the kernel for few rows does not take them; empty where it does."""
    if shape.B > FEW_ROWS:
        return f"{shape.B} rows in place of up to {FEW_ROWS}"
    blocks = shape.B * shape.K * segments_of(shape.tokens)
    if blocks > FEW_BLOCKS:
        return f"{blocks} blocks for tables of {shape.tokens} tokens in place of up to {FEW_BLOCKS}"
    if q_BHE.is_cuda and _few_bytes(shape) > shared_memory(q_BHE.device):
        return f"{shared_memory(q_BHE.device)} bytes of shared memory"
    return ""


def not_many(q_BHE: torch.Tensor, k_BKE: torch.Tensor, shape: Shape, angles: tuple[torch.Tensor, ...]) -> str:
    """Why the kernel for many rows does not take them; empty where it does."""
    if shape.B > MANY_ROWS:
        return f"{shape.B} rows in place of up to {MANY_ROWS}"
    if any(t.data_ptr() % 16 or t.stride(0) % 8 for t in (q_BHE, k_BKE)):
        return "queries or keys that are not aligned to 16 bytes"
    if shape.E % 64 or shape.page % 8 or (TILE % shape.page and shape.page % TILE):
        return (
            f"heads of {shape.E} elements and blocks of {shape.page} tokens: 64 or 128, and 8 to {TILE} or a multiple"
        )
    size = shape.angle
    if shape.rotary // 2 * size % 16 or any(t.data_ptr() % 16 or t.stride(0) * size % 16 for t in angles):
        return f"angles of {shape.rotary} elements: halves that are no multiples of 16 bytes, or not aligned to them"
    if BLOCKS * (_many_bytes(shape) + _RESERVED) > _MULTIPROCESSOR:
        return f"{_many_bytes(shape)} bytes of shared memory, with which no {BLOCKS} blocks share a multiprocessor"
    if q_BHE.is_cuda and not has_copy_engine(q_BHE):
        return "no Hopper GPU"
    return ""


def way_of(
    q_BHE: torch.Tensor,
    k_BKE: torch.Tensor,
    v_BKE: torch.Tensor,
    cos_PE: torch.Tensor,
    sin_PE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table_tokens: int,
) -> Way | str:
    """The kernel for these rows of up to ``table_tokens`` tokens; or, in words, why there is none."""
    shape, angles = _shape_of(q_BHE, k_cache, cos_PE, table_tokens), (cos_PE, sin_PE)
    if neither := _neither(q_BHE, shape, angles, (v_BKE, k_cache, v_cache)):
        return neither
    few, many = not_few(q_BHE, shape), not_many(q_BHE, k_BKE, shape, angles)
    if few:
        return f"{few}; {many}" if many else MANY
    crowded = shape.B > 1 and shape.B * shape.K * segments_of(table_tokens) > processors_of(q_BHE.device)
    return MANY if crowded and not many else FEW


@lru_cache(maxsize=2)
def _source(file: str) -> str:
    return source("step_attention_parts.cu", file)


@lru_cache(maxsize=64)
def _kernel(file: str, defines: tuple[tuple[str, int], ...], device: torch.device, shared_bytes: int) -> CudaKernel:
    return CudaKernel(_source(file), "step_attention", dict(defines), device, shared_bytes)


@cache
def _arrivals(device: torch.device, stream: int, count: int) -> torch.Tensor:
    """How many segments of a row's head have ended; 0 again behind each launch. Made once, so that a CUDA graph may
    hold it, for each stream, as a rollout may be drawn on one while training runs on another. ``count`` is a power of
    two, so that few are made.
    """
    return torch.zeros(count, dtype=torch.int32, device=device)


def step_attention(
    way: Way,
    q_BHE: torch.Tensor,
    k_BKE: torch.Tensor,
    v_BKE: torch.Tensor,
    cos_PE: torch.Tensor,
    sin_PE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table_BN: torch.Tensor,
    positions_B: torch.Tensor,
    lengths_B: torch.Tensor,
    scale: float,
    workspace: torch.Tensor | None = None,
    out_BHE: torch.Tensor | None = None,
) -> torch.Tensor:
    """See :func:`pronghorn.kernels.step_attention.step_attention`; ``way``: what :func:`way_of` says of these rows."""
    (B, H, E), (K, device) = q_BHE.shape, (k_BKE.shape[1], q_BHE.device)
    (N, page) = block_table_BN.shape[1], k_cache.shape[1]
    o_BHE = torch.empty((B, H, E), dtype=q_BHE.dtype, device=device) if out_BHE is None else out_BHE
    if not o_BHE.numel():
        return o_BHE
    segments = segments_of(N * page)
    if workspace is None:
        workspace = torch.empty(workspace_elements(B, N * page, H, E), dtype=torch.float32, device=device)
    parts = B * segments * H * E if segments > 1 else 0  # where a row is one segment, nothing is merged
    stream = torch.cuda.current_stream(device).cuda_stream if q_BHE.is_cuda else 0
    arrived = _arrivals(device, stream, 1 << (B * K - 1).bit_length())
    args = _Args(  # addresses: the tensors live until the launch
        q=pointer(q_BHE), k_new=pointer(k_BKE), v_new=pointer(v_BKE), cos=pointer(cos_PE), sin=pointer(sin_PE),
        k=pointer(k_cache), v=pointer(v_cache), table=pointer(block_table_BN), lengths=pointer(lengths_B),
        o=pointer(o_BHE), part=pointer(workspace), stats=pointer(workspace) + 4 * parts, arrived=pointer(arrived),
        q_stride=q_BHE.stride(0), k_stride=k_BKE.stride(0), v_stride=v_BKE.stride(0), cos_stride=cos_PE.stride(0),
        sin_stride=sin_PE.stride(0), table_stride=block_table_BN.stride(0), o_stride=o_BHE.stride(0),
        N=N, P=cos_PE.shape[0], K=K, segments=segments, rows=B, scale=scale * math.log2(math.e),
    )  # fmt: skip
    chain = chain_of(q_BHE)
    shape = _shape_of(q_BHE, k_cache, cos_PE, N * page)
    defines = {
        "E": E, "HEADS": H // K, "ROTARY": shape.rotary, "PAGE": page, "ANGLES": shape.angle,
        "F16": int(q_BHE.dtype == torch.float16), "CHAIN": chain, "SEGMENT": SEGMENT, "TILE": TILE, **way.macros,
    }  # fmt: skip
    recorded = current_recording()
    if recorded is not None:
        recorded.source(_source(way.file), defines, torch.cuda.get_device_capability(device))
        return o_BHE
    kernel = _kernel(way.file, tuple(defines.items()), device, way.shared_bytes(shape))
    if way is FEW:
        kernel((K, segments, B), way.warps * 32, args, chain > 0)
        return o_BHE
    groups = max(1, min(BLOCKS * processors_of(device) // K, B * segments))
    of_k, of_v = (
        map_of_groups(cache.flatten(2).flatten(0, 1), min(page, TILE), E // 64) for cache in (k_cache, v_cache)
    )
    kernel((K * groups, 1, 1), way.warps * 32, _ManyArgs(of_k, of_v, args), chain > 0)
    return o_BHE

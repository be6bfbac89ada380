"""The GPU side of a decode step's attention: the call of ``step_attention.cu``, and which calls it takes."""

from __future__ import annotations

import ctypes
import math
from functools import cache, lru_cache

import torch

from pronghorn.kernels.cuda_source import CudaKernel, pointer, shared_memory, source
from pronghorn.kernels.decode_attention import workspace_elements
from pronghorn.kernels.decode_attention_triton import segments_of
from pronghorn.kernels.launch import chain_of, current_recording
from pronghorn.kernels.ordered_rows import SEGMENT, TILE

_P, _I = ctypes.c_void_p, ctypes.c_int

MAX_ROWS, MAX_BLOCKS = 16, 384
"""Rows, and blocks (rows, kv heads and segments of the table multiplied), up to which this is the faster way. A block
has a multiprocessor for itself: where more of them have keys, kernels whose blocks share one, of which one computes
while others read, are faster (6 rows from some 1,400 tokens on). How many have, only the GPU knows."""

MAX_HEADS, MAX_ELEMENTS = 8, 128
_WARPS = 8


class _Args(ctypes.Structure):
    """As in ``step_attention.cu``."""

    _fields_ = (
        *((name, _P) for name in ("q", "k_new", "v_new", "cos", "sin", "k", "v", "table", "lengths", "o")),
        *((name, _P) for name in ("part", "stats", "arrived")),
        *((name, _I) for name in ("q_stride", "k_stride", "v_stride", "cos_stride", "sin_stride", "table_stride")),
        *((name, _I) for name in ("o_stride", "N", "P", "K", "segments")),
        ("scale", ctypes.c_float),
    )


def shared_bytes(E: int, rotary: int) -> int:
    """Shared memory of a block: the places of ``step_attention.cu``."""
    row = E * 2 + 16
    return 2 * SEGMENT * row + 8 * row + 8 * (SEGMENT * 2 + 16) + _WARPS * 8 * 4 + rotary * 4 + 16


def why_not(
    q_BHE: torch.Tensor,
    k_BKE: torch.Tensor,
    v_BKE: torch.Tensor,
    cos_PE: torch.Tensor,
    sin_PE: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    table_tokens: int,
) -> str:
    """In words, why the kernel does not take these rows of up to ``table_tokens`` tokens; empty where it does."""
    (B, H, E), K = q_BHE.shape, k_BKE.shape[1]
    if q_BHE.dtype not in (torch.bfloat16, torch.float16):
        return f"{q_BHE.dtype} in place of bfloat16 or float16"
    if B > MAX_ROWS:
        return f"{B} rows in place of up to {MAX_ROWS}"
    blocks = B * K * segments_of(table_tokens)
    if blocks > MAX_BLOCKS:
        return f"{blocks} blocks for tables of {table_tokens} tokens in place of up to {MAX_BLOCKS}"
    if E % 16 or E > MAX_ELEMENTS or H // K > MAX_HEADS:
        return f"{H // K} query heads of {E} elements: up to {MAX_HEADS} of up to {MAX_ELEMENTS}, in multiples of 16"
    for angles in (cos_PE, sin_PE):
        if angles.dtype not in (q_BHE.dtype, torch.float32) or angles.dtype != cos_PE.dtype:
            return f"angles in {cos_PE.dtype} and {sin_PE.dtype}"
    if any(t.data_ptr() % 16 for t in (v_BKE, k_cache, v_cache)) or v_BKE.stride(0) % 8:
        return "values, or a cache, that are not aligned to 16 bytes"
    if not table_tokens or not len(cos_PE):
        return "a table of no blocks, or of no angles"
    if q_BHE.is_cuda:
        if torch.version.hip or torch.cuda.get_device_capability(q_BHE.device) < (8, 0):
            return "a GPU older than compute capability 8.0"
        if shared_bytes(E, cos_PE.shape[1]) > shared_memory(q_BHE.device):
            return f"{shared_memory(q_BHE.device)} bytes of shared memory"
    return ""


@lru_cache(maxsize=1)
def _source() -> str:
    return source("step_attention.cu")


@lru_cache(maxsize=64)
def _kernel(defines: tuple[tuple[str, int], ...], device: torch.device) -> CudaKernel:
    given = dict(defines)
    return CudaKernel(_source(), "step_attention", given, device, shared_bytes(given["E"], given["ROTARY"]))


@cache
def _arrivals(device: torch.device, stream: int, count: int) -> torch.Tensor:
    """How many segments of a row's head have ended; 0 again behind each launch. Made once, so that a CUDA graph may
    hold it, for each stream, as a rollout may be drawn on one while training runs on another. ``count`` is a power of
    two, so that few are made.
    """
    return torch.zeros(count, dtype=torch.int32, device=device)


def step_attention(
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
    """See :func:`pronghorn.kernels.step_attention.step_attention`; :func:`why_not` says nothing against it."""
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
        N=N, P=cos_PE.shape[0], K=K, segments=segments, scale=scale * math.log2(math.e),
    )  # fmt: skip
    chain = chain_of(q_BHE)
    defines = {
        "E": E, "HEADS": H // K, "ROTARY": cos_PE.shape[1], "PAGE": page, "ANGLES": cos_PE.element_size(),
        "F16": int(q_BHE.dtype == torch.float16), "CHAIN": chain, "SEGMENT": SEGMENT, "TILE": TILE,
    }  # fmt: skip
    recorded = current_recording()
    if recorded is not None:
        recorded.source(_source(), defines, torch.cuda.get_device_capability(device))
        return o_BHE
    _kernel(tuple(defines.items()), device)((K, segments, B), _WARPS * 32, args, chain > 0)
    return o_BHE

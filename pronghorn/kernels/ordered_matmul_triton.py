"""The Triton side of the ordered product with 16-bit weights; ``ordered_matmul.py`` has the definition."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from pronghorn.kernels.few_rows import HOPPER_PROCESSORS
from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.ordered_matmul import COPIED_ROWS, mapped_rows
from pronghorn.kernels.reference.ordered_matmul import DenseMember


class Tile(NamedTuple):
    """Outputs, rows and inputs of a program's step, warps, and stages of inputs on their way or in use.

    ``mapped``: Hopper's copy engine brings the inputs, of a single member.
    """

    outputs: int
    rows: int
    inputs: int
    num_warps: int
    num_stages: int
    mapped: bool = False


_MAPPED_64 = (
    Tile(32, 64, 128, 4, 8, True),
    Tile(64, 64, 128, 4, 6, True),
    Tile(128, 64, 64, 4, 4, True),
)


def tile_for(M: int, outputs: int, capability: tuple[int, int] = (9, 0), most: int = 0) -> Tile:
    """The tile for M rows and so many outputs of a group.

    Few outputs are all in work at once, and each waits for its own chain of sums: long steps spend the least beside it,
    and where there are fewer than four warps' products (16 outputs and 8 rows each), warps share the loads and repeat
    products. Where there are enough outputs for 64 a program, 16 rows or more take Hopper's wider instruction, which
    reads shared memory itself; with more than 16 rows few outputs do so too (measured at 32 and 64 rows for the qkv and
    down projections of an 8B Llama: 5 to 30% faster, though fewer programs run).

    Stages fill a half of a Hopper multiprocessor's shared memory, so that two programs fit; with the wider instruction
    all of it where there are fewer programs than multiprocessors. Other GPUs have less. A stage is in use while the
    others are on their way, and except with the wider instruction Triton makes one less than it is told.

    A product whose inputs the copy engine brings up to ``most`` rows
    (:func:`pronghorn.kernels.ordered_matmul.mapped_rows`) takes it above 32: rows in blocks of up to 128, and the
    outputs so that each multiprocessor has a program, or two. A long sum reads so much for each product that threads
    which ask for it 16 bytes at a time would hold the products up.
    """
    if COPIED_ROWS < M <= most:
        if M <= 64:
            return next((t for t in _MAPPED_64 if outputs <= t.outputs * HOPPER_PROCESSORS), _MAPPED_64[-1])
        return Tile(32, 128, 128, 4, 5, True) if M <= 128 else Tile(64, 128, 64, 4, 8, True)
    block_t = max(8, min(64, int(triton.next_power_of_2(M))))
    many = outputs >= 16384 or (M > 16 and capability[0] == 9)
    block_o, block_k = (64, 128) if many else (32, 256 if block_t <= 16 else 128)
    wider = many and block_t >= 16 and capability[0] == 9
    alone = wider and outputs <= block_o * HOPPER_PROCESSORS
    stages = (208 if alone else 104 if capability[0] == 9 else 72) * 1024 // ((block_o + block_t) * block_k * 2)
    return Tile(block_o, block_t, block_k, 4, stages if wider else stages + 1)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index) if index >= 0 else (9, 0)


@triton.jit
def _mapped_sums(
    x_map, w_map, tile, K, late, LATE: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Rows on the left: the wider instruction has 64 there, and a program may have fewer outputs.

    LATE: x's columns from ``late`` on, where a block begins, are there once the kernel before has ended.
    """
    sums = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for start in range(0, late if LATE else K, BLOCK_K):
        w = w_map.load([tile * BLOCK_O, start])
        x = x_map.load([tl.program_id(1) * BLOCK_T, start])
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    if LATE:
        gdc_wait()
        for start in range(late, K, BLOCK_K):
            w = w_map.load([tile * BLOCK_O, start])
            x = x_map.load([tl.program_id(1) * BLOCK_T, start])
            sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    return tl.trans(sums)


@triton.jit(
    do_not_specialize=[
        "M", "K8", "x_stride8", "w0_stride8", "w1_stride8", "w2_stride8", "low_stride", "y_stride",
        "outputs0", "outputs1", "outputs2", "biased0", "biased1", "biased2", "at0", "at1", "at2",
        "rank0", "rank1", "rank2", "late",
    ]
)  # fmt: skip
def _ordered_matmul(
    x_ptr, low_ptr, y_ptr, w0_ptr, w1_ptr, w2_ptr, b0_ptr, b1_ptr, b2_ptr, bias0_ptr, bias1_ptr, bias2_ptr,
    M, K8, x_stride8, low_stride, y_stride, w0_stride8, w1_stride8, w2_stride8, outputs0, outputs1, outputs2,
    biased0, biased1, biased2, at0, at1, at2, rank0, rank1, rank2, scaling0, scaling1, scaling2,
    x_map, w0_map, late,
    MEMBERS: tl.constexpr, RANK: tl.constexpr, WHOLE: tl.constexpr, BIASED: tl.constexpr, EVEN: tl.constexpr,
    OVERLAP: tl.constexpr, MAPPED: tl.constexpr, LATE: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of a member's outputs for a tile of rows. Strides and K come in eights: rows are aligned.

    OVERLAP: it begins while the kernel before it runs, which makes low, and nothing else that is read here.
    MAPPED: x and the one weight are read by descriptors; beyond their ends are zeros. LATE: see ``_mapped_sums``.
    """
    tile, column = tl.program_id(0), 0
    w_ptr, stride8, outputs = w0_ptr, w0_stride8, outputs0
    b_ptr, at, rank, scaling, bias_ptr, biased = b0_ptr, at0, rank0, scaling0, bias0_ptr, biased0
    if MEMBERS > 1:
        before = tl.cdiv(outputs0, BLOCK_O)
        if tl.program_id(0) >= before:
            tile, column = tl.program_id(0) - before, outputs0
            w_ptr, stride8, outputs = w1_ptr, w1_stride8, outputs1
            b_ptr, at, rank, scaling, bias_ptr, biased = b1_ptr, at1, rank1, scaling1, bias1_ptr, biased1
    if MEMBERS > 2:
        before = tl.cdiv(outputs0, BLOCK_O) + tl.cdiv(outputs1, BLOCK_O)
        if tl.program_id(0) >= before:
            tile, column = tl.program_id(0) - before, outputs0 + outputs1
            w_ptr, stride8, outputs = w2_ptr, w2_stride8, outputs2
            b_ptr, at, rank, scaling, bias_ptr, biased = b2_ptr, at2, rank2, scaling2, bias2_ptr, biased2
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    o = tile * BLOCK_O + tl.arange(0, BLOCK_O)
    t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < M
    row = tl.minimum(o, outputs - 1).to(tl.int64)  # past the last output the last is made again, and not stored
    # Read now, needed last: these reads wait beside the weights'. Masks come last too: what is masked here would be
    # written to shared memory at once, and the weights' reads wait for it.
    if RANK > 0:
        r = tl.arange(0, RANK)
        width, column_r = (RANK, r) if WHOLE else (rank, tl.minimum(r, tl.maximum(rank - 1, 0)))
        b = tl.load(b_ptr + row[:, None] * width + column_r[None, :])
        low_row = tl.minimum(t, M - 1).to(tl.int64)
        low_at = low_ptr + low_row[:, None] * low_stride + at + column_r[None, :]
        if not OVERLAP:
            low = tl.load(low_at)
    if BIASED:
        bias = tl.load(bias_ptr + o, mask=o < biased, other=0.0)
    k = tl.arange(0, BLOCK_K)
    w_at = w_ptr + row[:, None] * (stride8 * 8) + k[None, :]
    x_at = x_ptr + t.to(tl.int64)[:, None] * (x_stride8 * 8) + k[None, :]
    whole = K8 * 8 // BLOCK_K * BLOCK_K
    if MAPPED:
        acc = _mapped_sums(x_map, w0_map, tile, K8 * 8, late, LATE, BLOCK_O, BLOCK_T, BLOCK_K)
    else:
        acc = tl.zeros((BLOCK_O, BLOCK_T), tl.float32)
        for start in range(0, whole, BLOCK_K):
            w = tl.load(w_at + start)
            x = tl.load(x_at + start, mask=live[:, None], other=0.0)
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        if not EVEN:  # the rest, apart: masks on every step's loads would cost a quarter more
            inside = (whole + k < K8 * 8)[None, :]
            w = tl.load(w_at + whole, mask=inside, other=0.0)
            x = tl.load(x_at + whole, mask=live[:, None] & inside, other=0.0)
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
    y = acc.to(dtype)
    if OVERLAP:
        gdc_wait()
        low = tl.load(low_at, cache_modifier=".cg")
    if RANK > 0:
        ranked = (r < rank)[None, :]
        b = tl.where((o < outputs)[:, None] & ranked, b, 0.0)
        low = tl.where(live[:, None] & ranked, low, 0.0)
        added = (tl.dot(b, tl.trans(low), input_precision="ieee") * scaling).to(dtype)
        if BIASED:
            added = (added.to(tl.float32) + bias.to(tl.float32)[:, None]).to(dtype)
        y = (y.to(tl.float32) + added.to(tl.float32)).to(dtype)
    elif BIASED:
        y = (y.to(tl.float32) + bias.to(tl.float32)[:, None]).to(dtype)
    y_at = y_ptr + t.to(tl.int64)[None, :] * y_stride + column + o[:, None]
    tl.store(y_at, y, mask=(o < outputs)[:, None] & live[None, :])


_launch = Launcher(_ordered_matmul)


def _maps(x_MI: torch.Tensor, member: DenseMember, outputs: int, rows: int, inputs: int) -> tuple[Any, Any]:
    """Descriptors of x and the weight, in blocks of a program's step."""
    return TensorDescriptor.from_tensor(x_MI, [rows, inputs]), TensorDescriptor.from_tensor(
        member.weight_OI, [outputs, inputs]
    )


def ordered_matmul(
    x_MI: torch.Tensor,
    members: Sequence[DenseMember],
    low_MR: torch.Tensor | None,
    out_MO: torch.Tensor,
    tile: Tile | None = None,
    overlap: bool = False,
    late: int = 0,
) -> None:
    """As ``reference.ordered_matmul.ordered_matmul``; x's rows and the weights' are aligned to 16 bytes.

    Args:
        tile: instead of :func:`tile_for`'s choice, for measurements.
        overlap: the kernel launched just before makes ``low_MR``, and nothing else that is read here: run beside it
            (on Hopper; elsewhere after it, as usual). It was launched as usual, or lets others begin only behind its
            own wait (:func:`pronghorn.kernels.launch.chained`): x is read before this one waits.
        late: likewise, where the copy engine brings the inputs: x's columns before these are read before it waits.
    """
    (M, K), count = x_MI.shape, len(members)
    if M == 0:
        return
    capability = _capability(x_MI.get_device())
    block_o, block_t, block_k, num_warps, num_stages, mapped = tile or tile_for(
        M, out_MO.shape[1], capability, mapped_rows(members, late > 0)
    )
    if mapped and count > 1:
        raise ValueError(f"{count} members by a tile whose inputs the copy engine brings; give one, or another tile")
    three = [*members, *[members[0]] * (3 - count)]
    counts = [m.weight_OI.shape[0] for m in members] + [0] * (3 - count)
    ranks = [m.rank if low_MR is not None else 0 for m in three]
    block_r = max(16, int(triton.next_power_of_2(max(ranks)))) if any(ranks) else 0
    overlap = overlap and block_r > 0 and x_MI.is_cuda and capability >= (9, 0)
    late = late // block_k * block_k if mapped and x_MI.is_cuda else 0
    options = {"launch_pdl": True} if overlap or late else {}
    with torch.cuda.device_of(x_MI):
        _launch(
            (sum(-(-n // block_o) for n in counts), triton.cdiv(M, block_t)),
            x_MI, x_MI if low_MR is None else low_MR, out_MO,
            *(m.weight_OI for m in three),
            *(m.weight_OI if m.b_Or is None else m.b_Or for m in three),
            *(m.weight_OI if m.bias_O is None else m.bias_O for m in three),
            M, K // 8, x_MI.stride(0) // 8, 0 if low_MR is None else low_MR.stride(0), out_MO.stride(0),
            *(m.weight_OI.stride(0) // 8 for m in three), *counts,
            *(0 if m.bias_O is None else n for m, n in zip(three, counts)),
            *(m.at for m in three), *ranks, *(m.scaling for m in three),
            *(_maps(x_MI, members[0], block_o, block_t, block_k) if mapped else (x_MI, x_MI)), late,
            count, block_r, all(r == block_r for r in ranks),
            any(m.bias_O is not None for m in members), K % block_k == 0, overlap, mapped, late > 0,
            block_o, block_t, block_k,
            num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False, **options,
        )  # fmt: skip

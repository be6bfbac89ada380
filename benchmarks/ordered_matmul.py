"""Products of few rows with 16-bit weights in the trainer's order: the projections of an 8B Llama with adapters of 32.

    python -m benchmarks.ordered_matmul

Cases ``kernel/ordered_matmul/<projection>/<rows>`` have ``ms`` of one call and ``floor_ms``, the time that the weights
take at this GPU's measured copy bandwidth. ``pronghorn`` is the base as it lies with the adapter and its roundings
behind it, ``pronghorn+low_rank`` the same with ``x A^T`` before it, as a decode step has it; ``pronghorn-held`` a table
``[W | s B]`` with x and its low rank side by side, and ``pronghorn-held+chain`` a norm, ``x A^T`` and that product one
after another, the product begun beside ``x A^T`` where it can (``torch-held+chain``: by the matrix library, at as many
rows as it sums in order). ``torch`` is the product with the weight alone at so many rows, whose sum has an order of its
own, and ``torch-ordered`` the same at as many rows as cuBLAS sums in order. Cases
``kernel/low_rank/<projection>/<rows>`` are ``x A^T``, with the floor of reading A, and at 4,096 rows x. Calls on
weights of their own, 512 MiB at least, are captured in one CUDA graph, so that none is found in the L2 cache.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch

from benchmarks.elementwise import Call, graphed, normal
from benchmarks.nf4 import copy_bytes_per_ms
from benchmarks.ordered_attention import run_all
from benchmarks.results import Results, arguments, start
from pronghorn.kernels import low_rank_triton, ordered_matmul_triton
from pronghorn.kernels.launch import chained
from pronghorn.kernels.low_rank import low_rank
from pronghorn.kernels.ordered_matmul import MAX_ROWS, DenseMember, ordered_matmul
from pronghorn.kernels.ordered_matmul_triton import Tile
from pronghorn.kernels.rms_norm import norm_forward
from pronghorn.lora.fused import ORDERED_ROWS
from pronghorn.rollout.native.products import align_of

BYTES = 1 << 29
RANK = 32
ROWS = (1, 6, 16, 32, 64, 128, 256)
MANY = 4096  # rows of a prefill step


class Shape(NamedTuple):
    """Outputs of the members, inputs, and rows from which on cuBLAS sums in order."""

    outputs: tuple[int, ...]
    inputs: int
    ordered: int


SHAPES = {
    "qkv": Shape((4096, 1024, 1024), 4096, 64),
    "o": Shape((4096,), 4096, 64),
    "gate_up": Shape((14336, 14336), 4096, 64),
    "down": Shape((4096,), 14336, ORDERED_ROWS),
}
TILES = [
    Tile(outputs, rows, inputs, warps, stages)
    for rows in (8, 16, 32, 64)
    for outputs, inputs, warps, stages in (
        (16, 256, 1, 5), (16, 128, 1, 9), (32, 256, 2, 5), (32, 256, 4, 5), (32, 128, 4, 9), (32, 128, 4, 5),
        (64, 128, 4, 5), (64, 128, 4, 4), (64, 256, 4, 4), (128, 64, 4, 5), (128, 128, 8, 4),
    )
    if stages * (outputs + rows) * inputs * 2 <= 225 * 1024
]  # fmt: skip
LOW_TILES = [
    low_rank_triton.Tile(16, 32, 128, 4, 4),
    low_rank_triton.Tile(16, 128, 128, 4, 4),
    *(low_rank_triton.Tile(rows, 16, 256, warps, stages) for rows in (8, 16) for warps in (1, 4) for stages in (3, 8)),
    *(low_rank_triton.Tile(32, 32, 128, 4, stages) for stages in (4, 8)),
]


def with_low(x_MI: torch.Tensor, a_RI: torch.Tensor, members: list[DenseMember]) -> torch.Tensor:
    """As a decode step has it: the product begins beside ``x A^T``."""
    return ordered_matmul(x_MI, members, low_rank(x_MI, a_RI), overlap=True)


def held_chain(
    x_MI: torch.Tensor,
    weight_I: torch.Tensor,
    table_TK: torch.Tensor,
    a_RI: torch.Tensor,
    held: torch.Tensor,
    own: bool,
) -> None:
    """Norm, ``x A^T`` beside it in ``table_TK``, and the product of both."""
    M, I = x_MI.shape  # noqa: E741 - shape letters
    with chained():
        norm_forward(x_MI, weight_I, 1e-5, table_TK[:M, :I])
        low_rank(table_TK[:M, :I], a_RI, table_TK[:M, I : I + len(a_RI)])
        if own:
            ordered_matmul(table_TK[:M], [DenseMember(held)], late=I if M <= MAX_ROWS else 0)  # as a rollout does
            return
    torch.mm(table_TK, held.T)


def per_call(calls: list[Call], stream: torch.cuda.Stream) -> float:
    return graphed(partial(run_all, calls), stream) / len(calls)


def bench(results: Results, name: str, rows: int, bandwidth: float, stream: torch.cuda.Stream, every: bool) -> None:
    shape = SHAPES[name]
    total, K, R = sum(shape.outputs), shape.inputs, RANK * len(shape.outputs)
    beside = -(-(K + R) // align_of(K)) * align_of(K) - K  # columns of a kept table beside the weight: zeros behind s B
    copies = max(1, -(-BYTES // (total * K * 2)))
    with torch.cuda.stream(stream):
        x, low, many = normal(rows, K), normal(rows, R), normal(max(rows, shape.ordered), K)
        both = torch.zeros(max(rows, shape.ordered), K + beside, dtype=x.dtype, device="cuda")
        wide, tables = normal(rows, K + beside), [normal(total, K + beside) for _ in range(copies)]
        weights = [table[:, :K] for table in tables]
        bs = [normal(outputs, RANK) for outputs in shape.outputs]
        groups = [
            [DenseMember(w, b, i * RANK) for i, (w, b) in enumerate(zip(weight.split(list(shape.outputs)), bs))]
            for weight in (w.contiguous() for w in weights)
        ]
        a_RI, spare = normal(R, K), [normal(R, K) for _ in range(-(-(1 << 28) // (R * K * 2)))]
        calls: dict[str, list[Call]] = {
            "pronghorn": [partial(ordered_matmul, x, members, low) for members in groups],
            "pronghorn+low_rank": [partial(with_low, x, a, members) for a, members in zip(spare, groups)],
            "pronghorn-held": [partial(ordered_matmul, wide, [DenseMember(table)]) for table in tables],
            **{
                f"{impl}-held+chain": [
                    partial(held_chain, x, normal(K), both, a, t, own) for a, t in zip(spare, tables)
                ]
                for impl, own in (("pronghorn", True), ("torch", False))
            },
            "torch": [partial(torch.mm, x, w.T) for w in weights],
            "torch-ordered": [partial(torch.mm, many, w.T) for w in weights],
        }
    stream.synchronize()
    case, floor = f"kernel/ordered_matmul/{name}/{rows}", total * K * 2 / bandwidth
    for impl, some in calls.items():
        results.add(case, impl, ms=per_call(some, stream), floor_ms=floor)
    ms = per_call([partial(low_rank, x, a) for a in spare], stream)
    results.add(f"kernel/low_rank/{name}/{rows}", "pronghorn", ms=ms, floor_ms=a_RI.nbytes / bandwidth)
    if every:
        low_calls = [partial(low_rank_triton.low_rank, x, a, low) for a in spare]
        for kind in LOW_TILES:
            if kind.rows >= min(rows, 16):
                ms = per_call([partial(call, tile=kind) for call in low_calls], stream)
                case_low, impl = f"kernel/low_rank/{name}/{rows}", f"tile {'/'.join(map(str, kind))}"
                results.add(case_low, impl, ms=ms, floor_ms=a_RI.nbytes / bandwidth)
        out = torch.empty(rows, total, dtype=x.dtype, device="cuda")
        for tile in TILES:
            if min(rows, 64) <= 2 * tile.rows and tile.rows <= max(16, 2 * rows):
                name = "/".join(map(str, tile))
                tiled: list[Call] = [
                    partial(ordered_matmul_triton.ordered_matmul, x, members, low, out, tile) for members in groups
                ]
                results.add(case, f"tile {name}", ms=per_call(tiled, stream), floor_ms=floor)
                tiled = [
                    partial(ordered_matmul_triton.ordered_matmul, wide, [DenseMember(table)], None, out, tile)
                    for table in tables
                ]
                results.add(case, f"held {name}", ms=per_call(tiled, stream), floor_ms=floor)


def bench_low_rank(results: Results, name: str, bandwidth: float, stream: torch.cuda.Stream) -> None:
    """As prefill and ordered scoring have it: reading x is all. ``torch`` has an order of its own."""
    K, R = SHAPES[name].inputs, RANK * len(SHAPES[name].outputs)
    with torch.cuda.stream(stream):
        xs, a = [normal(MANY, K) for _ in range(-(-BYTES // (MANY * K * 2)))], normal(R, K)
    stream.synchronize()
    case, floor = f"kernel/low_rank/{name}/{MANY}", xs[0].nbytes / bandwidth
    results.add(case, "pronghorn", ms=per_call([partial(low_rank, x, a) for x in xs], stream), floor_ms=floor)
    results.add(case, "torch", ms=per_call([partial(torch.mm, x, a.T) for x in xs], stream), floor_ms=floor)


def main() -> None:
    parser = arguments("Products of few rows with 16-bit weights in the trainer's order")
    parser.add_argument("--configs", action="store_true", help="every launch configuration too; writes nothing")
    parser.add_argument("--shapes", default=",".join(SHAPES), help="which projections")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    args = parser.parse_args()
    results = start("ordered_matmul", (), args)
    stream = torch.cuda.Stream()
    bandwidth = copy_bytes_per_ms()
    results.add("device/copy", "torch", gb_per_s=bandwidth / 1e6)
    for name in args.shapes.split(","):
        for rows in map(int, args.rows.split(",")):
            if rows > 128 and SHAPES[name].ordered < ORDERED_ROWS:
                continue  # a rollout leaves these to the matrix library
            bench(results, name, rows, bandwidth, stream, args.configs)
        bench_low_rank(results, name, bandwidth, stream)
        if not args.configs:
            results.write(args.out)  # of the projections so far: what comes may be cut off


if __name__ == "__main__":
    main()

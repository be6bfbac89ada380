"""A product with its adapters in one launch: the projections of an 8B Llama whose weights are kept, adapters of 32.

    python -m benchmarks.adapted_matmul

Cases ``kernel/adapted_matmul/<projection>/<rows>`` have ``ms`` of one call and ``floor_ms``, the time that the weights
take at this GPU's measured copy bandwidth. ``pronghorn`` makes ``x A^T`` and multiplies, ``pronghorn+chain`` has a norm
before it, as a decode step has. ``apart+chain`` and ``torch+chain`` are a norm, ``x A^T`` and the product one behind
the other, by our own kernel and by the matrix library, at as many rows as that sums in order. Calls on weights of their
own, 512 MiB at least, are captured in one CUDA graph, so that none is found in the L2 cache.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.elementwise import Call, normal
from benchmarks.nf4 import copy_bytes_per_ms
from benchmarks.ordered_matmul import BYTES, RANK, SHAPES, held_chain, per_call
from benchmarks.results import Results, arguments, start
from pronghorn.kernels.adapted_matmul import adapted_matmul
from pronghorn.kernels.launch import before_a_start, chained
from pronghorn.kernels.rms_norm import norm_forward
from pronghorn.rollout.native.products import align_of

PROJECTIONS = ("qkv", "o", "down")
ROWS = (32, 64, 128, 256)


def chain(
    x_MI: torch.Tensor, weight_I: torch.Tensor, table_TK: torch.Tensor, a_RI: torch.Tensor, held_OK: torch.Tensor
) -> None:
    """A norm, and the product of what it writes."""
    M, I = x_MI.shape  # noqa: E741 - shape letters
    with chained():
        with before_a_start():
            norm_forward(x_MI, weight_I, 1e-5, table_TK[:M, :I])
        adapted_matmul(table_TK, M, held_OK, a_RI)


def bench(results: Results, name: str, rows: int, bandwidth: float, stream: torch.cuda.Stream) -> None:
    shape = SHAPES[name]
    total, K, R = sum(shape.outputs), shape.inputs, RANK * len(shape.outputs)
    width = -(-(K + R) // align_of(K)) * align_of(K)
    copies = max(2, -(-BYTES // (total * width * 2)))
    with torch.cuda.stream(stream):
        x, weight = normal(rows, K), normal(K)
        table = torch.zeros(max(rows, shape.ordered), width, dtype=x.dtype, device="cuda")
        table[:rows, :K] = x
        tables, spare = [normal(total, width) for _ in range(copies)], [normal(R, K) for _ in range(copies)]
        calls: dict[str, list[Call]] = {
            "pronghorn": [partial(adapted_matmul, table, rows, held, a) for a, held in zip(spare, tables)],
            "pronghorn+chain": [partial(chain, x, weight, table, a, held) for a, held in zip(spare, tables)],
            **{
                impl: [partial(held_chain, x, weight, table, a, held, own) for a, held in zip(spare, tables)]
                for impl, own in (("apart+chain", True), ("torch+chain", False))
            },
        }
    stream.synchronize()
    for impl, some in calls.items():
        floor = total * K * 2 / bandwidth
        results.add(f"kernel/adapted_matmul/{name}/{rows}", impl, ms=per_call(some, stream), floor_ms=floor)


def main() -> None:
    parser = arguments("A product with its adapters in one launch")
    parser.add_argument("--projections", default=",".join(PROJECTIONS))
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    args = parser.parse_args()
    results = start("adapted_matmul", (), args)
    stream = torch.cuda.Stream()
    bandwidth = copy_bytes_per_ms()
    results.add("device/copy", "torch", gb_per_s=bandwidth / 1e6)
    for name in args.projections.split(","):
        for rows in map(int, args.rows.split(",")):
            bench(results, name, rows, bandwidth, stream)
        results.write(args.out)  # of the projections so far: what comes may be cut off


if __name__ == "__main__":
    main()

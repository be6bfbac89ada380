"""Products of few rows with 4-bit weights, adapters of rank 32 in the same launch: the projections of an 8B Llama.

    python -m benchmarks.nf4_matmul

Cases ``kernel/nf4_matmul/<projections>/<rows>`` have ``ms`` of one call and ``floor_ms``, the time that codes and
scales take at this GPU's measured copy bandwidth; ``pronghorn+low_rank`` has ``x A^T`` beside the product, as a decode
step has it with more than 8 rows; ``pronghorn-chain`` has the norm of x before them, all three launched in a chain, and
``pronghorn-step``, up to 8 rows, is what a decode step has: the norm, and the product that makes its start meanwhile
and ``x A^T`` itself. Peers in the same run, without an adapter: bitsandbytes' own product of its 4-bit weights, each
projection by itself, and torch's with the weights in bf16. Calls on weights of their own, 512 MiB at least, are
captured in one CUDA graph, so that none is found in the L2 cache. ``kernel/nf4_matmul/layers/<rows>`` is the sum over
the 32 layers of an 8B model. With ``--configs`` other launch configurations are timed as well:
``tile <groups>/<ring>/...``, and the same beside ``x A^T``.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial

import torch

from benchmarks.elementwise import Call, normal
from benchmarks.nf4 import copy_bytes_per_ms
from benchmarks.ordered_matmul import BYTES, RANK, SHAPES, per_call
from benchmarks.results import Results, arguments, start
from pronghorn.kernels.launch import before_a_start, chained
from pronghorn.kernels.low_rank import low_rank
from pronghorn.kernels.nf4_matmul import Member, makes_low, nf4_matmul
from pronghorn.kernels.nf4_matmul_cuda import HOPPER_SHARED, Tile
from pronghorn.kernels.nf4_matmul_cuda import nf4_matmul as launch
from pronghorn.kernels.rms_norm import norm_forward
from pronghorn.quant.nf4 import NF4Tensor

ROWS = (1, 6, 16, 32, 64)
LAYERS = 32
MANY, FEW = "gate_up", "qkv o down"
CONFIGS = {
    (MANY, 8): ((16, 1, 2, 8, 4096, 1, 256, 4), (14, 1, 2, 8, 4096, 1, 256), (7, 1, 4, 8, 4096, 1, 256)),
    (MANY, 16): ((7, 1, 4, 16, 4096, 1, 256),),
    (MANY, 32): ((7, 1, 4, 32, 1024, 2, 256),),
    (MANY, 64): ((7, 1, 4, 64, 256, 3, 256),),
    (FEW, 8): (
        (3, 4, 2, 8, 1024, 4, 256), (3, 4, 2, 8, 1024, 4, 128), (3, 5, 2, 8, 1024, 4, 128), (2, 4, 2, 8, 1024, 4, 256),
        (2, 5, 2, 8, 1024, 4, 256), (2, 6, 2, 8, 1024, 4, 256), (2, 6, 2, 8, 1024, 4, 128), (2, 4, 2, 8, 512, 8, 256),
    ),
    (FEW, 16): ((3, 4, 2, 16, 1024, 4, 128), (2, 4, 2, 16, 1024, 4, 256), (2, 6, 2, 16, 1024, 4, 128)),
    (FEW, 32): ((3, 4, 2, 32, 512, 3, 128), (2, 6, 2, 32, 512, 3, 128)),
    (FEW, 64): ((3, 4, 2, 64, 256, 3, 128), (2, 6, 2, 64, 256, 3, 128)),
}  # fmt: skip
"""By projections and the kernel's rows."""


def with_low(x_MI: torch.Tensor, a_RI: torch.Tensor, members: list[Member]) -> torch.Tensor:
    """As a decode step has it: the product begins beside ``x A^T``."""
    return nf4_matmul(x_MI, members, low_rank(x_MI, a_RI), overlap=True)


def in_chain(x_MI: torch.Tensor, weight_I: torch.Tensor, a_RI: torch.Tensor, members: list[Member]) -> torch.Tensor:
    """Norm, ``x A^T`` and product, each begun while the one before ends."""
    with chained():
        return with_low(norm_forward(x_MI, weight_I, 1e-5, None)[0], a_RI, members)


def in_step(
    x_MI: torch.Tensor, weight_I: torch.Tensor, a_RI: torch.Tensor, members: list[Member], low_MR: torch.Tensor
) -> torch.Tensor:
    """Norm and product as a decode step of few rows chains them."""
    with chained():
        with before_a_start():
            normed_MI = norm_forward(x_MI, weight_I, 1e-5, None)[0]
        return nf4_matmul(normed_MI, members, low_MR, a_RI=a_RI)


def tile_with_low(x_MI: torch.Tensor, a_RI: torch.Tensor, members: list[Member], out: torch.Tensor, tile: Tile) -> None:
    launch(x_MI, members, low_rank(x_MI, a_RI), out, tile, overlap=True)


def bench(
    results: Results,
    name: str,
    bandwidth: float,
    stream: torch.cuda.Stream,
    sums: dict[tuple[int, str], list[float]],
    configs: bool,
    many_rows: list[int],
) -> None:
    from bitsandbytes import functional as bnb
    from bitsandbytes import matmul_4bit

    shape = SHAPES[name]
    K, R = shape.inputs, RANK * len(shape.outputs)
    copies = max(1, -(-BYTES // (sum(shape.outputs) * K // 2)))
    with torch.cuda.stream(stream):
        dense = [normal(outputs, K) for outputs in shape.outputs]
        bs = [normal(outputs, RANK) for outputs in shape.outputs]
        groups = [
            [Member(NF4Tensor.quantize(w).in_tiles(), b, i * RANK, None) for i, (w, b) in enumerate(zip(dense, bs))]
            for _ in range(copies)
        ]
        packed = [
            [bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in dense] for _ in range(copies)
        ]
        joined = [torch.cat(dense) for _ in range(max(1, copies // 4))]
        many_a = [normal(R, K) for _ in range(copies)]
        weight_I = normal(K)
    stream.synchronize()
    floor = sum(NF4Tensor.quantize(w).nbytes for w in dense) / bandwidth
    for rows in many_rows:
        with torch.cuda.stream(stream):
            x, low, made = normal(rows, K), normal(rows, R), normal(rows, R)
        calls: dict[str, list[Call]] = {
            "pronghorn": [partial(nf4_matmul, x, members, low) for members in groups],
            "pronghorn+low_rank": [partial(with_low, x, a, members) for a, members in zip(many_a, groups)],
            "pronghorn-chain": [partial(in_chain, x, weight_I, a, m) for a, m in zip(many_a, groups)],
            "pronghorn-step": [partial(in_step, x, weight_I, a, m, made) for a, m in zip(many_a, groups)],
            "bitsandbytes": [partial(matmul_4bit, x, w.t(), state) for own in packed for w, state in own],
            "torch-bf16": [partial(torch.mm, x, w.T) for w in joined],
        }
        if not makes_low(rows, groups[0], many_a[0]):
            del calls["pronghorn-step"]
        for impl, some in calls.items():
            each = len(shape.outputs) if impl == "bitsandbytes" else 1
            ms = per_call(some, stream) * each
            results.add(f"kernel/nf4_matmul/{name}/{rows}", impl, ms=ms, floor_ms=floor)
            sums[rows, impl].append(ms)
        if not configs:
            continue
        with torch.cuda.stream(stream):
            out = torch.empty(rows, sum(shape.outputs), dtype=x.dtype, device="cuda")
        for (names, most), tiles in CONFIGS.items():
            for tile in (Tile(*macros) for macros in tiles):
                least = 0 if most == 8 else most // 2
                if name in names.split() and least < rows <= most and tile.shared_bytes(K, True) <= HOPPER_SHARED:
                    alone: list[Call] = [partial(launch, x, members, low, out, tile) for members in groups]
                    beside: list[Call] = [partial(tile_with_low, x, a, m, out, tile) for a, m in zip(many_a, groups)]
                    for impl, some in (("tile", alone), ("tile+low_rank", beside)):
                        case = f"kernel/nf4_matmul/{name}/{rows}"
                        results.add(case, f"{impl} {'/'.join(map(str, tile))}", ms=per_call(some, stream))


def main() -> None:
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--configs", action="store_true", help="time other launch configurations too")
    parser.add_argument("--rows", default=",".join(map(str, ROWS)))
    args = parser.parse_args()
    results = start("nf4_matmul", ("bitsandbytes",), args)
    bandwidth, stream = copy_bytes_per_ms(), torch.cuda.Stream()
    results.add("device/copy", "torch", gb_per_s=bandwidth / 1e6)
    sums: dict[tuple[int, str], list[float]] = defaultdict(list)
    for name in SHAPES:
        bench(results, name, bandwidth, stream, sums, args.configs, [int(rows) for rows in args.rows.split(",")])
        torch.cuda.empty_cache()
    for (rows, impl), each in sums.items():
        if len(each) == len(SHAPES):  # a step of many rows has some products otherwise
            results.add(f"kernel/nf4_matmul/layers/{rows}", impl, ms=LAYERS * sum(each))
    results.write(args.out)


if __name__ == "__main__":
    main()

"""Ordered attention on the heads of an 8B Llama (32 query, 8 key/value heads of 128): decode steps and rows.

    python -m benchmarks.ordered_attention

Cases ``kernel/decode_attention/<rows>x<tokens>``, ``kernel/step_attention/<rows>x<tokens>`` (rotation and cache write
too, in a chain; ``apart`` is the same by two operations) and ``kernel/rope_kv/<rows>`` have ``ms`` of one layer's call
and ``floor_ms``, the time that the bytes it must read and write take at this GPU's measured copy bandwidth. Up to 32
layers with caches of their own (512 MiB at least, where 32 come to that) are captured in one CUDA graph, so that no
call finds its keys in the L2 cache. Cases ``kernel/ordered_attention/<rows>`` have ``ms``, ``tflops`` of the work that
causality leaves, and ``floor_ms`` at the rate that a large matrix product reached in the same run. ``impl`` ``torch``
is the attention of unordered training rows (flash or cuDNN); of a decode step it is varlen flash over the same keys,
packed beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from benchmarks.elementwise import Call, graphed, normal
from benchmarks.nf4 import copy_bytes_per_ms, matmul_flops_per_ms
from benchmarks.results import Results, arguments, start
from pronghorn.kernels import ordered_attention_triton, step_attention_cuda
from pronghorn.kernels.attention_cuda import flash_forward
from pronghorn.kernels.decode_attention import decode_attention, workspace_elements
from pronghorn.kernels.launch import chained
from pronghorn.kernels.ordered_attention_triton import Config
from pronghorn.kernels.ordered_rows import OrderedRows
from pronghorn.kernels.rope_kv import rope_and_write_kv
from pronghorn.kernels.spans import Spans
from pronghorn.kernels.step_attention import step_attention
from pronghorn.models.attention import PackedAttention

H, K, E, PAGE = 32, 8, 128, 16
SCALE = E**-0.5
LAYERS, BYTES = 32, 1 << 29

DECODE = [(rows, tokens) for tokens in (456, 4096) for rows in (1, 6, 64, 256)]
STEPS = [(rows, tokens) for tokens in (300, 500) for rows in (1, 6, 16)] + [(1, 4096), (6, 2000)]
ROWS: dict[str, tuple[list[int], list[int | None] | None]] = {
    "8x456": ([456] * 8, None),
    "1x8192": ([8192], None),
    "256+8x200": ([256, *[200] * 8], [None, *[0] * 8]),
    "1x32768": ([32768], None),
}
CONFIGS = {
    "128/8/5": Config(128, 8, 5),
    "128/8/3": Config(128, 8, 3),
    "128/8/7": Config(128, 8, 7),
    "64/4/5": Config(64, 4, 5),
    "64/4/3": Config(64, 4, 3),
}


def run_all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def bench_decode(results: Results, rows: int, tokens: int, bandwidth: float, stream: torch.cuda.Stream) -> None:
    """Tables as wide as the rows are long, blocks in any order."""
    width = -(-tokens // PAGE)
    moved = 2 * rows * tokens * K * E * 2 + 2 * rows * H * E * 2
    layers = max(1, min(LAYERS, -(-BYTES // moved)))
    with torch.cuda.stream(stream):
        q = normal(rows, H, E)
        caches = [[normal(rows * width, PAGE, K, E) for _ in range(2)] for _ in range(layers)]
        table = torch.randperm(rows * width, device="cuda").view(rows, width).int()
        lengths = torch.full((rows,), tokens, dtype=torch.int32, device="cuda")
        space = torch.empty(workspace_elements(rows, width * PAGE, H, E), device="cuda")
        calls = [partial(decode_attention, q, k, v, table, lengths, SCALE, space) for k, v in caches]
        spans = Spans((1,) * rows, (tokens,) * rows, False, torch.device("cuda"))
        packed = [[t.view(-1, K, E)[: rows * tokens] for t in pair] for pair in caches]
        flash = [partial(flash_forward, q, k, v, spans, SCALE) for k, v in packed]
    stream.synchronize()
    case = f"kernel/decode_attention/{rows}x{tokens}"
    for impl, some in (("pronghorn", calls), ("torch", flash)):
        ms = graphed(partial(run_all, some), stream) / layers
        results.add(case, impl, ms=ms, floor_ms=moved / bandwidth)


def bench_step(results: Results, rows: int, tokens: int, bandwidth: float, stream: torch.cuda.Stream) -> None:
    """Tables of whole segments, as a decoder's are."""
    width = -(-tokens // 256) * 256 // PAGE
    moved = 2 * rows * tokens * K * E * 2 + rows * (2 * H + 4 * K) * E * 2
    layers = max(1, min(LAYERS, -(-BYTES // moved)))
    with torch.cuda.stream(stream):
        q, k, v = normal(rows, H + 2 * K, E).split((H, K, K), dim=1)
        caches = [[normal(rows * width, PAGE, K, E) for _ in range(2)] for _ in range(layers)]
        table = torch.randperm(rows * width, device="cuda").view(rows, width).int()
        lengths = torch.full((rows,), tokens, dtype=torch.int32, device="cuda")
        angles = torch.rand(width * PAGE, E // 2, device="cuda").repeat(1, 2)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        space = torch.empty(workspace_elements(rows, width * PAGE, H, E), device="cuda")
        positions = lengths - 1
    stream.synchronize()

    def run() -> None:
        with chained():
            for keys, values in caches:
                step_attention(q, k, v, cos, sin, keys, values, table, positions, lengths, SCALE, space)

    at_once = step_attention_cuda.way_of
    for impl, way_of in (("pronghorn", at_once), ("apart", lambda *_: "the operations are measured")):
        step_attention_cuda.way_of = way_of
        ms = graphed(run, stream) / layers
        results.add(f"kernel/step_attention/{rows}x{tokens}", impl, ms=ms, floor_ms=moved / bandwidth)
    step_attention_cuda.way_of = at_once


def bench_rope_kv(results: Results, rows: int, bandwidth: float, stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        products = [normal(rows, H + 2 * K, E) for _ in range(LAYERS)]
        angles = torch.rand(4096, E // 2, device="cuda").repeat(1, 2)
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        caches = [[normal(rows * 29, PAGE, K, E) for _ in range(2)] for _ in range(LAYERS)]
        table = torch.randperm(rows * 29, device="cuda").view(rows, 29).int()
        positions = torch.full((rows,), 455, dtype=torch.int32, device="cuda")
        calls = [
            partial(rope_and_write_kv, q, k, v, cos, sin, keys, values, table, positions)
            for (q, k, v), (keys, values) in zip((x.split((H, K, K), dim=1) for x in products), caches)
        ]
    stream.synchronize()
    moved = 2 * products[0].nbytes + rows * (2 * K * E * 2 + 2 * E)
    ms = graphed(partial(run_all, calls), stream) / LAYERS
    results.add(f"kernel/rope_kv/{rows}", "pronghorn", ms=ms, floor_ms=moved / bandwidth)


def bench_rows(results: Results, case: str, rate: float, stream: torch.cuda.Stream, every: bool) -> None:
    lengths, prefix = ROWS[case]
    above = [0 if p is None else lengths[p] for p in (prefix or [None] * len(lengths))]
    flops = 4 * H * E * sum(n * (n + 1) // 2 + n * p for n, p in zip(lengths, above))
    with torch.cuda.stream(stream):
        q, k, v = (normal(sum(lengths), n, E) for n in (H, K, K))
        ordered = PackedAttention(lengths, "cuda", prefix, ordered=True)
        plain = PackedAttention(lengths, "cuda", prefix)
        calls: dict[str, Call] = {
            "pronghorn": partial(ordered.forward, q, k, v, SCALE),
            "torch": partial(plain.forward, q, k, v, SCALE),
        }
        if every:
            rows = OrderedRows.packed(lengths, torch.device("cuda"), prefix)
            run = ordered_attention_triton.ordered_attention_forward
            out = torch.empty_like(q)
            calls.update({f"config {name}": partial(run, q, k, v, rows, SCALE, out, c) for name, c in CONFIGS.items()})
    stream.synchronize()
    for impl, call in calls.items():
        ms = graphed(call, stream)
        results.add(f"kernel/ordered_attention/{case}", impl, ms=ms, tflops=flops / ms / 1e9, floor_ms=flops / rate)


def main() -> None:
    parser = arguments("Decode steps and rows of ordered attention on an 8B Llama's heads")
    parser.add_argument("--configs", action="store_true", help="every launch configuration too; writes nothing")
    args = parser.parse_args()
    results = start("ordered_attention", (), args)
    stream = torch.cuda.Stream()
    bandwidth, rate = copy_bytes_per_ms(), matmul_flops_per_ms()
    results.add("device/copy", "torch", gb_per_s=bandwidth / 1e6)
    results.add("device/matmul", "torch", tflops=rate / 1e9)
    for case in ROWS:
        bench_rows(results, case, rate, stream, args.configs)
    for rows in (1, 6, 64, 256):
        bench_rope_kv(results, rows, bandwidth, stream)
    for rows, tokens in STEPS:
        bench_step(results, rows, tokens, bandwidth, stream)
    for rows, tokens in DECODE:
        bench_decode(results, rows, tokens, bandwidth, stream)
    if not args.configs:
        results.write(args.out)


if __name__ == "__main__":
    main()

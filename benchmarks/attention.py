"""Attention of packed rows on the heads of an 8B Llama (32 query, 8 key/value heads of 128), forward and backward.

    python -m benchmarks.attention

Cases ``kernel/attention/<rows>`` with ``forward_ms`` and ``backward_ms`` of the GPU alone (every call captured in a
CUDA graph), ``host_ms`` of a forward as Python queues it, and ``forward_tflops``, ``backward_tflops`` of the work that
the mask leaves (backward 2.5 times forward). Peer in the same run: torch's ``scaled_dot_product_attention`` under
autograd, as padded rows where they differ in length. A case ``<p>+<G>x<c>`` is a prompt that G completions share, for
which the peer repeats the prompt in every row; ``n*`` means n such groups in one batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.elementwise import backward_of, graphed
from benchmarks.results import Results, arguments, start
from pronghorn.models.attention import PackedAttention

H, K, E = 32, 8, 128
SCALE = E**-0.5

ROWS: dict[str, list[int]] = {
    "2x2048": [2048] * 2,
    "8x2048": [2048] * 8,
    "1x32768": [32768],
    "9x456": [456] * 9,
    "uneven16": [317, 1200, 88, 640, 2048, 51, 933, 400, 275, 1511, 720, 163, 1024, 380, 599, 222],
}
SHARED: dict[str, tuple[int, int, int, int]] = {  # groups, prompt, completions, tokens of each
    "256+8x200": (1, 256, 8, 200),
    "4*256+8x200": (4, 256, 8, 200),
    "512+16x1024": (1, 512, 16, 1024),
    "1024+8x20000": (1, 1024, 8, 20000),
}


def inputs(T: int) -> list[torch.Tensor]:
    return [torch.randn(T, n, E, dtype=torch.bfloat16, device="cuda") for n in (H, K, K)]


def pairs(lengths: list[int]) -> int:
    """Query-key pairs that causal rows of these lengths see."""
    return sum(n * (n + 1) // 2 for n in lengths)


def host_ms(call: Callable[[], object]) -> float:
    """Time that Python takes to queue ``call``."""
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(20):
        call()
    spent = time.perf_counter() - begun
    torch.cuda.synchronize()
    return spent / 20 * 1e3


def record(
    results: Results, case: str, impl: str, forward: float, backward: float, seen: int, host: float | None = None
) -> None:
    flops = 4 * seen * H * E
    extra = {} if host is None else {"host_ms": host}
    results.add(
        f"kernel/attention/{case}",
        impl,
        forward_ms=forward,
        backward_ms=backward,
        forward_tflops=flops / forward / 1e9,
        backward_tflops=2.5 * flops / backward / 1e9,
        **extra,
    )


def bench_ours(results: Results, case: str, attention: PackedAttention, seen: int, stream: torch.cuda.Stream) -> None:
    with torch.cuda.stream(stream):
        q, k, v = inputs(sum(attention.row_lengths))
        do = torch.randn_like(q)
        o, stats = attention.forward(q, k, v, SCALE)
        forward = partial(attention.forward, q, k, v, SCALE)
        backward = partial(attention.backward, do, q, k, v, o, stats, SCALE)
        backward()
        host = host_ms(forward)
    stream.synchronize()
    record(results, case, "pronghorn", graphed(forward, stream), graphed(backward, stream), seen, host)
    print(f"  {attention.choice(torch.bfloat16, E)}", flush=True)


def bench_torch(results: Results, case: str, lengths: list[int], seen: int, stream: torch.cuda.Stream) -> None:
    """Padded to the longest row; ``seen`` counts no padding, so its TFLOP/s are of the same useful work."""
    B, S = len(lengths), max(lengths)
    with torch.cuda.stream(stream):
        leaves = [t.requires_grad_() for t in inputs(B * S)]
        q, k, v = (t.view(B, S, -1, E).transpose(1, 2) for t in leaves)
        call = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
        o = call()
        backward = backward_of(o, leaves)
        backward()
    stream.synchronize()
    record(results, case, "torch", graphed(call, stream), graphed(backward, stream), seen)


def main() -> None:
    parser = arguments("Attention of packed rows and of shared prompts on an 8B Llama's heads")
    parser.add_argument("--cases", default=",".join([*ROWS, *SHARED]))
    args = parser.parse_args()
    results = start("attention", (), args)
    stream = torch.cuda.Stream()
    for case in args.cases.split(","):
        if case in ROWS:
            lengths = ROWS[case]
            bench_ours(results, case, PackedAttention(lengths, "cuda"), pairs(lengths), stream)
            bench_torch(results, case, lengths, pairs(lengths), stream)
            continue
        groups, prompt, count, tokens = SHARED[case]
        prefix: list[int | None] = [above for g in range(groups) for above in (None, *[g * (count + 1)] * count)]
        shared = PackedAttention([prompt, *[tokens] * count] * groups, "cuda", prefix)
        whole = [prompt + tokens] * count * groups
        seen = groups * (pairs([prompt, *[tokens] * count]) + count * tokens * prompt)
        bench_ours(results, case, shared, seen, stream)
        bench_ours(results, f"{case}/repeated", PackedAttention(whole, "cuda"), pairs(whole), stream)
        if sum(whole) <= 65536:
            bench_torch(results, case, whole, pairs(whole), stream)
    results.write(args.out)


if __name__ == "__main__":
    main()

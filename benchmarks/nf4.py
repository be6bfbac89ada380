"""NF4 on the linear layers of an 8B Llama: dequantizing, and the forward pass of the 4-bit linear layer.

Run ``python -m benchmarks.nf4``. Peers in the same run: bitsandbytes, and torch's bf16 linear for the forward pass.
Dequantizing is captured in a CUDA graph, so that its times are the GPU's alone; the linear layer's have Python in them.
``floor_ms`` is the time that the bytes (at this GPU's measured copy bandwidth) or the products (at its measured bf16
matmul rate) take at least.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton.testing

from benchmarks.results import Results, arguments, start
from pronghorn.quant.linear4bit import Linear4bit
from pronghorn.quant.nf4 import NF4Tensor

SHAPES = [(14336, 4096), (4096, 14336), (4096, 4096), (1024, 4096)]
TOKENS = (1, 6, 16, 64, 256, 4096)


def measure(fn: Callable[[], object]) -> float:
    """Median ms of ``fn`` on the GPU, the L2 cache flushed before each run."""
    return float(triton.testing.do_bench(fn, warmup=50, rep=200, return_mode="median"))


def graphed(fn: Callable[[], object], stream: torch.cuda.Stream) -> float:
    """Median ms of ``fn`` replayed as a CUDA graph; ``fn`` runs a few times before it is captured."""
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        fn()
    return measure(graph.replay)


def copy_bytes_per_ms() -> float:
    """Bytes read and written in a ms by a large device-to-device copy."""
    a = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / measure(lambda: b.copy_(a))


def matmul_flops_per_ms() -> float:
    """Floating-point operations in a ms of a large bf16 matmul."""
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda")
    return 2 * 8192**3 / measure(lambda: a @ a)


def bench_dequantize(results: Results, bandwidth: float) -> None:
    from bitsandbytes import functional as bnb

    stream = torch.cuda.Stream()
    for shape in SHAPES:
        weight = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        nf4 = NF4Tensor.quantize(weight).in_tiles()
        packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        out = torch.empty_like(weight)
        same = torch.equal(nf4.dequantize().view(torch.int16), bnb.dequantize_4bit(packed, state).view(torch.int16))
        if not same:
            raise SystemExit(f"{shape}: dequantized weights differ from bitsandbytes'; nothing was measured")
        case, floor = f"kernel/nf4_dequantize/{shape[0]}x{shape[1]}", (nf4.nbytes + out.nbytes) / bandwidth
        results.add(case, "pronghorn", ms=graphed(partial(nf4.dequantize, out=out), stream), floor_ms=floor)
        results.add(case, "bitsandbytes", ms=graphed(partial(bnb.dequantize_4bit, packed, state, out=out), stream))


@torch.no_grad()
def bench_linear(results: Results, bandwidth: float, flops: float) -> None:
    from bitsandbytes.nn import Linear4bit as BnbLinear4bit
    from bitsandbytes.nn import Params4bit

    for n, k in SHAPES:
        dense = torch.nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="cuda")
        ours = Linear4bit.from_linear(dense)
        theirs = BnbLinear4bit(k, n, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
        theirs.weight = Params4bit(dense.weight.detach().cpu(), requires_grad=False, quant_type="nf4", module=theirs)
        theirs = theirs.cuda()
        for m in TOKENS:
            x = torch.randn(m, k, dtype=torch.bfloat16, device="cuda")
            case = f"kernel/nf4_linear/{n}x{k}/m{m}"
            moved = ours.nf4.nbytes + 2 * m * (n + k)
            floor = max(moved / bandwidth, 2 * m * n * k / flops)
            results.add(case, "pronghorn", ms=measure(partial(ours, x)), floor_ms=floor)
            results.add(case, "bitsandbytes", ms=measure(partial(theirs, x)))
            results.add(case, "torch-bf16", ms=measure(partial(dense, x)))


def main() -> None:
    args = arguments("NF4 dequantize and the 4-bit linear layer on the shapes of an 8B Llama").parse_args()
    results = start("nf4", ("bitsandbytes",), args)
    bandwidth, flops = copy_bytes_per_ms(), matmul_flops_per_ms()
    results.add("device/copy", "torch", gb_per_s=bandwidth / 1e6)
    results.add("device/matmul-bf16", "torch", tflops=flops / 1e9)
    bench_dequantize(results, bandwidth)
    bench_linear(results, bandwidth, flops)
    results.write(args.out)


if __name__ == "__main__":
    main()

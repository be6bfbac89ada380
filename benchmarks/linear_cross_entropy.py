"""The output head's losses on the shape of an 8B Llama: cross-entropy and log-probs with entropy, forward and backward.

Run ``python -m benchmarks.linear_cross_entropy``. Peers in the same run: torch's own linear and cross-entropy on whole
bf16 logits, and liger-kernel's fused one where it is installed. ``floor_ms`` is the time of the matrix products alone
at this GPU's measured bf16 rate (of ``logit_stats``: of the bytes, each read and written once, at its copy bandwidth);
``peak_gb`` (2^30 bytes) is what a call allocates at most beyond its inputs.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.nf4 import copy_bytes_per_ms, matmul_flops_per_ms, measure
from benchmarks.results import Results, arguments, start
from pronghorn.kernels.head import chunk_rows
from pronghorn.kernels.linear_cross_entropy import linear_cross_entropy
from pronghorn.kernels.linear_logprob import chosen_logprobs
from pronghorn.kernels.logits import logit_stats_

D, V = 4096, 128256
TOKENS = (4096, 1600)
CHUNKS = (256, 1024, 2048)

Call = Callable[[], object]


def peak_gb(fn: Call) -> float:
    """GB (2^30 bytes) that ``fn`` allocates beyond what there is."""
    fn()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    fn()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def step(loss: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> object:
    return torch.autograd.grad(loss(), leaves)


def bench_losses(results: Results, N: int, liger: Any, flops: float) -> None:
    hidden = torch.randn(N, D, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    weight = torch.randn(V, D, dtype=torch.bfloat16, device="cuda") * 0.02
    targets = torch.randint(V, (N,), device="cuda")
    count = torch.tensor(N, device="cuda")
    product = 2 * N * D * V / flops

    def record(case: str, impl: str, fn: Call, **more: float) -> None:
        results.add(f"kernel/{case}/{N}x{V}", impl, ms=measure(fn), peak_gb=peak_gb(fn), **more)

    def eager() -> torch.Tensor:
        return F.cross_entropy(F.linear(hidden, weight).float(), targets)

    def ours(**options: Any) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, targets, count, **options)

    def logprobs() -> torch.Tensor:
        return chosen_logprobs(hidden, weight, targets, with_entropy=True)[0].sum()

    def fused() -> torch.Tensor:
        loss = liger.LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, targets)
        return loss[0] if isinstance(loss, tuple) else loss

    frozen: list[tuple[str, str, Callable[[], torch.Tensor], dict[str, float]]] = [
        ("linear_cross_entropy", "pronghorn", ours, {"floor_ms": 2 * product}),
        ("linear_cross_entropy", "torch", eager, {}),
        ("chosen_logprobs_entropy", "pronghorn", logprobs, {"floor_ms": 2 * product}),
    ]
    frozen += [(f"linear_cross_entropy/chunk{c}", "pronghorn", partial(ours, chunk=c), {}) for c in CHUNKS if c < N]
    if liger:
        frozen.append(("linear_cross_entropy", "liger-kernel", fused, {}))
    for case, impl, loss, more in frozen:
        record(case, impl, partial(step, loss, [hidden]), **more)
    weight.requires_grad_(True)
    leaves = [hidden, weight]
    record("linear_cross_entropy_head", "pronghorn", partial(step, ours, leaves), floor_ms=3 * product)
    record("linear_cross_entropy_head", "torch", partial(step, eager, leaves))
    if liger:
        record("linear_cross_entropy_head", "liger-kernel", partial(step, fused, leaves))


def bench_kernel(results: Results, bandwidth: float) -> None:
    """The kernel alone over one chunk; each run reads what the one before it wrote, which costs the same."""
    C = chunk_rows(4096, V)
    x = torch.randn(C, V, device="cuda")
    targets = torch.randint(V, (C,), device="cuda")
    for name, options, moved in (
        ("logit_stats", {}, 4),
        ("logit_stats_entropy", {"with_entropy": True}, 4),
        ("logit_stats_gradient", {"gradient": torch.bfloat16}, 6),
        ("logit_stats_entropy_gradient", {"with_entropy": True, "gradient": torch.bfloat16}, 6),
    ):
        fn = partial(logit_stats_, x, targets, **options)  # type: ignore[arg-type]
        results.add(f"kernel/{name}/{C}x{V}", "pronghorn", ms=measure(fn), floor_ms=moved * C * V / bandwidth)


def main() -> None:
    args = arguments("Losses of the output head of an 8B Llama").parse_args()
    liger = importlib.import_module("liger_kernel.ops") if importlib.util.find_spec("liger_kernel") else None
    results = start("linear_cross_entropy", ("liger-kernel",) if liger else (), args)
    if liger is None:
        print("liger-kernel is not installed: it is left out")
    bandwidth, flops = copy_bytes_per_ms(), matmul_flops_per_ms()
    results.add("device/copy", "torch", gb_per_s=bandwidth / 1e6)
    results.add("device/matmul", "torch", tflops=flops / 1e9)
    bench_kernel(results, bandwidth)
    for N in TOKENS:
        bench_losses(results, N, liger, flops)
    results.write(args.out)


if __name__ == "__main__":
    main()

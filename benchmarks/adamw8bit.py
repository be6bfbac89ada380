"""8-bit AdamW over the LoRA tensors of an 8B Llama (rank 32 on seven projections of 32 layers: 448 tensors).

Run ``python -m benchmarks.adamw8bit``. Peer in the same run: bitsandbytes, whose classes ours are. ``ms`` is what the
GPU works in a step, ``host_ms`` how long ``step()`` holds the host (with nothing before it on the GPU), ``step_ms`` the
step until the GPU is done; ``floor_ms`` is the time that the bytes of parameters, gradients and moments take at this
GPU's measured copy bandwidth.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import bitsandbytes as bnb
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.nf4 import copy_bytes_per_ms
from benchmarks.results import Results, arguments, start
from pronghorn.optim import AdamW8bit, PagedAdamW8bit

RANK, LAYERS = 32, 32
PROJECTIONS = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
RUNS = 20


def lora_parameters() -> list[nn.Parameter]:
    """Float32 A ``[r, in]`` and B ``[out, r]`` of every projection, with gradients."""
    shapes = [shape for _ in range(LAYERS) for i, o in PROJECTIONS for shape in ((RANK, i), (o, RANK))]
    params = [nn.Parameter(torch.randn(shape, device="cuda") * 0.02) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param) * 1e-4
    return params


def moved_bytes(params: list[nn.Parameter]) -> int:
    """Parameters and both moments read and written, gradients read, scales read and written."""
    numel = sum(p.numel() for p in params)
    return numel * (2 * 4 + 4 + 2 * 2) + numel // 256 * 2 * 2 * 4


def gpu_ms(optimizer: Any) -> float:
    """What the GPU works in one step: the sum of its kernels and copies."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(5):
            optimizer.step()
        torch.cuda.synchronize()
    return float(sum(event.self_device_time_total for event in trace.key_averages())) / 5e3


def host_and_step_ms(optimizer: Any) -> tuple[float, float]:
    """Medians of the time until ``step()`` returns, and until the GPU is done."""
    host, whole = [], []
    for _ in range(RUNS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        optimizer.step()
        host.append(time.perf_counter() - started)
        torch.cuda.synchronize()
        whole.append(time.perf_counter() - started)
    return statistics.median(host) * 1e3, statistics.median(whole) * 1e3


def bench(results: Results, case: str, ours: Any, peer: Any, bandwidth: float) -> None:
    for impl, cls in (("pronghorn", ours), ("bitsandbytes", peer)):
        params = lora_parameters()
        optimizer = cls(params, lr=1e-5, weight_decay=0.01)
        for _ in range(3):
            optimizer.step()
        host_ms, step_ms = host_and_step_ms(optimizer)
        floor = {"floor_ms": moved_bytes(params) / bandwidth} if impl == "pronghorn" else {}
        results.add(f"kernel/{case}", impl, ms=gpu_ms(optimizer), host_ms=host_ms, step_ms=step_ms, **floor)


def main() -> None:
    args = arguments("8-bit AdamW over the LoRA tensors of an 8B Llama").parse_args()
    results = start("adamw8bit", ("bitsandbytes",), args)
    bandwidth = copy_bytes_per_ms()
    results.add("device/copy", "torch", gb_per_s=bandwidth / 1e6)
    bench(results, "adamw8bit/lora-8b-r32", AdamW8bit, bnb.optim.AdamW8bit, bandwidth)
    bench(results, "paged_adamw8bit/lora-8b-r32", PagedAdamW8bit, bnb.optim.PagedAdamW8bit, bandwidth)
    results.write(args.out)


if __name__ == "__main__":
    main()

"""RMSNorm, rotary embedding and SwiGLU on the shapes of an 8B Llama, forward and backward.

Run ``python -m benchmarks.elementwise``. Peers in the same run: transformers' own modules under autograd, and
liger-kernel where it is installed. ``floor_ms`` is the time that the bytes an operation must read and write take at
this GPU's measured copy bandwidth. Every call is captured in a CUDA graph, so that times are the GPU's alone.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from benchmarks.nf4 import copy_bytes_per_ms, graphed
from benchmarks.results import Results, arguments, start
from pronghorn.kernels import rms_norm_triton
from pronghorn.kernels.glu import glu, glu_backward_
from pronghorn.kernels.rms_norm import rms_norm
from pronghorn.kernels.rope import rotate_

T, D, I, H, K, E = 4096, 4096, 14336, 32, 8, 128  # noqa: E741

Call = Callable[[], object]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda")


def backward_of(outputs: Any, inputs: Sequence[torch.Tensor]) -> Call:
    """A repeatable backward pass of one graph, with gradients of its own."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = [torch.randn_like(o) for o in outputs]
    return partial(torch.autograd.grad, outputs, list(inputs), gradients, retain_graph=True)


def rms_norm_cases(liger: Any) -> dict[str, tuple[int, dict[str, Call]]]:
    """Case to bytes moved and calls by implementation; the weight frozen, as under LoRA, and trained."""
    x, residual, dy, ds = (normal(T, D) for _ in range(4))
    layer = LlamaRMSNorm(D, 1e-5).to("cuda", torch.bfloat16)
    weight = layer.weight.detach()
    _, total, rstd = rms_norm_triton.rms_norm_forward(x, weight, 1e-5, residual, 0.0, True)
    backward = rms_norm_triton.rms_norm_backward
    leaf = x.clone().requires_grad_()
    layer.weight.requires_grad_(False)
    frozen = layer(leaf)
    added = leaf + residual
    layer.weight.requires_grad_(True)
    cases: dict[str, tuple[int, dict[str, Call]]] = {
        "rms_norm": (2, {"pronghorn": lambda: rms_norm(x, weight, 1e-5), "transformers": lambda: layer(x)}),
        "rms_norm_residual": (
            4,
            {
                "pronghorn": lambda: rms_norm(x, weight, 1e-5, residual),
                "transformers": lambda: layer(x + residual),
            },
        ),
        "rms_norm_backward": (
            3,
            {
                "pronghorn": lambda: backward(dy, None, x, weight, rstd, 0.0, True, False),
                "transformers": backward_of(frozen, [leaf]),
            },
        ),
        "rms_norm_backward_residual": (4, {"pronghorn": lambda: backward(dy, ds, x, weight, rstd, 0.0, True, False)}),
        "rms_norm_backward_weight": (
            3,
            {
                "pronghorn": lambda: backward(dy, None, x, weight, rstd, 0.0, True, True),
                "transformers": backward_of(layer(leaf), [leaf, layer.weight]),
            },
        ),
    }
    cases["rms_norm_backward_residual"][1]["transformers"] = backward_of((layer(added), added), [leaf])
    if liger:
        apply = liger.LigerRMSNormFunction.apply
        trained = weight.clone().requires_grad_()
        cases["rms_norm"][1]["liger-kernel"] = lambda: apply(x, weight, 1e-5, 0.0, "llama", False)
        cases["rms_norm_backward_weight"][1]["liger-kernel"] = backward_of(
            apply(leaf, trained, 1e-5, 0.0, "llama", False), [leaf, trained]
        )
    return {f"{name}/{T}x{D}": (count * x.nbytes, calls) for name, (count, calls) in cases.items()}


def rope_cases(liger: Any) -> dict[str, tuple[int, dict[str, Call]]]:
    q, k = normal(T, H, E), normal(T, K, E)
    angles = torch.rand(T, E // 2, device="cuda").repeat(1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    # transformers' layout: [batch, heads, tokens, E], as views of token-major projections
    batched = [t[None].transpose(1, 2) for t in (q.clone(), k.clone())]
    leaves = [t.detach().requires_grad_() for t in batched]
    forward: dict[str, Call] = {
        "pronghorn": lambda: rotate_(q, k, cos, sin),
        "transformers": lambda: apply_rotary_pos_emb(*batched, cos[None], sin[None]),
    }
    backward: dict[str, Call] = {
        "pronghorn": lambda: rotate_(q, k, cos, sin, transpose=True),
        "transformers": backward_of(apply_rotary_pos_emb(*leaves, cos[None], sin[None]), leaves),
    }
    if liger:
        apply = liger.LigerRopeFunction.apply
        forward["liger-kernel"] = lambda: apply(*batched, cos[None], sin[None])
        backward["liger-kernel"] = backward_of(apply(*leaves, cos[None], sin[None]), leaves)
    moved = 2 * (q.nbytes + k.nbytes) + (cos.nbytes + sin.nbytes) // 2
    shape = f"{T}x{H}+{K}x{E}"
    return {f"rope/{shape}": (moved, forward), f"rope_backward/{shape}": (moved, backward)}


def glu_cases(liger: Any, activation: str, name: str) -> dict[str, tuple[int, dict[str, Call]]]:
    gate, up, dh = (normal(T, I) for _ in range(3))
    act = ACT2FN[activation]
    leaves = [t.clone().requires_grad_() for t in (gate, up)]
    forward: dict[str, Call] = {
        "pronghorn": lambda: glu(gate, up, activation),
        "transformers": lambda: act(gate) * up,
    }
    # Each replay differentiates what the one before it wrote: other numbers, the same bytes.
    g, u = gate.clone(), up.clone()
    backward: dict[str, Call] = {
        "pronghorn": lambda: glu_backward_(dh, g, u, False, activation),
        "transformers": backward_of(act(leaves[0]) * leaves[1], leaves),
    }
    with_h: dict[str, Call] = {"pronghorn": lambda: glu_backward_(dh, g, u, True, activation)}
    if liger:
        apply = (liger.LigerSiLUMulFunction if activation == "silu" else liger.LigerGELUMulFunction).apply
        forward["liger-kernel"] = lambda: apply(gate, up)
        own = [t.clone().requires_grad_() for t in (gate, up)]
        backward["liger-kernel"] = backward_of(apply(*own), own)
    return {
        f"{name}/{T}x{I}": (3 * gate.nbytes, forward),
        f"{name}_backward/{T}x{I}": (5 * gate.nbytes, backward),
        f"{name}_backward_with_h/{T}x{I}": (6 * gate.nbytes, with_h),
    }


def bench(results: Results, cases: dict[str, tuple[int, dict[str, Call]]], bandwidth: float, stream: Any) -> None:
    for case, (moved, calls) in cases.items():
        for impl, fn in calls.items():
            results.add(f"kernel/{case}", impl, ms=graphed(fn, stream), floor_ms=moved / bandwidth)


def main() -> None:
    args = arguments("RMSNorm, rotary embedding and gated linear units of an 8B Llama").parse_args()
    liger = importlib.import_module("liger_kernel.ops") if importlib.util.find_spec("liger_kernel") else None
    results = start("elementwise", ("transformers",) + (("liger-kernel",) if liger else ()), args)
    if liger is None:
        print("liger-kernel is not installed: it is left out")
    bandwidth = copy_bytes_per_ms()
    results.add("device/copy", "torch", gb_per_s=bandwidth / 1e6)
    # Autograd runs a backward pass on the stream of its forward, so the graphs' stream makes everything.
    stream = torch.cuda.Stream()
    makers: list[Callable[[], dict[str, tuple[int, dict[str, Call]]]]] = [
        partial(rms_norm_cases, liger),
        partial(rope_cases, liger),
        partial(glu_cases, liger, "silu", "swiglu"),
        partial(glu_cases, liger, "gelu_pytorch_tanh", "geglu_tanh"),
    ]
    for maker in makers:
        with torch.cuda.stream(stream):
            cases = maker()
        stream.synchronize()
        bench(results, cases, bandwidth, stream)
    results.write(args.out)


if __name__ == "__main__":
    main()

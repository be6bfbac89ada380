"""Run each attention path forward and backward on a small causal problem and print how far each is from the exact one.

Also prints which CUDA libraries the process has loaded by then, and from where.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

_LIBRARY = re.compile(r"lib(cudart|cudnn|cublas|cublasLt|nccl|nvrtc)\.so[.\d]*$")
_LENGTHS = (40, 24)  # two rows, packed for varlen and apart for SDPA
_HEADS, _HEAD_DIM = 4, 64


def main() -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32
    if device == "cuda":
        dtype = torch.bfloat16 if torch.cuda.get_device_capability() >= (8, 0) else torch.float16
    paths = {
        "flash": _sdpa("FLASH_ATTENTION"),
        "cudnn": _sdpa("CUDNN_ATTENTION"),
        "mem-efficient": _sdpa("EFFICIENT_ATTENTION"),
        "math": _sdpa("MATH"),
        "varlen": _varlen,
    }
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sum(_LENGTHS), _HEADS, _HEAD_DIM, generator=generator).to(dtype) for _ in range(4)]
    exact = _run(_sdpa("MATH"), [tensor.double() for tensor in inputs])
    answer: dict[str, Any] = {"device": device, "dtype": str(dtype).removeprefix("torch."), "paths": {}}
    for name, path in paths.items():
        try:
            found = _run(path, [tensor.to(device) for tensor in inputs])
        except (RuntimeError, NotImplementedError, ImportError, TypeError) as error:
            answer["paths"][name] = {"runs": False, "reason": str(error).strip().splitlines()[0][:200]}
            continue
        worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True))
        answer["paths"][name] = {"runs": True, "error": worst}
    answer["libraries"] = _loaded()
    print(json.dumps(answer))


def _run(path: Callable[..., Any], inputs: list[Any]) -> list[Any]:
    """The output [T, H, E] and the gradients of q, k and v, in float64 on the CPU."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs[:3]]
    out = path(*leaves)
    out.backward(inputs[3])
    return [tensor.detach().cpu().double() for tensor in (out, *(leaf.grad for leaf in leaves))]


def _sdpa(backend: str) -> Callable[..., Any]:
    def path(q: Any, k: Any, v: Any) -> Any:
        import torch
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, backend)):
            rows = [
                torch.nn.functional.scaled_dot_product_attention(q_row, k_row, v_row, is_causal=True)
                for q_row, k_row, v_row in zip(_rows(q), _rows(k), _rows(v), strict=True)
            ]
        return torch.cat([row.squeeze(0).transpose(0, 1) for row in rows])

    return path


def _rows(tensor: Any) -> list[Any]:
    """[T, H, E] as rows of [1, H, S, E]."""
    return [row.transpose(0, 1).unsqueeze(0) for row in tensor.split(_LENGTHS)]


def _varlen(q: Any, k: Any, v: Any) -> Any:
    import torch
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *_LENGTHS], device=q.device).cumsum(0).to(torch.int32)
    return varlen_attn(q, k, v, ends, ends, max(_LENGTHS), max(_LENGTHS), window_size=(-1, 0))


def _loaded() -> dict[str, str]:
    """Each loaded CUDA library's file name and folder; empty where the system does not tell."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return {}
    files = {Path(line.split(maxsplit=5)[-1]) for line in maps.read_text().splitlines() if line.count("/")}
    return {file.name: str(file.parent) for file in sorted(files) if _LIBRARY.match(file.name)}


if __name__ == "__main__":
    main()

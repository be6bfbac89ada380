"""Compile a Triton kernel, run it, and print how far its result is from torch's.

On a GPU the kernel is compiled for it (the caller sets TRITON_CACHE_DIR to an empty folder, so that no cached binary
stands in for a working compiler); without one it runs in Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

import torch

# Read when @triton.jit decorates, Triton's own functions included: so before Triton is imported.
os.environ["TRITON_INTERPRET"] = "0" if torch.cuda.is_available() else "1"

import triton
import triton.language as tl

_ROWS, _COLUMNS, _INNER = 19, 23, 32  # rows and columns odd, so that the masks are used


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, rows, columns, INNER: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.arange(0, BLOCK)
    column = tl.arange(0, BLOCK)
    inner = tl.arange(0, INNER)
    a = tl.load(a_ptr + row[:, None] * INNER + inner[None, :], mask=row[:, None] < rows, other=0.0)
    b = tl.load(b_ptr + inner[:, None] * columns + column[None, :], mask=column[None, :] < columns, other=0.0)
    out = tl.dot(a, b, input_precision="ieee")
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    tl.store(out_ptr + row[:, None] * columns + column[None, :], out, mask=inside)


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(_ROWS, _INNER, generator=generator)
    b = torch.randn(_INNER, _COLUMNS, generator=generator)
    out = torch.full((_ROWS, _COLUMNS), float("nan"), device=device)
    start = time.perf_counter()
    _product[(1,)](a.to(device), b.to(device), out, _ROWS, _COLUMNS, INNER=_INNER, BLOCK=32)
    result = out.cpu().double()
    seconds = time.perf_counter() - start
    exact = a.double() @ b.double()
    answer: dict[str, Any] = {
        "triton": triton.__version__,
        "device": device,
        "seconds": seconds,
        "error": ((result - exact).norm() / exact.norm()).item(),
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()

"""``nf4_matmul.cu`` itself on a CPU: a thread for each of CUDA's, its instructions in C++ (``cuda_on_cpu.h``).

What a GPU alone can show, bits of its matrix instruction and speed, is tested there; here, on odd sizes, which element
goes where, who waits for whom, and that nothing is read before it is written (shared memory begins as NaN, and copies
to it happen when they are waited for). Not seen: a missing wait of a warp for its own lanes.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pronghorn.kernels import nf4_matmul_cuda
from pronghorn.kernels.cuda_source import pointer
from pronghorn.kernels.nf4 import quantize_nf4
from pronghorn.kernels.nf4_code import dynamic_code, nf4_code
from pronghorn.kernels.nf4_matmul import Member
from pronghorn.kernels.nf4_matmul_cuda import Tile
from pronghorn.kernels.reference import nf4_matmul as reference
from pronghorn.quant.nf4 import NF4Tensor

HERE = Path(__file__).parent
BF16, F16 = torch.bfloat16, torch.float16

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


def compiled(tile: Tile, nested: bool, rank: int, dtype: torch.dtype, folder: Path) -> ctypes.CDLL:
    defines = nf4_matmul_cuda._defines(tile, nested, rank // 16, dtype == F16, overlap=False)
    library = folder / "kernel.so"
    subprocess.run(
        ["g++", "-std=c++20", "-O1", "-w", "-shared", "-fPIC", "-pthread", "-include", HERE / "cuda_on_cpu.h"]
        + [f"-D{name}={value}" for name, value in defines.items()]
        + ["-x", "c++", "-", "-o", library],
        input=f'{nf4_matmul_cuda._source()}\n#include "{HERE / "cuda_on_cpu_run.h"}"\n',
        text=True,
        check=True,
    )
    return ctypes.CDLL(str(library))


def weight(O: int, K: int, nested: bool, dtype: torch.dtype) -> NF4Tensor:  # noqa: E741
    dense = (torch.randn(O, K) * torch.linspace(0.01, 0.1, O)[:, None]).to(dtype)
    if nested:
        return NF4Tensor.quantize(dense).in_tiles()
    codes, scales = quantize_nf4(dense)
    return NF4Tensor(codes, scales, None, None, (O, K), dtype=dtype).in_tiles()


CASES = {
    # one warp for its outputs: x whole, or in stages; outputs that are no whole block, rows no whole tile
    "x whole": (Tile(2, 1, 2, 8, 512, 1, 256), 5, [40, 24], 512, 32, False, True, BF16),
    "two stages, a bias": (Tile(2, 1, 2, 8, 256, 2, 256), 8, [40, 24], 768, 16, True, True, F16),
    "8 outputs a warp, plain scales": (Tile(3, 1, 1, 8, 256, 3, 256), 3, [40], 512, 0, True, False, BF16),
    "stages filled often": (Tile(4, 1, 2, 8, 256, 3, 256), 6, [40, 24], 2560, 32, False, True, BF16),
    "a panel that is not whole": (Tile(2, 1, 2, 8, 512, 2, 256), 1, [16], 768, 32, False, True, BF16),
    "16 rows": (Tile(2, 1, 2, 16, 256, 3, 256), 13, [40, 24], 1024, 32, False, True, BF16),
    "32 rows, 32 outputs a warp": (Tile(1, 1, 4, 32, 512, 2, 256), 27, [40, 8], 512, 32, False, True, F16),
    "blocks of rows": (Tile(2, 1, 2, 16, 512, 1, 256), 37, [40], 512, 16, False, True, BF16),
    # several that take turns: x all there, its stages filled again, warps that miss whole panels; more chunks than
    # warps, fewer, a bias, more rows
    "turns, x whole": (Tile(2, 3, 2, 8, 512, 3, 256), 6, [40, 24], 1280, 32, False, True, BF16),
    "turns, two stages": (Tile(2, 3, 2, 8, 256, 2, 256), 6, [40, 24], 1280, 32, False, True, BF16),
    "turns, three stages filled often": (Tile(3, 4, 2, 8, 256, 3, 128), 7, [40], 3072, 32, False, True, BF16),
    "warps that miss panels": (Tile(2, 5, 2, 8, 256, 2, 128), 4, [40], 2304, 16, False, True, BF16),
    "more warps than turns": (Tile(1, 6, 2, 8, 256, 2, 256), 2, [24], 512, 32, False, True, BF16),
    "short turns, a bias": (Tile(1, 4, 2, 8, 512, 1, 128), 8, [24], 512, 16, True, True, F16),
    "turns of 16 rows": (Tile(2, 2, 2, 16, 256, 3, 128), 11, [40], 1024, 32, False, True, BF16),
    "turns of 32 rows, plain scales": (Tile(1, 3, 2, 32, 256, 2, 128), 30, [16], 512, 32, False, False, BF16),
    "turns of 64 rows": (Tile(2, 3, 2, 64, 256, 3, 128), 50, [40], 1280, 32, False, True, BF16),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_reference(case: str, tmp_path: Path) -> None:
    tile, M, outputs, K, rank, bias, nested, dtype = CASES[case]
    members = [
        Member(
            weight(O, K, nested, dtype),
            (torch.randn(O, rank) * 0.1).to(dtype) if rank else None,
            i * rank,
            torch.randn(O).to(dtype) if bias else None,
        )
        for i, O in enumerate(outputs)  # noqa: E741
    ]
    x = torch.randn(M, K).to(dtype)
    low = torch.randn(M, rank * len(outputs)).to(dtype) if rank else None
    y = torch.full((M, sum(outputs)), float("nan"), dtype=dtype)
    args, blocks = nf4_matmul_cuda.arguments(x, members, low, y, tile, nf4_code(x.device), dynamic_code(x.device))
    compiled(tile, nested, rank, dtype, tmp_path).run(ctypes.byref(args), blocks, -(-M // tile.rows))
    expected = torch.empty_like(y)
    reference.nf4_matmul(x, [Member(m.weight, m.b_Or, m.at) for m in members], low, expected)
    if bias:  # the kernel rounds the product before it adds the bias, as cuBLAS does
        expected += torch.cat([m.bias_O for m in members if m.bias_O is not None])
    # Sums in another order: a value near the middle of two may be rounded to the other one.
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected, rtol=ulp, atol=ulp * expected.abs().max().item() / 64)
    assert (y != expected).float().mean() <= 0.01
    assert pointer(y) == args.y

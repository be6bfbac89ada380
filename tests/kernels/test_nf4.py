"""NF4 arithmetic against bitsandbytes on the CPU; the Triton kernels (interpreted) and their PTX against that."""

from __future__ import annotations

import re
import struct

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb

from pronghorn.kernels import nf4, nf4_code, nf4_layout, nf4_ptx
from pronghorn.kernels.reference import nf4 as reference

CPU = torch.device("cpu")
BITS = {2: torch.int16, 4: torch.int32}
# Whole blocks; rows that are no multiple of 64; numel that is none; odd numel; one element; more than one nested block.
SHAPES = [(64, 64), (30, 96), (7, 10), (5, 131), (1, 1), (257, 65), (300, 334)]


def make_weight(shape: tuple[int, ...], dtype: torch.dtype, zero_block: bool = True) -> torch.Tensor:
    weight = torch.randn(shape, dtype=torch.float32) * torch.linspace(0.01, 3, shape[0]).unsqueeze(1)
    if zero_block and weight.numel() > 192:
        weight.view(-1)[64:128] = 0
    return weight.to(dtype)


def bnb_dequantize(codes: torch.Tensor, state: bnb.QuantState, shape: tuple[int, ...]) -> torch.Tensor:
    """bitsandbytes' own result. Flat and of even length, or it takes a slow compiled path (the same numbers)."""
    numel = int(np.prod(shape))
    state.shape = torch.Size([1, numel + numel % 2])
    return bnb.dequantize_4bit(codes.view(-1, 1), state).reshape(-1)[:numel].view(shape)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = BITS[a.dtype.itemsize]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def test_code_books_are_bitsandbytes() -> None:
    assert torch.equal(nf4_code.nf4_code(CPU), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(nf4_code.dynamic_code(CPU), bnb.create_dynamic_map())


def test_cuda_boundaries_are_midpoints_within_an_ulp() -> None:
    ours = np.array(nf4_code.NF4_CUDA_BOUNDARIES, dtype=np.float32)
    exact = (np.array(nf4_code.NF4_LEVELS[:-1]) + np.array(nf4_code.NF4_LEVELS[1:])) / 2
    assert np.all(np.abs(ours - exact) <= np.spacing(np.abs(ours)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_quantize_equals_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = make_weight(shape, dtype)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    codes, absmax = nf4.quantize_nf4(weight)
    scales, nested_absmax, offset = nf4.quantize_scales(absmax)
    assert torch.equal(codes, packed.view(-1))
    assert torch.equal(scales, state.absmax)
    assert torch.equal(nested_absmax, state.state2.absmax)
    assert torch.equal(offset, state.offset)
    ours = nf4.dequantize_nf4(codes, scales, nested_absmax, offset, shape, dtype)
    assert same_bits(ours, bnb_dequantize(packed, state, shape))


def test_quantize_in_chunks_equals_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_weight((77, 131), torch.bfloat16)
    codes, absmax = reference.quantize_nf4(weight)
    whole = reference.dequantize_nf4(codes, absmax, None, None, weight.shape, torch.bfloat16)
    monkeypatch.setattr(reference, "_QUANTIZE_CHUNK", 640)
    monkeypatch.setattr(reference, "_DEQUANTIZE_CHUNK", 640)
    assert all(torch.equal(a, b) for a, b in zip(reference.quantize_nf4(weight), (codes, absmax)))
    assert same_bits(whole, reference.dequantize_nf4(codes, absmax, None, None, weight.shape, torch.bfloat16))


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_weight(value: float) -> None:
    """Every scale is the same, so the nested scale is zero and the offset carries it all."""
    weight = torch.full((16, 64), value)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    codes, absmax = nf4.quantize_nf4(weight)
    parts = nf4.quantize_scales(absmax)
    assert torch.equal(codes, packed.view(-1)) and torch.equal(parts[0], state.absmax)
    out = nf4.dequantize_nf4(codes, *parts, weight.shape, torch.float32)
    assert torch.equal(out, weight)
    assert same_bits(out, bnb_dequantize(packed, state, (16, 64)))


@pytest.mark.parametrize("blocksize", [64, 128])
def test_single_quantization(blocksize: int) -> None:
    weight = make_weight((20, 70), torch.float32)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=False, blocksize=blocksize)
    codes, absmax = nf4.quantize_nf4(weight, blocksize)
    assert torch.equal(codes, packed.view(-1)) and torch.equal(absmax, state.absmax)
    out = nf4.dequantize_nf4(codes, absmax, None, None, (20, 70), torch.float32, blocksize=blocksize)
    assert same_bits(out, bnb_dequantize(packed, state, (20, 70)))


def test_out_is_written_and_checked() -> None:
    codes, absmax = nf4.quantize_nf4(make_weight((6, 64), torch.float32))
    out = torch.empty(6, 64)
    assert nf4.dequantize_nf4(codes, absmax, None, None, (6, 64), torch.float32, out) is out
    assert torch.equal(out, nf4.dequantize_nf4(codes, absmax, None, None, (6, 64), torch.float32))
    for wrong in (torch.empty(64, 6), torch.empty(6, 64, dtype=torch.float16), torch.empty(64, 6).t()):
        with pytest.raises(ValueError, match="out:"):
            nf4.dequantize_nf4(codes, absmax, None, None, (6, 64), torch.float32, wrong)


def test_refuses_what_it_cannot_quantize() -> None:
    with pytest.raises(TypeError, match="int64"):
        nf4.quantize_nf4(torch.arange(64))
    with pytest.raises(ValueError, match="no elements"):
        nf4.quantize_nf4(torch.empty(0, 64))


# The Triton path. The interpreter warns of 1 / 0 and 0 * inf in blocks of zeros, where a GPU says nothing.
ZERO_BLOCKS = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning", "ignore:invalid value:RuntimeWarning")


def bnb_cuda_search(code: list[float], x: float) -> int:
    """The binary search of bitsandbytes' CUDA kernel for 8-bit codes, step by step in float32."""
    f = np.float32
    pivot, upper_pivot, lower_pivot = 127, 255, 0
    lower, upper, value = f(-1), f(1), f(code[127])
    step = 64
    while step > 0:
        if x > value:
            lower_pivot, lower, pivot = pivot, value, pivot + step
        else:
            upper_pivot, upper, pivot = pivot, value, pivot - step
        value = f(code[pivot])
        step >>= 1
    upper = f(code[upper_pivot]) if upper_pivot == 255 else upper
    lower = f(code[lower_pivot]) if lower_pivot == 0 else lower
    if x > value:
        return upper_pivot if x > f(f(upper + value) * f(0.5)) else pivot
    return lower_pivot if x < f(f(lower + value) * f(0.5)) else pivot


def test_dynamic_codes_follow_the_cuda_search() -> None:
    triton_path = pytest.importorskip("pronghorn.kernels.nf4_triton")
    levels, middle = nf4_code.dynamic_code(CPU), nf4_code.dynamic_midpoints(CPU)
    nudged = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-2.0, 2.0)]
    unit = torch.cat([levels, middle, *nudged, torch.rand(2000) * 2 - 1, torch.tensor([-1.0, 1.0, float("nan")])])
    expected = [bnb_cuda_search(levels.tolist(), np.float32(x)) for x in unit.tolist()]
    assert triton_path.dynamic_codes(unit).tolist() == expected


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@ZERO_BLOCKS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(64, 64), (7, 11), (33, 130), (5, 131)])
def test_triton_kernels_equal_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    triton_path = pytest.importorskip("pronghorn.kernels.nf4_triton")
    weight = make_weight(shape, dtype, zero_block=False)
    codes, absmax = triton_path.quantize_nf4(weight)
    assert torch.equal(absmax, reference.quantize_nf4(weight)[1])
    # The two paths may differ by one code where a value lies on a boundary, and nowhere else.
    differ = codes != reference.quantize_nf4(weight)[0]
    assert differ.sum() <= 1
    scales, nested_absmax, offset = triton_path.quantize_scales(absmax)
    cpu_scales, cpu_nested, cpu_offset = reference.quantize_scales(absmax)
    assert torch.equal(nested_absmax, cpu_nested) and torch.equal(offset, cpu_offset)
    assert (scales.int() - cpu_scales.int()).abs().max() <= 1
    for parts in ((scales, nested_absmax, offset), (absmax, None, None)):
        ours = triton_path.dequantize_nf4(codes, *parts, shape, dtype)
        assert same_bits(ours, reference.dequantize_nf4(codes, *parts, shape, dtype))
        for path in (triton_path, reference):
            wide = torch.full((shape[0], shape[1] + 8), 7.0, dtype=dtype)
            path.dequantize_nf4(codes, *parts, shape, dtype, wide[:, : shape[1]])
            assert same_bits(wide[:, : shape[1]].contiguous(), ours) and bool((wide[:, shape[1] :] == 7).all())


@pytest.mark.parametrize("shape", [(8, 64), (24, 192), (64, 1024)])
def test_tiles_hold_the_same_codes(shape: tuple[int, int]) -> None:
    weight = make_weight(shape, torch.float32)
    codes, absmax = nf4.quantize_nf4(weight)
    tiled = nf4_layout.to_tiles(codes, shape)
    assert torch.equal(nf4_layout.to_rows(tiled, shape), codes) and not torch.equal(tiled, codes)
    plain = reference.dequantize_nf4(codes, absmax, None, None, shape, torch.float32)
    assert torch.equal(reference.dequantize_nf4(tiled, absmax, None, None, shape, torch.float32, tiled=True), plain)
    # By the definition: output g of a tile, thread t, half u, step q holds inputs 16 q + 8 u + 2 t and the next.
    rows, held = codes.view(shape[0], -1), tiled.view(shape[0] // 8, shape[1] // 64, 8, 4, 2, 4)
    for o, i, g, t, u, q in [
        (0, 0, 0, 0, 0, 0),
        (0, 0, 7, 1, 0, 3),
        (shape[0] // 8 - 1, shape[1] // 64 - 1, 2, 3, 1, 2),
    ]:
        assert held[o, i, g, t, u, q] == rows[8 * o + g, (64 * i + 16 * q + 8 * u + 2 * t) // 2]


def test_what_does_not_consist_of_tiles() -> None:
    assert nf4_layout.takes_tiles((8, 64), 64) and nf4_layout.takes_tiles((16, 256), 128)
    for shape, blocksize in (((9, 64), 64), ((8, 96), 64), ((8, 64), 32), ((64,), 64), ((2, 8, 64), 64)):
        assert not nf4_layout.takes_tiles(shape, blocksize)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(8, 64), (24, 192), (16, 1024)])
def test_triton_reads_tiles(shape: tuple[int, int], dtype: torch.dtype) -> None:
    triton_path = pytest.importorskip("pronghorn.kernels.nf4_triton")
    codes, absmax = reference.quantize_nf4(make_weight(shape, torch.float32, zero_block=False))
    tiled = nf4_layout.to_tiles(codes, shape)
    for parts in ((*reference.quantize_scales(absmax),), (absmax, None, None)):
        expected = reference.dequantize_nf4(codes, *parts, shape, dtype)
        wide = torch.full((shape[0], shape[1] + 8), 7.0, dtype=dtype)
        triton_path.dequantize_nf4(tiled, *parts, shape, dtype, wide[:, : shape[1]], tiled=True)
        assert same_bits(wide[:, : shape[1]].contiguous(), expected) and bool((wide[:, shape[1] :] == 7).all())
        assert same_bits(triton_path.dequantize_nf4(tiled, *parts, shape, dtype, tiled=True), expected)


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter")
@ZERO_BLOCKS
def test_triton_zero_block_takes_code_zero() -> None:
    triton_path = pytest.importorskip("pronghorn.kernels.nf4_triton")
    weight = make_weight((2, 64), torch.float32)
    weight[1] = 0
    codes, absmax = triton_path.quantize_nf4(weight)
    assert absmax[1] == 0 and not codes[32:].any() and codes[:32].any()


def run_ptx(source: str, words: tuple[int, ...], scale: float) -> list[int]:
    """The few PTX instructions that the dequantizer is written in, one thread, as their manual defines them."""
    n = len(words)
    regs: dict[str, object] = {f"${4 * n + i}": word for i, word in enumerate(words)} | {f"${5 * n}": np.float32(scale)}

    def value(name: str) -> object:
        if name.startswith("0f"):
            return np.frombuffer(struct.pack("<I", int(name[2:], 16)), dtype=np.float32)[0]
        return int(name, 0) if name[0].isdigit() else regs[name]

    def half(x: object, kind: str) -> int:
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        return torch.tensor(float(x)).to(dtype).view(torch.int16).item() & 0xFFFF  # type: ignore[arg-type]

    for line in source.strip("{}\n").splitlines():
        name, *operands = re.findall(r"[$\w.]+", line)
        if name == ".reg":
            continue
        a = [value(x) for x in operands[1:]]
        if name.startswith("mov"):
            result: object = a[0]
        elif name == "mul.rn.ftz.f32":
            result = np.float32(a[0]) * np.float32(a[1])
        elif name.startswith("cvt.rn."):
            kind = name.removeprefix("cvt.rn.").removesuffix("x2.f32")
            result = half(a[0], kind) << 16 | half(a[1], kind)  # the first source is the upper half
        elif name == "prmt.b32":
            pool = [(x >> (8 * i)) & 255 for x in a[:2] for i in range(4)]  # type: ignore[operator]
            picks = [(a[2] >> (4 * i)) & 15 for i in range(4)]  # type: ignore[operator]
            assert all(p < 8 for p in picks), "bit 3 would replicate a sign"
            result = sum(pool[p] << (8 * i) for i, p in enumerate(picks))
        else:
            result = {
                "and.b32": lambda x, y: x & y,
                "or.b32": lambda x, y: x | y,
                "shr.u32": lambda x, y: x >> y,
            }[name](*a)
        regs[operands[0]] = result
    return [regs[f"${i}"] for i in range(4 * len(words))]  # type: ignore[misc]


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_ptx_equals_reference(kind: str, dtype: torch.dtype, n: int) -> None:
    source = nf4_ptx.dequantize_ptx(kind, n)
    assert nf4_ptx.constraints(n).count(",") == 5 * n
    for scale in (0.0371, -0.002, 1.7):
        codes = torch.randint(0, 256, (4 * n,), dtype=torch.uint8)
        words = struct.unpack(f"<{n}I", bytes(codes.tolist()))
        out = torch.tensor(np.array(run_ptx(source, words, scale), dtype=np.uint32).view(np.int16)).view(dtype)
        expected = reference.dequantize_nf4(codes, torch.tensor([scale]), None, None, (8 * n,), dtype)
        assert same_bits(out, expected)

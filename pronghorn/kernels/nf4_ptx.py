"""The PTX that turns 16 packed NF4 codes into 16 half-precision weights, for GPUs of compute capability 8.0 and up.

A block of weights has one scale, so it holds at most 16 different values. They are computed and rounded once for the
16 codes of a thread (which makes the rounding exactly that of level * scale), kept in registers as a plane of low and
a plane of high bytes, and looked up by ``prmt``, which picks four bytes at once: about 3 instructions a weight, where
a tree of selects takes 20.
"""

from __future__ import annotations

import struct

from pronghorn.kernels.nf4_code import NF4_LEVELS


def _hex(value: float) -> str:
    return f"0f{struct.unpack('<I', struct.pack('<f', value))[0]:08X}"


def _word(word: str, outs: list[str]) -> list[str]:
    """Eight codes of register ``word`` to four registers of two weights each.

    A selector nibble's low three bits pick an entry of one half of the table; its top bit then picks the half. The
    first weight of a byte is in its high nibble, so the last permutation swaps the two.
    """
    lines = [
        f"and.b32 s, {word}, 0x77777777;",
        f"shr.u32 q, {word}, 1;",
        "and.b32 q, q, 0x44444444;",
        "or.b32 q, q, 0x32103210;",
    ]
    for half in (0, 1):
        if half:
            lines += ["shr.u32 s, s, 16;", "shr.u32 q, q, 16;"]
        lines += [
            "prmt.b32 xl, l0, l1, s;",
            "prmt.b32 yl, l2, l3, s;",
            "prmt.b32 xh, h0, h1, s;",
            "prmt.b32 yh, h2, h3, s;",
            "prmt.b32 xl, xl, yl, q;",
            "prmt.b32 xh, xh, yh, q;",
            f"prmt.b32 {outs[2 * half]}, xl, xh, 0x4051;",
            f"prmt.b32 {outs[2 * half + 1]}, xl, xh, 0x6273;",
        ]
    return lines


def dequantize_ptx(kind: str, words: int = 2) -> str:
    """Inline assembly: 4 outputs a word (.b32, two weights each), then the words (8 codes each) and their scale, .f32.

    ``kind`` is ``"bf16"`` or ``"f16"``.
    """
    outs = 4 * words
    lines = [f".reg .b32 w<{words}>, p<8>, l<4>, h<4>, s, q, xl, yl, xh, yh;", ".reg .f32 a, t<16>;"]
    lines += [f"mov.b32 w{i}, ${outs + i};" for i in range(words)]
    lines += [f"mov.f32 a, ${outs + words};"]
    lines += [f"mul.rn.ftz.f32 t{k}, a, {_hex(level)};" for k, level in enumerate(NF4_LEVELS)]
    lines += [f"cvt.rn.{kind}x2.f32 p{j}, t{2 * j + 1}, t{2 * j};" for j in range(8)]
    lines += [f"prmt.b32 l{i}, p{2 * i}, p{2 * i + 1}, 0x6420;" for i in range(4)]
    lines += [f"prmt.b32 h{i}, p{2 * i}, p{2 * i + 1}, 0x7531;" for i in range(4)]
    for i in range(words):
        lines += _word(f"w{i}", [f"${4 * i + j}" for j in range(4)])
    return "{\n" + "\n".join(lines) + "\n}"


def constraints(words: int = 2) -> str:
    """The operands of :func:`dequantize_ptx`."""
    return ",".join(["=r"] * (4 * words) + ["r"] * words + ["f"])

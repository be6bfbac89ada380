"""The Triton side of 8-bit AdamW: one kernel over a table of addresses. The formulas are in ``adamw8bit.py``."""

# mypy: allow-untyped-defs
# (A kernel's parameters are pointers and scalars whose types Triton takes from the call.)

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from pronghorn.kernels.launch import Launcher
from pronghorn.kernels.reference.adamw8bit import BLOCK, Rule, Slot

ROWS = 4
"""Blocks of one program."""
WARPS = 4
_SMALLEST_NORMAL = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def _magnitude_code(x, K: tl.constexpr):
    """Which of 0, the ``K * 127`` positive levels and 1.0 is nearest to x in [0, 1], counted so that 0 is ``K - 1``."""
    count = tl.full(x.shape, K, tl.int32)
    scale = tl.full(x.shape, 1e6 * K / 0.9, tl.float32)
    for i in tl.static_range(6):
        above = x > (1.0 + 0.9 / (K * 2**i)) * 10.0 ** (i - 6)
        count = tl.where(above, K * 2 ** (i + 1), count)
        scale = tl.where(above, 10.0 ** (5 - i) * K * 2 ** (i + 1) / 0.9, scale)
    part = tl.maximum(x * scale - count.to(tl.float32) * (1.0 / 9.0), 0.0).to(tl.int32)
    code = count + tl.minimum(part, count - 1)
    code = tl.where(x > 1.0 - 0.225 / (64 * K), 128 * K, code)
    return tl.where(x > 1e-6 * (0.05 + 0.225 / K), code, K - 1)


@triton.jit
def _units(moment, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The blocks' scales, and |moment| in units of its block's scale: 0 in a block of zeros (or of subnormals)."""
    magnitude = tl.abs(moment)
    absmax = tl.max(tl.reshape(magnitude, (ROWS, BLOCK)), axis=1)
    inverse = 1.0 / tl.where(absmax < _SMALLEST_NORMAL, float("inf"), absmax)
    spread = tl.reshape(tl.broadcast_to(inverse[:, None], (ROWS, BLOCK)), (ROWS * BLOCK,))
    return absmax, magnitude * spread


@triton.jit
def _signed_code(moment, unit):
    """Codes of the first moment: 127 is 0, 255 is 1.0, and the most negative level, code 0, is not -1.0."""
    code = _magnitude_code(unit, 1)
    below = tl.minimum(tl.maximum(code, 1), 127)
    return tl.where(moment.to(tl.int32, bitcast=True) < 0, 127 - below, 127 + code)


@triton.jit(do_not_specialize=["slots"])
def _step_kernel(
    like_ptr, tiles_ptr, slots_ptr, moving_ptr, rules_ptr, levels1_ptr, levels2_ptr, slots,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """ROWS blocks of one tensor, in one dimension: the code look-ups would turn a two-dimensional tile's layout.

    ``slots_ptr`` and ``moving_ptr`` hold a column of ``slots`` numbers for each thing.
    EVEN: every tensor is a whole number of tiles, so that nothing need be masked and accesses are of full width.
    """
    tile = tl.program_id(0)
    slot = tl.load(tiles_ptr + tile)
    g_at = tl.load(moving_ptr + slot)
    if g_at != 0:  # without a gradient this tensor takes no part in the step
        p_at = tl.load(slots_ptr + slot)
        state1_at = tl.load(slots_ptr + slots + slot)
        state2_at = tl.load(slots_ptr + 2 * slots + slot)
        absmax1_at = tl.load(slots_ptr + 3 * slots + slot)
        absmax2_at = tl.load(slots_ptr + 4 * slots + slot)
        numel = tl.load(slots_ptr + 5 * slots + slot)
        block = (tile - tl.load(slots_ptr + 6 * slots + slot)) * ROWS
        start = block * BLOCK
        rule = rules_ptr + 8 * tl.load(moving_ptr + slots + slot)
        beta1, gain1 = tl.load(rule), tl.load(rule + 1)
        beta2, gain2 = tl.load(rule + 2), tl.load(rule + 3)
        step_size, eps, decay = tl.load(rule + 4), tl.load(rule + 5), tl.load(rule + 6)

        p_ptr = tl.multiple_of(p_at.to(like_ptr.dtype), 16) + start
        g_ptr = tl.multiple_of(g_at.to(like_ptr.dtype), 16) + start
        state1_ptr = tl.multiple_of(state1_at.to(tl.pointer_type(tl.uint8)), 16) + start
        state2_ptr = tl.multiple_of(state2_at.to(tl.pointer_type(tl.uint8)), 16) + start
        row = tl.arange(0, ROWS)
        absmax1_ptr = absmax1_at.to(tl.pointer_type(tl.float32)) + block
        absmax2_ptr = absmax2_at.to(tl.pointer_type(tl.float32)) + block

        at = tl.arange(0, ROWS * BLOCK)
        if EVEN:
            g = tl.load(g_ptr + at).to(tl.float32)
            p = tl.load(p_ptr + at)
            code1, code2 = tl.load(state1_ptr + at), tl.load(state2_ptr + at)
            absmax1, absmax2 = tl.load(absmax1_ptr + at // BLOCK), tl.load(absmax2_ptr + at // BLOCK)
        else:
            inside = start + at < numel
            whole = start + row * BLOCK < numel
            g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
            p = tl.load(p_ptr + at, mask=inside, other=0.0)
            # behind the end lie zeros: level 127 of the signed map, level 0 of the other
            code1 = tl.load(state1_ptr + at, mask=inside, other=127)
            code2 = tl.load(state2_ptr + at, mask=inside, other=0)
            absmax1 = tl.load(absmax1_ptr + at // BLOCK, mask=inside, other=0.0)
            absmax2 = tl.load(absmax2_ptr + at // BLOCK, mask=inside, other=0.0)

        finite = tl.abs(g) < float("inf")
        first = tl.load(levels1_ptr + code1.to(tl.int32)) * absmax1
        second = tl.load(levels2_ptr + code2.to(tl.int32)) * absmax2
        first = tl.where(finite, first * beta1 + gain1 * g, 0.0)
        second = tl.where(finite, second * beta2 + gain2 * g * g, 0.0)
        moved = p.to(tl.float32) + step_size * (first / (tl.sqrt(second) + eps))
        moved = moved.to(p.dtype).to(tl.float32) * decay
        new_p = tl.where(finite, moved.to(p.dtype), p)
        absmax1, unit1 = _units(first, ROWS, BLOCK)
        absmax2, unit2 = _units(second, ROWS, BLOCK)
        code1 = _signed_code(first, unit1).to(tl.uint8)
        code2 = (_magnitude_code(unit2, 2) - 1).to(tl.uint8)
        if EVEN:
            tl.store(p_ptr + at, new_p)
            tl.store(state1_ptr + at, code1)
            tl.store(state2_ptr + at, code2)
            tl.store(absmax1_ptr + row, absmax1)
            tl.store(absmax2_ptr + row, absmax2)
        else:
            tl.store(p_ptr + at, new_p, mask=inside)
            tl.store(state1_ptr + at, code1, mask=inside)
            tl.store(state2_ptr + at, code2, mask=inside)
            tl.store(absmax1_ptr + row, absmax1, mask=whole)
            tl.store(absmax2_ptr + row, absmax2, mask=whole)


_step = Launcher(_step_kernel)


def _upload(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers to the device behind what its stream already holds, without waiting.

    torch's pinned memory is taken anew each time: a block goes back to torch's pool at once, but the pool gives it out
    again only when the copies that were recorded on it are done, so a copy of an earlier step is never overwritten.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class Table:
    """Tensors that step together; see :func:`pronghorn.kernels.adamw8bit.table`."""

    def __init__(self, slots: Sequence[Slot], levels1: torch.Tensor, levels2: torch.Tensor) -> None:
        self.slots, self.levels1, self.levels2 = list(slots), levels1, levels2
        self.device = slots[0].param.device
        tensors = [(s.param, s.state1, s.state2, s.absmax1, s.absmax2) for s in slots]
        if any(t.data_ptr() % 16 for row in tensors for t in row):
            raise ValueError("a parameter or a moment is not 16-byte aligned; copy it (Tensor.clone)")
        sizes = [slot.param.numel() for slot in slots]
        firsts = [0] * len(slots)
        self.launches: list[tuple[bool, torch.Tensor]] = []
        for even in (True, False):
            numbers = [i for i, size in enumerate(sizes) if (size % (ROWS * BLOCK) == 0) == even]
            tiles: list[int] = []
            for i in numbers:
                firsts[i] = len(tiles)
                tiles += [i] * triton.cdiv(sizes[i], ROWS * BLOCK)
            if tiles:
                self.launches.append((even, _upload(tiles, torch.int32, self.device)))
        columns = [[t.data_ptr() for t in column] for column in zip(*tensors)]
        self.columns = _upload([*columns, sizes, firsts], torch.int64, self.device)

    def step(self, gradients: Sequence[torch.Tensor | None], which: Sequence[int], rules: Sequence[Rule]) -> None:
        """One step of every slot that has a gradient, slot i by ``rules[which[i]]``: two copies and a launch.

        Tensors that are no whole number of tiles, where there are any, take a launch of their own.
        """
        addresses = [0 if gradient is None else gradient.data_ptr() for gradient in gradients]
        if any(address % 16 for address in addresses):
            raise ValueError("a gradient is not 16-byte aligned; copy it (Tensor.clone)")
        moving = _upload([addresses, list(which)], torch.int64, self.device)
        constants = _upload([(*by, 0.0) for by in rules], torch.float32, self.device)
        like = self.slots[0].param.detach()
        with torch.cuda.device(self.device) if like.is_cuda else nullcontext():
            for even, tiles in self.launches:
                _step(
                    (tiles.numel(),), like, tiles, self.columns, moving, constants, self.levels1, self.levels2,
                    len(self.slots), BLOCK, ROWS, even, num_warps=WARPS,
                )  # fmt: skip

"""8-bit AdamW: the reference against bitsandbytes' own on the CPU, the kernel against the reference, and its codes
against an exhaustive search."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes.backends.triton.kernels_optim import optimizer_update_8bit_blockwise_pytorch

from pronghorn.kernels import adamw8bit_triton
from pronghorn.kernels.adamw8bit import BLOCK, Rule, Slot, rule, table
from pronghorn.kernels.reference import adamw8bit as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = {"triton": adamw8bit_triton.Table, "reference": reference.Table}
# Exact in float32, so that 1 - beta is the same number in float32 and in float64.
BETAS = (0.875, 0.984375)


def _maps() -> tuple[torch.Tensor, torch.Tensor]:
    return bnb.create_dynamic_map(True).to(DEVICE), bnb.create_dynamic_map(False).to(DEVICE)


def _slot(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Slot:
    param = (torch.randn(shape) * 0.1).to(DEVICE, dtype)
    blocks = -(-param.numel() // BLOCK)
    codes = [torch.zeros(shape, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    return Slot(param, *codes, *(torch.zeros(blocks, device=DEVICE) for _ in range(2)))


def _copy(slot: Slot) -> Slot:
    return Slot(*(t.clone() for t in (slot.param, slot.state1, slot.state2, slot.absmax1, slot.absmax2)))


def _gradient(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Sizes over several decades, as the levels of a block are."""
    return (torch.randn(shape) * torch.exp(2.0 * torch.randn(shape)) * 1e-3).to(DEVICE, dtype)


def _moments(slot: Slot) -> list[torch.Tensor]:
    """Both moments, dequantized by bitsandbytes."""
    states = ((slot.state1, slot.absmax1), (slot.state2, slot.absmax2))
    return [
        bnb.dequantize_blockwise(codes.view(-1), absmax=absmax, code=levels, blocksize=BLOCK)
        for (codes, absmax), levels in zip(states, _maps())
    ]


def test_reference_equals_bitsandbytes() -> None:
    """Six steps beside bitsandbytes' plain PyTorch version; its CPU version is coarse in the small levels.

    It decays before the update where its CUDA kernel and we decay after, so here the decay comes by itself.
    """
    ours = _slot((40, 77))
    theirs = _copy(ours)
    signed, unsigned = _maps()
    for step in range(1, 7):
        gradient = _gradient((40, 77))
        reference.adamw8bit_(ours, gradient, signed, unsigned, rule(1e-2, BETAS, 1e-8, 0.1, step))
        with torch.compiler.set_stance("force_eager"):
            optimizer_update_8bit_blockwise_pytorch(
                theirs.param, gradient, theirs.state1, theirs.state2, *BETAS, 0.0, 0.0, 1e-8, step, 1e-2, signed,
                unsigned, theirs.absmax1, theirs.absmax2, 0.0, 1.0, False, optimizer_name="adam",
            )  # fmt: skip
        theirs.param.mul_(1 - 1e-2 * 0.1)
        torch.testing.assert_close(ours.param, theirs.param, rtol=2e-6, atol=1e-8)
        torch.testing.assert_close(ours.absmax1, theirs.absmax1, rtol=1e-6, atol=0)
        torch.testing.assert_close(ours.absmax2, theirs.absmax2, rtol=1e-6, atol=0)
        assert torch.equal(ours.state2, theirs.state2)
        # a small negative moment becomes 0 there, and the level below it in their CUDA kernel and here
        kept_sign = (ours.state1 == 126) & (theirs.state1 == 127)
        assert torch.equal(ours.state1[~kept_sign], theirs.state1[~kept_sign])
        ours.state1[kept_sign] = 127
        assert (ours.state1 != 127).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shapes", [[(2, 1024)], [(8, 128), (5, 77), (2048,), (300,), (1,)]], ids=["even", "mixed"])
def test_kernel_equals_reference(dtype: torch.dtype, shapes: list[tuple[int, ...]]) -> None:
    """Five steps: two rules, a tensor without a gradient in one step, gradients of inf and NaN in another."""
    slots = {"triton": [_slot(shape, dtype) for shape in shapes]}
    slots["reference"] = [_copy(slot) for slot in slots["triton"]]
    tables = {name: backend(slots[name], *_maps()) for name, backend in BACKENDS.items()}
    which = [i % 2 for i in range(len(shapes))]
    for step in range(1, 6):
        rules = [rule(1e-3, (0.9, 0.999), 1e-8, 0.1, step), rule(2e-3, (0.8, 0.99), 1e-6, 0.0, step)]
        gradients: list[Any] = [_gradient(shape, dtype) for shape in shapes]
        if step == 3:
            gradients[-1] = None
        if step == 4:
            gradients[0].view(-1)[[3, 700]] = torch.tensor([float("inf"), float("nan")], dtype=dtype, device=DEVICE)
        for each in tables.values():
            each.step(gradients, which, rules)
        for got, exact in zip(slots["triton"], slots["reference"]):
            torch.testing.assert_close(got.param, exact.param, rtol=1e-6, atol=2e-8)
            for name in ("state1", "state2"):
                assert (getattr(got, name) != getattr(exact, name)).sum() <= 1  # a tie between two levels
            for name in ("absmax1", "absmax2"):
                torch.testing.assert_close(getattr(got, name), getattr(exact, name), rtol=1e-6, atol=0)
    assert all(torch.isfinite(slot.param).all() for slot in slots["triton"])


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_codes_are_the_nearest(backend: Any) -> None:
    """Moments just beside every boundary between two levels, both signs, against all 256 levels in float64."""
    signed, unsigned = (levels.double() for levels in _maps())
    middles = torch.cat([(levels[1:] + levels[:-1]) / 2 for levels in (signed, unsigned)])
    x = torch.cat([middles * (1 + 1e-5), middles * (1 - 1e-5), -middles, signed, torch.zeros(8, device=DEVICE)])
    blocks = x.split(255)
    x = torch.cat([torch.cat([torch.ones(1, device=DEVICE).double(), block]) for block in blocks]).float()
    x = torch.nn.functional.pad(x, (0, -x.numel() % 1024))
    slots = [_slot(tuple(x.shape)), _slot(tuple(x.shape))]
    forget = Rule(0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0)  # the moments become g and g^2
    backend(slots, signed.float(), unsigned.float()).step([x, x.abs().sqrt()], [0, 0], [forget])
    for codes, value, levels in (
        (slots[0].state1, x.double(), signed),
        (slots[1].state2, (x.abs().sqrt() ** 2).double(), unsigned),
    ):
        chosen = (levels[codes.long()] - value).abs()
        nearest = (levels[None] - value[:, None]).abs().amin(1)
        kept_sign = (value < 0) & (codes == 126)
        assert ((chosen <= nearest * (1 + 1e-4) + 1e-12) | kept_sign).all()
        assert not ((value < 0) & (codes >= 127)).any() or levels is unsigned
    assert {127, 126, 128, 0, 255} <= set(slots[0].state1.tolist())


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS.keys())
def test_zero_and_non_finite_gradients(backend: Any) -> None:
    """Zero gradients on a fresh state move nothing, decay aside; non-finite ones not even that, and reset moments."""
    slot = _slot((2, 512))
    start = slot.param.clone()
    each = backend([slot], *_maps())
    each.step([torch.zeros_like(start)], [0], [rule(1e-2, (0.9, 0.999), 1e-8, 0.5, 1)])
    torch.testing.assert_close(slot.param, start * (1 - 1e-2 * 0.5), rtol=1e-6, atol=0)
    assert all((moment == 0).all() for moment in _moments(slot))

    each.step([torch.ones_like(start)], [0], [rule(1e-2, (0.9, 0.999), 1e-8, 0.5, 2)])
    before = slot.param.clone()
    gradient = torch.ones_like(start)
    gradient[0, :5] = torch.tensor([float("inf"), -float("inf"), float("nan"), 1.0, 1.0], device=DEVICE)
    each.step([gradient], [0], [rule(1e-2, (0.9, 0.999), 1e-8, 0.5, 3)])
    assert torch.equal(slot.param[0, :3], before[0, :3])
    assert (slot.param[0, 3:] != before[0, 3:]).all() and torch.isfinite(slot.param).all()
    first, second = _moments(slot)
    assert (first[:3] == 0).all() and (second[:3] == 0).all() and (first[3:] > 0).all()


def test_float64_adam() -> None:
    """The first step, where the state holds nothing yet, is Adam's of float64."""
    slot = _slot((4, 256))
    start, gradient = slot.param.double(), _gradient((4, 256))
    table([slot], *_maps()).step([gradient], [0], [rule(1e-3, (0.9, 0.999), 1e-8, 0.01, 1)])
    g = gradient.double()
    exact = (start - 1e-3 * g / (g.abs() + 1e-8)) * (1 - 1e-3 * 0.01)
    torch.testing.assert_close(slot.param.double(), exact, rtol=1e-6, atol=1e-9)


def test_errors_name_what_does_not_fit() -> None:
    maps = _maps()
    with pytest.raises(ValueError, match="no slots"):
        table([], *maps)
    with pytest.raises(ValueError, match="float64"):
        table([_slot((4, 4), torch.float64)], *maps)
    with pytest.raises(ValueError, match="slot 1 is torch.float16"):
        table([_slot((4, 4)), _slot((4, 4), torch.float16)], *maps)
    slot = _slot((4, 100))
    with pytest.raises(ValueError, match=r"slot 0: a parameter of 400 elements .* \[400, 400, 2, 1\]"):
        table([Slot(slot.param, slot.state1, slot.state2, slot.absmax1, slot.absmax2[:1])], *maps)
    with pytest.raises(ValueError, match="gradient is not 16-byte aligned"):
        adamw8bit_triton.Table([slot], *maps).step(
            [torch.zeros(401, device=DEVICE)[1:]], [0], [rule(1e-3, (0.9, 0.999), 1e-8, 0.0, 1)]
        )

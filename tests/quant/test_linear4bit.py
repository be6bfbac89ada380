"""Linear4bit: the product and its gradients, and every way in which a module is moved, copied, saved and loaded."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pronghorn.config.errors import ConfigError
from pronghorn.kernels import nf4_code
from pronghorn.quant.linear4bit import Linear4bit
from pronghorn.quant.nf4 import NF4Tensor


def make_layer(in_features: int = 70, out_features: int = 33, bias: bool = True) -> Linear4bit:
    return Linear4bit.from_linear(nn.Linear(in_features, out_features, bias=bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (4,), (2, 3)])
def test_forward_and_gradients_equal_a_dense_layer(lead: tuple[int, ...], bias: bool) -> None:
    layer = make_layer(bias=bias)
    dense = layer.nf4.dequantize()
    x = torch.randn(*lead, 70, requires_grad=True)
    x_dense = x.detach().clone().requires_grad_()
    b_dense = layer.bias.detach().clone().requires_grad_() if bias else None
    y, y_dense = layer(x), F.linear(x_dense, dense, b_dense)
    assert torch.equal(y, y_dense)
    grad = torch.randn_like(y)
    y.backward(grad)
    y_dense.backward(grad)
    torch.testing.assert_close(x.grad, x_dense.grad, rtol=1e-5, atol=1e-6)
    if bias:
        torch.testing.assert_close(layer.bias.grad, b_dense.grad, rtol=1e-5, atol=1e-6)
    assert layer.weight.grad is None and not layer.weight.requires_grad
    with torch.no_grad():
        assert torch.equal(layer(x), y)


def test_bias_alone_gets_a_gradient() -> None:
    layer = make_layer()
    layer(torch.ones(5, 70)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((33,), 5.0))


def test_train_eval_train_leaves_the_gradient_right() -> None:
    """An eval or no-grad forward must not repack what the next backward pass reads."""
    layer = make_layer(64, 64)
    dense = layer.nf4.dequantize()
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(1, 64))
    layer.train()
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, 64), rtol=1e-5, atol=1e-5)


def test_backward_keeps_nothing_of_the_size_of_x_or_w() -> None:
    layer = make_layer()
    packed: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        layer(torch.randn(4, 70, requires_grad=True))
    assert not packed


def test_dtype_follows_x_and_autocast() -> None:
    layer = make_layer()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert layer(torch.randn(2, 70, dtype=dtype)).dtype == dtype
    x = torch.randn(2, 70, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
        expected = F.linear(x, layer.nf4.dequantize(), layer.bias)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    x64 = torch.randn(2, 70, dtype=torch.float64)
    torch.testing.assert_close(layer(x64), F.linear(x64, layer.nf4.dequantize().double(), layer.bias.double()))
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32


CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "double": lambda m: m.double(),
    "half then float": lambda m: m.half().float(),
    "to dtype": lambda m: m.to(torch.float16),
    "to device and dtype": lambda m: m.to("cpu", torch.bfloat16),
    "type": lambda m: m.type(torch.float16),
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "inside another": lambda m: nn.Sequential(m).half()[0],
}


@pytest.mark.parametrize("name", CASTS)
def test_casts_and_copies_keep_codes_and_scales(name: str) -> None:
    layer = make_layer()
    before = {k: v.clone() for k, v in layer.nf4.tensors().items()}
    moved = CASTS[name](copy.deepcopy(layer))
    after = moved.nf4.tensors()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[k], before[k]) and after[k].dtype == before[k].dtype for k in before)
    assert moved(torch.randn(2, 70, dtype=moved.bias.dtype)).shape == (2, 33) or moved.bias.dtype == torch.float64
    if name in ("half", "to dtype", "type"):
        assert moved.bias.dtype == torch.float16


def test_a_copy_is_its_own() -> None:
    layer = make_layer()
    clone = copy.deepcopy(layer)
    clone.load_weight(torch.zeros(33, 70))
    assert layer.nf4.dequantize().abs().sum() > 0 and clone.nf4.dequantize().abs().sum() == 0


@pytest.mark.parametrize("assign", [True, False])
def test_meta_then_state_dict(assign: bool) -> None:
    layer = make_layer()
    empty = Linear4bit(70, 33, True, torch.float32, device="meta")
    assert {t.device.type for t in (*empty.parameters(), *empty.buffers())} == {"meta"}
    assert empty.state_dict().keys() == layer.state_dict().keys()
    if not assign:
        empty.to_empty(device="cpu")
    assert not any(empty.load_state_dict(layer.state_dict(), assign=assign))
    x = torch.randn(2, 70)
    assert torch.equal(empty(x), layer(x))


def test_meta_then_load_nf4_and_load_weight() -> None:
    weight = torch.randn(33, 70, dtype=torch.bfloat16)
    nf4 = NF4Tensor.quantize(weight)
    a, b = (Linear4bit(70, 33, False, torch.float32, device="meta") for _ in range(2))
    a.load_nf4(nf4)
    b.load_weight(weight)
    assert torch.equal(a.nf4.dequantize(), nf4.dequantize(torch.float32))
    assert torch.equal(a.nf4.dequantize(), b.nf4.dequantize()) and a.weight.device.type == "cpu"


def test_code_books_made_under_the_meta_device_have_values() -> None:
    """Models are built under ``torch.device("meta")``, and the code books are cached by the first to ask."""
    for made in (nf4_code.nf4_pairs, nf4_code.dynamic_code, nf4_code.dynamic_grid, nf4_code.nf4_midpoints):
        made.cache_clear()
    weight = torch.randn(33, 70)
    with torch.device("meta"):
        layer = Linear4bit(70, 33, False, torch.float32)
        assert layer.weight.is_meta
        layer.load_weight(weight)
        out = layer.nf4.dequantize()
    assert (out - weight).abs().max() < 0.16 * weight.abs().max()


def test_loading_writes_in_place() -> None:
    """A CUDA graph holds addresses: a weight of the same shape must not move."""
    layer = make_layer()
    held = {k: v.data_ptr() for k, v in layer.nf4.tensors().items()}
    layer.load_weight(torch.randn(33, 70))
    assert {k: v.data_ptr() for k, v in layer.nf4.tensors().items()} == held


def test_unloaded_is_zero() -> None:
    layer = Linear4bit(70, 33, True, torch.float32)
    assert not layer(torch.randn(2, 70)).any()


def test_loads_a_plain_weight_by_quantizing_it() -> None:
    dense = nn.Linear(70, 33)
    layer = Linear4bit(70, 33, True, torch.float32)
    assert not any(layer.load_state_dict(dense.state_dict()))
    assert torch.equal(layer.nf4.dequantize(), NF4Tensor.quantize(dense.weight).dequantize())
    assert torch.equal(layer.bias, dense.bias)


def test_load_errors_are_reported() -> None:
    layer, state = make_layer(), make_layer().state_dict()
    wrong = Linear4bit(70, 34, False, torch.float32)
    with pytest.raises(RuntimeError, match=r"shape \(33, 70\) does not fit this layer; it needs \(34, 70\)"):
        wrong.load_state_dict(state)
    with pytest.raises(ConfigError, match="does not fit"):
        wrong.load_weight(torch.randn(33, 70))
    broken = {k: v for k, v in state.items() if k != "weight.nested_absmax" and k != "weight.absmax"}
    with pytest.raises(RuntimeError, match="not a whole bitsandbytes NF4 weight"):
        layer.load_state_dict(broken)
    assert layer.load_state_dict({}, strict=False).missing_keys == ["weight", "bias"]
    assert layer.load_state_dict(state | {"weight.other": torch.ones(1)}, strict=False).unexpected_keys == [
        "weight.other"
    ]


def test_is_a_linear_and_says_what_it_is() -> None:
    layer = make_layer()
    assert isinstance(layer, nn.Linear)
    assert "in_features=70, out_features=33, bias=True, nf4, double quantization" in repr(layer)
    assert layer.weight.shape == (33 * 70 // 2, 1) and layer.weight.dtype == torch.uint8
    dense = nn.Linear(70, 33)
    dense.bias.requires_grad_(False)
    assert not Linear4bit.from_linear(dense.eval()).training
    assert not Linear4bit.from_linear(dense).bias.requires_grad


def test_codes_are_held_in_tiles_and_saved_in_rows() -> None:
    for shape, tiled in (((24, 128), True), ((12, 128), False), ((24, 96), False)):
        dense = torch.nn.Linear(shape[1], shape[0], bias=False)
        layer, rows = Linear4bit.from_linear(dense), NF4Tensor.quantize(dense.weight)
        assert layer.tiled == layer.nf4.tiled == tiled
        assert torch.equal(layer.weight.view(-1), rows.codes) == (not tiled)
        state = layer.state_dict()
        assert torch.equal(state["weight"].view(-1), rows.codes) and state["weight"].shape == layer.weight.shape
        again = Linear4bit(shape[1], shape[0], bias=False)
        again.load_state_dict(state)
        assert torch.equal(again.weight, layer.weight) and again.tiled == tiled

"""The state-dict format of bitsandbytes, both ways, with bitsandbytes itself on the other side."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit as BnbLinear4bit
from bitsandbytes.nn import Params4bit
from safetensors.torch import load_file, save_file

from pronghorn.config.errors import ConfigError
from pronghorn.quant.bnb import STATE_KEY, from_bnb, to_bnb
from pronghorn.quant.linear4bit import Linear4bit
from pronghorn.quant.nf4 import NF4Tensor

SHAPES = [(64, 64), (30, 96), (50, 334), (3, 70)]


def bnb_linear(
    out_features: int, in_features: int, dtype: torch.dtype, nested: bool = True, storage: torch.dtype = torch.uint8
) -> BnbLinear4bit:
    layer = BnbLinear4bit(
        in_features, out_features, compress_statistics=nested, quant_type="nf4", quant_storage=storage
    )
    values = torch.randn(out_features, in_features, dtype=dtype)
    layer.weight = Params4bit(
        values, requires_grad=False, compress_statistics=nested, quant_type="nf4", quant_storage=storage, module=layer
    )
    layer.bias = torch.nn.Parameter(layer.bias.to(dtype))
    return layer.to("cpu")


def bnb_dequantize(data: torch.Tensor, state: bnb.functional.QuantState) -> torch.Tensor:
    """bitsandbytes' own result, of the weight taken as flat: on CPUs with AVX512-BF16 its kernel for matrices gives
    other numbers where a row is no whole number of blocks (0.50.2: 30 x 96 off by up to 1.5).
    """
    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    return bnb.functional.dequantize_4bit(data, flat).view(state.shape)


def bnb_weight(layer: BnbLinear4bit) -> torch.Tensor:
    return bnb_dequantize(layer.weight.data, layer.weight.quant_state)


def read_state(tensors: dict[str, torch.Tensor], prefix: str = "weight") -> dict[str, object]:
    return json.loads(bytes(tensors[f"{prefix}.{STATE_KEY}"].tolist()))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_their_state_dict_into_ours_and_back(shape: tuple[int, int], dtype: torch.dtype, nested: bool) -> None:
    theirs = bnb_linear(*shape, dtype, nested)
    saved = theirs.state_dict()
    ours = Linear4bit(shape[1], shape[0], True, dtype)
    assert not any(ours.load_state_dict(saved))  # neither missing nor unexpected keys
    assert torch.equal(ours.nf4.dequantize(dtype), bnb_weight(theirs))
    again = ours.state_dict()
    assert again.keys() == saved.keys()
    assert read_state(again) == read_state(saved)
    for key in saved.keys() - {f"weight.{STATE_KEY}"}:
        assert torch.equal(again[key], saved[key].cpu()) and again[key].dtype == saved[key].dtype, key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_our_state_dict_into_theirs(shape: tuple[int, int], dtype: torch.dtype, tmp_path: Path) -> None:
    ours = Linear4bit.from_linear(torch.nn.Linear(shape[1], shape[0], bias=False, dtype=dtype))
    path = tmp_path / "model.safetensors"
    save_file({f"layer.{k}": v for k, v in ours.state_dict().items()}, path)
    stored = load_file(path)
    stats = {k.removeprefix("layer.weight."): v for k, v in stored.items() if k != "layer.weight"}
    theirs = Params4bit.from_prequantized(stored["layer.weight"], stats, device="cpu")
    assert theirs.shape == (shape[0] * shape[1] // 2, 1)
    assert theirs.quant_state.nested and theirs.quant_state.dtype == dtype
    out = bnb_dequantize(theirs.data, theirs.quant_state)
    assert out.dtype == dtype and torch.equal(out, ours.nf4.dequantize(dtype))


def test_odd_numel_keeps_the_padded_byte() -> None:
    nf4 = NF4Tensor.quantize(torch.randn(5, 13))
    entries = to_bnb(nf4, "w")
    assert entries["w"].shape == (33, 1)
    assert torch.equal(from_bnb("w", entries).dequantize(), nf4.dequantize())


def test_reads_codes_stored_under_another_dtype() -> None:
    """``bnb_4bit_quant_storage=bfloat16``, as FSDP wants it: the same bytes."""
    torch.manual_seed(1)
    plain = bnb_linear(64, 64, torch.bfloat16)
    torch.manual_seed(1)
    stored = bnb_linear(64, 64, torch.bfloat16, storage=torch.bfloat16)
    assert stored.weight.dtype == torch.bfloat16
    assert torch.equal(from_bnb("weight", stored.state_dict()).codes, from_bnb("weight", plain.state_dict()).codes)


def test_keeps_another_map_for_the_scales() -> None:
    """Older releases wrote -1 for the lowest level of the map: kept, and used."""
    nf4 = NF4Tensor.quantize(torch.randn(64, 96))
    entries = to_bnb(nf4, "w")
    entries["w.nested_quant_map"][0] = -1.0
    entries["w.absmax"][:] = 0
    read = from_bnb("w", entries)
    assert read.nested_code is not None and torch.equal(
        to_bnb(read, "w")["w.nested_quant_map"][:1], torch.tensor([-1.0])
    )
    state = bnb.functional.QuantState.from_dict({k[2:]: v for k, v in entries.items() if k != "w"}, device="cpu")
    assert torch.equal(read.dequantize(), bnb_dequantize(entries["w"], state))
    layer = Linear4bit(96, 64, False, torch.float32)
    layer.load_nf4(read)
    assert torch.equal(layer.nf4.dequantize(), read.dequantize())


def test_offset_survives_the_json() -> None:
    nf4 = NF4Tensor.quantize(torch.randn(64, 96))
    assert torch.equal(from_bnb("w", to_bnb(nf4, "w")).offset, nf4.offset)


def test_refusals_name_the_weight_and_the_remedy() -> None:
    entries = to_bnb(NF4Tensor.quantize(torch.randn(64, 64)), "w")
    with pytest.raises(ConfigError, match=r"w: not a whole .*w\.absmax"):
        from_bnb("w", {k: v for k, v in entries.items() if k != "w.absmax"})
    fp4 = {k.replace("__nf4", "__fp4"): v for k, v in entries.items()}
    with pytest.raises(ConfigError, match="fp4.*16-bit checkpoint"):
        from_bnb("w", fp4)
    with pytest.raises(ConfigError, match="quant_map is not the NF4 code book"):
        from_bnb("w", entries | {"w.quant_map": torch.zeros(16)})

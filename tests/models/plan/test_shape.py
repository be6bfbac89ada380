"""Sizes from a config against sizes counted by hand, and against a model that is really there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pronghorn import ConfigError, FastLanguageModel
from pronghorn.models.plan import ModelShape
from pronghorn.models.plan.read import read_shape
from pronghorn.models.plan.shape import nf4_bytes
from pronghorn.quant.nf4 import NF4Tensor
from tests.helpers import tiny_llama
from tests.models.plan.support import TINY, config, shape


def test_an_8b_llama_by_hand() -> None:
    s = shape()
    assert s.layer_weights == 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 == 218_103_808
    assert s.trained == 83_886_080  # PEFT's own count at rank 32 on all seven
    assert s.trained_tensors == 448 and s.adapter_weights == s.trained
    assert s.adapter_bytes == s.trained_bytes == 4 * 83_886_080
    held = (6144 + 96) * 4224 + (4096 + 32) * 4160 + (28672 + 64) * 4160 + (4096 + 32) * 14400
    assert s.cached_bytes == 32 * held * 2  # each group's A and B beside its weights, rows at whole cache lines
    # torch.cuda.memory_allocated on an H200 after loading it and adding the adapter: 5.62329 GB of 2^30 bytes
    assert s.fixed_bytes / 2**30 == pytest.approx(5.62329, rel=1e-4)
    assert shape(load_in_4bit=False).fixed_bytes / 2**30 == pytest.approx(15.27, rel=1e-3)  # the peers' table


@pytest.mark.parametrize("size", [(96, 64), (7, 9), (64, 1)])
def test_nf4_bytes_are_those_of_a_quantized_tensor(size: tuple[int, int]) -> None:
    assert nf4_bytes(size[0] * size[1]) == NF4Tensor.quantize(torch.randn(size)).nbytes


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("in_4bit", [False, True])
def test_the_shape_of_a_config_is_the_shape_of_the_model(tmp_path: Path, tied: bool, in_4bit: bool) -> None:
    targets = ["q_proj", "down_proj", "up_proj"]
    folder = tiny_llama(tmp_path, tie_word_embeddings=tied, attention_bias=True)
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=64, load_in_4bit=in_4bit)
    model = FastLanguageModel.get_peft_model(model, r=4, target_modules=targets)
    live = read_shape(model)
    foreseen = ModelShape.from_config(model.config, load_in_4bit=in_4bit, r=4, target_modules=targets, compute_bytes=4)
    rotary = sum(b.nbytes for name, b in model.named_buffers() if "inv_freq" in name)
    assert live.weight_bytes - rotary == foreseen.weight_bytes
    for name in ("ranks", "trained", "trained_tensors", "trained_bytes", "adapter_bytes", "quant", "sizes", "fused",
                 "layers", "vocab", "compute_bytes", "trains_base"):  # fmt: skip
        assert getattr(live, name) == getattr(foreseen, name), name


def test_a_live_model_under_full_fine_tuning(tmp_path: Path) -> None:
    model, _ = FastLanguageModel.from_pretrained(
        str(tiny_llama(tmp_path)), max_seq_length=64, load_in_4bit=False, full_finetuning=True
    )
    live = read_shape(model, "adamw_torch")
    assert live.trains_base and not live.fused and live.ranks == (0,) * 7
    assert live.trained_bytes == sum(p.nbytes for p in model.parameters())
    assert live.fixed_bytes == live.weight_bytes + 8 * live.trained
    foreseen = ModelShape.from_config(
        model.config, load_in_4bit=False, full_finetuning=True, compute_bytes=4, optimizer="adamw_torch"
    )
    assert (foreseen.trained, foreseen.trained_tensors, foreseen.trained_bytes) == (
        live.trained, live.trained_tensors, live.trained_bytes,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options, words",
    [
        ({"target_modules": ["q_prj"]}, ["target_modules", "'q_prj'", "'q_proj'"]),
        ({"target_modules": "lm_head"}, ["target_modules", "'lm_head'", "q_proj"]),
        ({"optimizer": "adam_torch"}, ["optimizer", "'adam_torch'", "'adamw_torch'"]),
    ],
)
def test_errors_name_field_value_and_remedy(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        ModelShape.from_config(config(**TINY), **options)
    assert all(word in str(caught.value) for word in words), caught.value

"""The 16-bit weights that a merge starts from, proven to be the ones that were loaded."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config.errors import ConfigError
from ..models import Source, state_of, unwrap
from ..quant.bnb import SUFFIXES
from ..quant.linear4bit import Linear4bit
from ..weights.locate import fetch_weights, locate
from ..weights.shards import Entry, Shard, read_shards
from ..weights.stream import Fingerprints, stream


@dataclasses.dataclass(frozen=True)
class Original:
    """Files to merge into.

    Attributes:
        folder: where they are, with config.json.
        shards: their headers.
        note: a sentence on them for the model card, empty for the usual case.
        four_bit: live 4-bit layers by weight name, to be dequantized in place of what the files hold.
        dtype: the dtype of dequantized weights.
    """

    folder: Path
    shards: tuple[Shard, ...]
    note: str = ""
    four_bit: dict[str, Linear4bit] = dataclasses.field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16

    def entries(self, shard: Shard) -> list[Entry]:
        """The tensors of one file that a 16-bit model has, in the order of their bytes."""
        return [self._dense(e) for e in shard.entries if not self._is_part(e.name)]

    def tensors(self, shard: Shard) -> Iterator[tuple[Entry, torch.Tensor]]:
        """The tensors of :meth:`entries` on the CPU, one after another; dequantized ones in float32."""
        for _, entry, tensor in stream([dataclasses.replace(shard, entries=self._kept(shard))]):
            layer = self.four_bit.get(entry.name)
            yield self._dense(entry), tensor if layer is None else layer.nf4.dequantize(torch.float32).cpu()

    def _kept(self, shard: Shard) -> tuple[Entry, ...]:
        return tuple(e for e in shard.entries if not self._is_part(e.name))

    def _is_part(self, name: str) -> bool:
        """Whether ``name`` is a piece of a 4-bit weight, such as its scales."""
        return any(name.endswith(f".{s}") and name.removesuffix(f".{s}") in self.four_bit for s in SUFFIXES)

    def _dense(self, entry: Entry) -> Entry:
        layer = self.four_bit.get(entry.name)
        if layer is None:
            return entry
        return dataclasses.replace(entry, dtype=self.dtype, shape=(layer.out_features, layer.in_features))


def original_of(model: nn.Module, base: str | None, dequantize_base: bool) -> Original:
    """Find and prove the weights to merge into.

    Args:
        base: the 16-bit original of a model that was loaded already quantized; or, where the files of a 16-bit model
            have moved, their new place.
        dequantize_base: for an already quantized model: merge into its dequantized weights.

    Raises:
        ConfigError: the files are gone or changed since they were loaded, ``base`` is another model or quantized too,
            or an already quantized model is given neither way.
    """
    source = state_of(model).source
    if source is None:
        raise ConfigError("save_pretrained_merged: the model does not say where its weights came from; load it anew")
    if base is not None and dequantize_base:
        raise ConfigError(f"save_pretrained_merged: base={base!r} and dequantize_base=True exclude each other")
    if not source.prequantized:
        if dequantize_base:
            raise ConfigError(
                f"dequantize_base=True: {source.name!r} has its 16-bit original, which is better; leave it out"
            )
        folder = Path(source.folder) if base is None else _located(base)
        return Original(folder, tuple(proven(source, folder)))
    if base is not None:
        return _given_base(model, source, base)
    if not dequantize_base:
        raise ConfigError(
            f"save_pretrained_merged: {source.name!r} was loaded already quantized, so its 16-bit original is unknown; "
            "pass base=<the 16-bit model>, or dequantize_base=True to merge into the dequantized 4-bit weights"
        )
    return _dequantized(model, source)


def proven(source: Source, folder: Path) -> list[Shard]:
    """The headers of the files in ``folder``, each shown to be byte for byte what ``source`` recorded at load."""
    if not folder.is_dir():
        raise ConfigError(
            f"source={str(folder)!r}, which {source.name!r} was loaded from, is gone; put it back, or pass "
            "base=<its new place>"
        )
    shards = read_shards(folder)
    names = {shard.path.name for shard in shards}
    if names != set(source.shards):
        raise ConfigError(
            f"source={str(folder)!r} changed since it was loaded: files {sorted(names ^ set(source.shards))}"
        )
    for shard in shards:  # sizes and headers first: most changes show there, and nothing has to be read
        size, header = source.shards[shard.path.name].split(":")[1:3]
        if (str(shard.size), shard.header_sha256) != (size, header):
            raise _changed(shard, source)
    found = Fingerprints()
    for _ in stream(shards, fingerprints=found):
        pass
    for shard in shards:
        if found.of(shard) != source.shards[shard.path.name]:
            raise _changed(shard, source)
    return shards


def _changed(shard: Shard, source: Source) -> ConfigError:
    return ConfigError(
        f"file={str(shard.path)!r} changed since {source.name!r} was loaded from it, so a merge would not give the "
        "model that was trained; restore it, or load and train again"
    )


def _located(base: str) -> Path:
    located = locate(base)
    fetch_weights(located)
    return located.folder


def _given_base(model: nn.Module, source: Source, base: str) -> Original:
    folder = _located(base)
    if "quantization_config" in json.loads((folder / "config.json").read_text(encoding="utf-8")):
        raise ConfigError(f"base={base!r} is quantized too; give the 16-bit model")
    shards = read_shards(folder)
    held = {entry.name: tuple(entry.shape) for shard in shards for entry in shard.entries}
    for name, shape in _dense_shapes(model).items():
        if held.get(name) != shape:
            raise ConfigError(f"base={base!r} does not fit: {name} is {held.get(name)} there, {shape} in this model")
    note = f"The adapter was trained on {source.name}, which is 4-bit; it was merged into the 16-bit {base}."
    return Original(folder, tuple(shards), note)


def _dense_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of the base model, 4-bit ones as they were, a tied head left out."""
    base: Any = unwrap(model)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, module in base.named_modules():
        if ".lora_" in name or ".modules_to_save" in name:
            continue
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        for key, parameter in module.named_parameters(recurse=False):
            packed = isinstance(module, Linear4bit) and key == "weight"
            shape = (module.out_features, module.in_features) if packed else tuple(parameter.shape)
            shapes[f"{plain}.{key}"] = shape
    for tied in tied_head(base)[:1]:
        shapes.pop(tied, None)
    return shapes


def tied_head(base: Any) -> tuple[str, ...]:
    """(head, embedding) weight names where the config ties them, else ()."""
    if not getattr(base.config, "tie_word_embeddings", False):
        return ()
    for head, embedding in dict(getattr(base, "all_tied_weights_keys", None) or {}).items():
        return (head, embedding)
    return ()


def _dequantized(model: nn.Module, source: Source) -> Original:
    shards = proven(source, Path(source.folder))
    base = unwrap(model)
    layers = {
        f"{name.replace('.base_layer', '')}.weight": module
        for name, module in base.named_modules()
        if isinstance(module, Linear4bit)
    }
    plain = [e for shard in shards for e in shard.entries if e.dtype.is_floating_point]
    dense = [e.dtype for e in plain if not any(e.name.endswith(f".{suffix}") for suffix in SUFFIXES)]
    note = (
        f"Its base is not a 16-bit original: the 4-bit weights of {source.name} were dequantized and the adapter "
        "merged into them (dequantize_base=True), so it carries their quantization error."
    )
    return Original(Path(source.folder), tuple(shards), note, layers, dense[0])

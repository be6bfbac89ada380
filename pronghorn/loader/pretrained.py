"""``from_pretrained``: settings checked, files checked, then one pass over the weights."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from ..config.errors import ConfigError
from ..config.load import LoadConfig
from ..env import Machine
from ..models import ModelSpec, ModelState, Source, attach, spec_for
from ..models.state import ATTRIBUTE
from ..quant.linear4bit import Linear4bit
from ..weights.locate import Located, fetch_weights, locate
from ..weights.shards import read_shards
from .build import build_empty, plan_fill, put_linear4bit, quantization_config
from .fill import fill
from .settings import dtype_that_trains, resolve_device, resolve_dtype
from .tokenizer import choose_pad, load_tokenizer

_MIB, _GIB = 1024**2, 1024**3


def from_pretrained(config: LoadConfig) -> tuple[Any, Any]:
    """Load a model and its tokenizer as ``config`` says, and print one line about it.

    The transformers model is built on the meta device and filled from its safetensors files on the device; with
    ``load_in_4bit`` the projections are quantized there, one at a time. Its name, config and generation config stay.

    Returns:
        ``(model, tokenizer)``: a transformers ``*ForCausalLM`` (with ``num_labels`` a
        ``*ForSequenceClassification``) in evaluation mode with Pronghorn attached, all weights
        frozen unless ``full_finetuning``.

    Raises:
        ConfigError: an absent or partial folder, an unknown family, damaged files, settings that cannot work here;
            always before weights are read.
    """
    started = time.perf_counter()
    device, here = resolve_device(config.device_map)
    dtype, note = resolve_dtype(config.dtype, device, bool(here and here.bf16))
    if config.full_finetuning:
        dtype, instead = dtype_that_trains(config.dtype, dtype)
        note = instead or note
    access: dict[str, Any] = {"token": config.token, "local_files_only": config.local_files_only}
    located = locate(config.model_name, revision=config.revision, code=config.trust_remote_code, **access)
    model_config = _read_config(located, config.trust_remote_code)
    spec = spec_for(model_config)
    _check_head(spec, model_config, config)
    prequantized = _prequantized(model_config, config, located.folder)
    fetch_weights(located, **access)
    shards = read_shards(located.folder)
    tokenizer = load_tokenizer(located.folder, config.trust_remote_code)
    torch.manual_seed(config.random_state)
    model = build_empty(model_config, dtype, config.trust_remote_code, config.num_labels)
    plan = plan_fill(model, shards, located.folder, classifier=config.num_labels is not None)
    in_4bit = config.load_in_4bit and (put_linear4bit(model, spec, plan, prequantized, dtype) > 0)
    fingerprints = fill(model, shards, plan, device, dtype)

    if in_4bit:
        model.config.quantization_config = quantization_config(dtype)
    _set_generation(model, tokenizer, located.folder)
    model.requires_grad_(False)
    if config.full_finetuning:
        model.requires_grad_(True)
    model.eval()
    length, capped = _length(config.max_seq_length, model_config)
    setattr(
        model,
        ATTRIBUTE,
        ModelState(
            max_seq_length=length,
            compute_dtype=dtype,
            source=Source(config.model_name, str(located.folder), located.revision, fingerprints, prequantized),
            load_in_4bit=in_4bit,
            full_finetuning=config.full_finetuning,
            fast_inference=config.fast_inference,
            max_lora_rank=config.max_lora_rank,
            gpu_memory_utilization=config.gpu_memory_utilization,
            use_gradient_checkpointing=config.use_gradient_checkpointing,
            compile_ahead=config.compile_ahead,
            tokenizer=tokenizer,
        ),
    )
    attach(model)
    pad = choose_pad(tokenizer, _end_ids(model), model.get_input_embeddings().num_embeddings)
    model.config.pad_token_id = tokenizer.pad_token_id
    if _generates(model):
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the 16-bit weights that were quantized
    for line in (note, capped, pad, _summary(model, here, device, prequantized, time.perf_counter() - started)):
        if line:
            print(line, flush=True)
    return model, tokenizer


def _check_head(spec: ModelSpec, model_config: Any, config: LoadConfig) -> None:
    """A saved classifier is not loaded as a language model, whose head its files do not hold."""
    saved = set(getattr(model_config, "architectures", None) or [])
    if config.num_labels is None and saved and not saved & set(spec.architectures):
        raise ConfigError(
            f"model_name={config.model_name!r} holds a {', '.join(sorted(saved))}; pass num_labels= to load it as that"
        )


def _read_config(located: Located, trust_remote_code: bool) -> Any:
    """config.json as transformers' config.

    Raises:
        ConfigError: it is absent or damaged, or its family is unknown to Pronghorn or to transformers.
    """
    path = located.folder / "config.json"
    if not path.is_file():
        if (located.folder / "adapter_config.json").is_file():
            raise ConfigError(
                f"folder={str(located.folder)!r} holds a LoRA adapter, not a model; load its base model and then "
                "model.load_lora(folder)"
            )
        raise ConfigError(f"folder={str(located.folder)!r} has no config.json; give a folder that holds a whole model")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"file={str(path)!r} is damaged ({error}); copy or download it again") from error
    spec_for(_Raw(raw))  # before transformers, whose message for an unknown family lists hundreds
    config = AutoConfig.from_pretrained(located.folder, trust_remote_code=trust_remote_code, local_files_only=True)
    config._name_or_path = located.name
    return config


class _Raw:
    """config.json's two fields that tell the family."""

    def __init__(self, raw: Any) -> None:
        raw = raw if isinstance(raw, dict) else {}
        self.model_type = raw.get("model_type")
        self.architectures = raw.get("architectures")

    def __str__(self) -> str:
        return "none given in config.json"


def _prequantized(model_config: Any, config: LoadConfig, folder: Path) -> bool:
    """Whether the files are 4-bit already; takes the note out of the config, whose place Pronghorn's own takes."""
    found = getattr(model_config, "quantization_config", None)
    if found is None:
        return False
    settings = found if isinstance(found, dict) else found.to_dict()
    method = str(getattr(settings.get("quant_method"), "value", settings.get("quant_method")))
    if method != "bitsandbytes" or not settings.get("load_in_4bit") or settings.get("bnb_4bit_quant_type") != "nf4":
        raise ConfigError(
            f"folder={str(folder)!r} is quantized with quant_method={method!r} "
            f"(bnb_4bit_quant_type={settings.get('bnb_4bit_quant_type')!r}); only bitsandbytes NF4 or 16-bit loads"
        )
    if not config.load_in_4bit:
        raise ConfigError(
            f"load_in_4bit=False, but folder={str(folder)!r} holds 4-bit weights; pass load_in_4bit=True, or give the "
            "16-bit checkpoint"
        )
    del model_config.quantization_config
    return True


def _set_generation(model: Any, tokenizer: Any, folder: Path) -> None:
    """The folder's generation_config.json with all its end ids, or what the config gives."""
    if not _generates(model):
        return
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    if model.generation_config.eos_token_id is None and tokenizer.eos_token_id is not None:
        model.generation_config.eos_token_id = tokenizer.eos_token_id


def _generates(model: Any) -> bool:
    """Whether it has a generation config: a classifier has none."""
    return getattr(model, "generation_config", None) is not None


def _end_ids(model: Any) -> list[int]:
    ends = (model.generation_config if _generates(model) else model.config).eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def _length(asked: int | None, model_config: Any) -> tuple[int, str | None]:
    """The longest sequence, never over what the model's positions were made for, and a line where that cuts it."""
    most = int(model_config.max_position_embeddings)
    if asked is None or asked == most:
        return most, None
    if asked > most:
        return most, f"Pronghorn: max_seq_length={asked} becomes {most}, the model's max_position_embeddings"
    return asked, None


def _summary(model: Any, here: Machine | None, device: torch.device, prequantized: bool, seconds: float) -> str:
    state: ModelState = getattr(model, ATTRIBUTE)
    source = state.source
    assert source is not None
    size = sum(t.nbytes for t in {id(t): t for t in [*model.parameters(), *model.buffers()]}.values())
    count = _parameters(model)
    amount = f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.1f}M"
    held = "NF4 weights with double quantization" if state.load_in_4bit else "weights"
    if prequantized:
        held = "NF4 weights as saved"
    dtype = str(state.compute_dtype).removeprefix("torch.")
    name = here.name if here is not None else "CPU"
    return (
        f"Pronghorn: {source.name} ({type(model).__name__}, {amount} parameters) on {name} ({device}), {held}, compute "
        f"in {dtype}, attention {model.config._attn_implementation}, {_size(size)}, loaded in {seconds:.1f} s"
    )


def _size(count: int) -> str:
    return f"{count / _GIB:.2f} GiB" if count >= _GIB else f"{count / _MIB:.1f} MiB"


def _parameters(model: Any) -> int:
    """Parameters of the model, each 4-bit weight by the weights it stands for, a tied head once."""
    sizes: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            packed = isinstance(module, Linear4bit) and parameter.dtype == torch.uint8
            sizes[id(parameter)] = module.in_features * module.out_features if packed else parameter.numel()
    return sum(sizes.values())

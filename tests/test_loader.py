"""from_pretrained and get_peft_model: the same numbers as transformers, and one clear error for each bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from pronghorn.config.errors import ConfigError
from pronghorn.config.load import LoadConfig
from pronghorn.loader import from_pretrained, get_peft_model
from pronghorn.loader.settings import dtype_that_trains, resolve_device, resolve_dtype
from pronghorn.models import state_of, unwrap
from pronghorn.quant.linear4bit import Linear4bit
from pronghorn.weights import locate as locating
from tests.helpers import relative_error, tiny_llama

LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {},
    "tied": {"tie_word_embeddings": True},
    "mha-bias-odd": {"num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "hidden_size": 60,
                     "intermediate_size": 92, "head_dim": 16},
    "llama3-rope": {"rope_parameters": LLAMA3_ROPE},
}  # fmt: skip
IDS = torch.arange(3, 60).reshape(3, 19)


def load(folder: Path | str, **options: Any) -> Any:
    return from_pretrained(LoadConfig.of(**{"model_name": str(folder), "load_in_4bit": False, **options}))[0]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(IDS).logits


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_equal_transformers(tmp_path: Path, shape: str, dtype: torch.dtype) -> None:
    folder = tiny_llama(tmp_path, dtype=dtype, max_shard_size="60KB", **SHAPES[shape])
    assert len(list(folder.glob("*.safetensors"))) > 2
    model, plain = load(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert relative_error(logits(model), logits(plain)) <= 1e-6
    assert torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (shape == "tied")
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("shape", SHAPES)
def test_4bit_equals_transformers_with_bitsandbytes(tmp_path: Path, shape: str) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16, max_shard_size="60KB", **SHAPES[shape])
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
    model = load(folder, load_in_4bit=True)
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 14
    mine, theirs = model.state_dict(), plain.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        if name.endswith(("proj.weight", ".absmax", "nested_absmax", "quant_map")):
            assert torch.equal(mine[name].cpu(), value.cpu()), name


def test_a_4bit_model_saves_what_transformers_loads_and_loads_it_back_losslessly(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16, attention_bias=True)
    model = load(folder, load_in_4bit=True)
    model.save_pretrained(tmp_path / "nf4", max_shard_size="40KB")
    shutil.copy(folder / "tokenizer.json", tmp_path / "nf4")
    shutil.copy(folder / "tokenizer_config.json", tmp_path / "nf4")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4", dtype=torch.float32)
    assert type(plain.model.layers[0].mlp.up_proj).__module__.startswith("bitsandbytes")
    assert relative_error(logits(plain), logits(model)) <= 1e-4
    again = load(tmp_path / "nf4", load_in_4bit=True)
    assert state_of(again).source.prequantized and not state_of(model).source.prequantized
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(ConfigError, match="holds 4-bit weights; pass load_in_4bit=True"):
        load(tmp_path / "nf4")


def test_a_checkpoint_by_bitsandbytes_itself_with_a_16bit_projection(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, dtype=torch.bfloat16)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "model.layers.1.mlp.down_proj"]
    )
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
    theirs.save_pretrained(tmp_path / "bnb")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folder / name, tmp_path / "bnb")
    model = load(tmp_path / "bnb", load_in_4bit=True)
    assert sum(isinstance(m, Linear4bit) for m in model.modules()) == 13
    assert type(model.model.layers[1].mlp.down_proj) is torch.nn.Linear
    mine, saved = model.state_dict(), theirs.state_dict()
    assert mine.keys() == saved.keys()
    for name, value in saved.items():
        if "quant_state" not in name:
            assert torch.equal(mine[name], value.to(mine[name].dtype)), name
    assert relative_error(logits(model), logits(theirs)) <= 0.03, "theirs computes in bfloat16"


def test_what_is_remembered_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_llama(tmp_path, max_shard_size="100KB", extra_tokens=("<|finetune_right_pad_id|>",))
    model, tokenizer = from_pretrained(LoadConfig(str(folder), max_seq_length=128, max_lora_rank=8))
    state = state_of(model)
    assert (state.max_seq_length, state.max_lora_rank, state.load_in_4bit) == (128, 8, True)
    assert state.compile_ahead
    assert state.compute_dtype == torch.float32
    assert state.source.folder == str(folder)
    assert sorted(state.source.shards) == sorted(p.name for p in folder.glob("*.safetensors"))
    assert model.generation_config.eos_token_id == [1, 4, 5]
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"
    assert model.generation_config.pad_token_id == model.config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.padding_side == "left"
    assert model.config.quantization_config.load_in_4bit
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert "<|finetune_right_pad_id|>" in lines[0]
    for part in (str(folder), "LlamaForCausalLM", "cpu", "NF4", "float32", "sdpa"):
        assert part in lines[1]


def test_fingerprints_tell_any_changed_byte(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path, max_shard_size="100KB")
    first = state_of(load(folder)).source.shards
    assert state_of(load(folder)).source.shards == first
    path = sorted(folder.glob("*.safetensors"))[1]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    second = state_of(load(folder)).source.shards
    assert {name for name in first if first[name] != second[name]} == {path.name}


@pytest.mark.parametrize(
    ("extra", "pad"),
    [(("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>"), "<|finetune_right_pad_id|>"),
     (("<|reserved_special_token_0|>",), "<|reserved_special_token_0|>"), (("<pad>",), "<pad>"), ((), "<|eot_id|>")],
)  # fmt: skip
def test_the_pad_token_is_no_end_where_the_vocabulary_can_spare_one(
    tmp_path: Path, extra: tuple[str, ...], pad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, tokenizer = from_pretrained(LoadConfig(str(tiny_llama(tmp_path, extra_tokens=extra))))
    assert tokenizer.pad_token == pad
    assert sum("pad token" in line for line in capsys.readouterr().out.splitlines()) == 1


def test_length_is_capped_at_the_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_llama(tmp_path)
    assert state_of(load(folder, max_seq_length=None)).max_seq_length == 512
    assert state_of(load(folder, max_seq_length=4096)).max_seq_length == 512
    assert "max_seq_length=4096 becomes 512" in capsys.readouterr().out


def test_dtypes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert resolve_dtype(None, cpu, False) == (torch.float32, None)
    assert resolve_dtype(None, gpu, True) == (torch.bfloat16, None)
    assert resolve_dtype("auto", gpu, False) == (torch.float16, None)
    assert resolve_dtype("float64", cpu, False) == (torch.float64, None)
    assert resolve_dtype(torch.float32, gpu, True) == (torch.float32, None)
    with pytest.raises(ConfigError, match="dtype=bfloat16 is not native"):
        resolve_dtype("bf16", gpu, False)
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        resolve_dtype("bfloat6", cpu, False)
    with pytest.raises(ConfigError, match="cannot compute"):
        resolve_dtype(torch.int8, cpu, False)
    model = load(tiny_llama(tmp_path), dtype=torch.bfloat16)
    assert model.dtype == torch.float32
    assert "dtype=bfloat16 becomes float32" in capsys.readouterr().out


def test_devices() -> None:
    assert resolve_device("cpu")[0] == resolve_device({"": "cpu"})[0] == torch.device("cpu")
    with pytest.raises(ConfigError, match="spreads the model"):
        resolve_device({"model.layers.0": 0, "lm_head": 1})
    with pytest.raises(ConfigError, match="names no device"):
        resolve_device("gpu-one")
    if not torch.cuda.is_available():
        assert resolve_device("auto")[0] == torch.device("cpu")
        for wanted in ("cuda", "cuda:1", 0):
            with pytest.raises(ConfigError, match="needs a GPU"):
                resolve_device(wanted)


def test_full_finetuning_trains_everything(tmp_path: Path) -> None:
    model = load(tiny_llama(tmp_path), full_finetuning=True)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="full_finetuning=True; load it without"):
        get_peft_model(model)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _shard(folder: Path, number: int = 1) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def _rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a one-file model."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


BAD: dict[str, tuple[Any, str]] = {
    "no-config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "damaged-config": (lambda f: (f / "config.json").write_text("{"), "config.json.*damaged"),
    "unknown-family": (lambda f: _edit(f / "config.json", model_type="mamba"), "'mamba' is not a family.*known: llama"),
    "no-family": (lambda f: (f / "config.json").write_text("{}"), "is not a family"),
    "no-causal-lm": (
        lambda f: _edit(f / "config.json", architectures=["LlamaForTokenClassification"]), "not a causal language"),
    "classifier": (
        lambda f: _edit(f / "config.json", architectures=["LlamaForSequenceClassification"]), "pass num_labels="),
    "gptq": (lambda f: _edit(f / "config.json", quantization_config={"quant_method": "gptq"}), "quant_method='gptq'"),
    "missing-shard": (lambda f: _shard(f).unlink(), "is partial: .* names 'model-00002-of"),
    "damaged-index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "index.json.*damaged"),
    "truncated": (lambda f: _shard(f).write_bytes(_shard(f).read_bytes()[:-64]), "truncated or damaged.*should end"),
    "header-cut": (lambda f: _shard(f).write_bytes(_shard(f).read_bytes()[:40]), "truncated or damaged: its header"),
    "empty-file": (lambda f: _shard(f).write_bytes(b""), "truncated or damaged"),
    "no-tokenizer": (lambda f: [p.unlink() for p in f.glob("tokenizer*")], "has no tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_clear_error_before_weights_are_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, message = BAD[name]
    folder = tiny_llama(tmp_path, max_shard_size="100KB")
    damage(folder)
    monkeypatch.setattr("pronghorn.weights.stream._read", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=message):
        load(folder)


BAD_TENSORS: dict[str, tuple[Any, str]] = {
    "missing": (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "'model.layers.1.mlp.up_proj.weight' is in none"),
    "head-missing": (lambda t: t.pop("lm_head.weight"), "'lm_head.weight' is in none"),
    "unexpected": (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "'model.extra.weight', which Llama"),
    "shape": (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"has shape \(7,\).*asks for \(64,\)"),
    "integers": (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "is torch.int8"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_do_not_fit_are_named(tmp_path: Path, name: str) -> None:
    change, message = BAD_TENSORS[name]
    folder = tiny_llama(tmp_path)
    _rewrite(folder, change)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_what_transformers_passes_over_is_passed_over(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    before = logits(load(folder))
    _rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    assert torch.equal(logits(load(folder)), before)


def test_names_that_lead_nowhere(tmp_path: Path) -> None:
    for name, message in {
        str(tmp_path / "absent"): "there is no such folder, and it is no hub name",
        "./absent": "there is no such folder",
        "nobody/no-such-model": "is no folder here, and could not be had from the hub",
    }.items():
        with pytest.raises(ConfigError, match=message):
            load(name)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a LoRA adapter"):
        load(tmp_path / "adapter")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is a file"):
        load(tmp_path / "file")


def test_a_hub_name_fetches_configs_first_and_only_the_shards_of_the_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = tiny_llama(tmp_path, name="remote", max_shard_size="100KB")
    (remote / "consolidated.safetensors").write_bytes(b"never wanted")
    snapshot = tmp_path / "cache" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    calls: list[dict[str, Any]] = []

    def download(name: str, allow_patterns: list[str], **options: Any) -> str:
        calls.append({"name": name, "patterns": allow_patterns, **options})
        for pattern in allow_patterns:
            for path in remote.glob(pattern):
                shutil.copy(path, snapshot / path.name)
        return str(snapshot)

    monkeypatch.setattr(locating, "snapshot_download", download)
    model = load("owner/tiny", revision="main", token="secret")
    source = state_of(model).source
    assert (source.name, source.revision, source.folder) == ("owner/tiny", "abc123", str(snapshot))
    assert model.config._name_or_path == "owner/tiny"
    assert [call["revision"] for call in calls] == ["main", "abc123"], "weights of the very commit of the config"
    assert all(call["token"] == "secret" for call in calls)
    assert not any("safetensors" in p and "index" not in p for p in calls[0]["patterns"])
    assert sorted(calls[1]["patterns"]) == sorted(source.shards)
    assert not (snapshot / "consolidated.safetensors").exists()


def test_an_unknown_family_on_the_hub_downloads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    monkeypatch.setattr(locating, "snapshot_download", lambda *_, **__: str(snapshot))
    monkeypatch.setattr("pronghorn.loader.pretrained.fetch_weights", lambda *_, **__: pytest.fail("weights fetched"))
    with pytest.raises(ConfigError, match="known: llama"):
        load("owner/mamba")


def test_get_peft_model_refuses_what_cannot_work(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    for options, message in (
        ({"r": 65}, "r=65 is over max_lora_rank=64"),
        ({"rank_pattern": {"q_proj": 100}}, "r=100 is over max_lora_rank=64"),
        ({"target_modules": ["q_proj", "k_pro"]}, "'k_pro', unknown here; did you mean 'k_proj'.*known: .*q_proj"),
        ({"modules_to_save": ["lm_heat"]}, "modules_to_save has 'lm_heat'"),
        ({"target_modules": "nothing.*"}, "PEFT refuses"),
        ({"bias": "some"}, "bias='some'"),
        ({"lora_alfa": 3}, "did you mean 'lora_alpha'"),
    ):
        with pytest.raises(ConfigError, match=message):
            get_peft_model(load(folder), **options)
    model = get_peft_model(load(folder))
    with pytest.raises(ConfigError, match="already has an adapter"):
        get_peft_model(model)


def test_the_start_follows_random_state_alone(tmp_path: Path) -> None:
    folder = tiny_llama(tmp_path)
    torch.manual_seed(1)
    models = [get_peft_model(load(folder), random_state=seed) for seed in (7, 7, 8)]
    starts = [unwrap(m).model.layers[0].self_attn.q_proj.lora_A["default"].weight for m in models]
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    base = load(folder)
    rng = torch.random.get_rng_state()
    get_peft_model(base)
    assert torch.equal(torch.random.get_rng_state(), rng)


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_trainer_trains_the_adapter_and_nothing_else(tmp_path: Path, load_in_4bit: bool) -> None:
    model = get_peft_model(load(tiny_llama(tmp_path), load_in_4bit=load_in_4bit), r=4)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rows = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, learning_rate=1e-2, report_to="none", use_cpu=True, save_steps=2
    )
    Trainer(model, arguments, train_dataset=rows).train()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {n for n in before if "lora_" in n}
    assert (tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors").is_file()


def test_base_weights_that_train_are_never_float16() -> None:
    assert dtype_that_trains(None, torch.bfloat16) == (torch.bfloat16, None)
    dtype, line = dtype_that_trains(None, torch.float16)  # what a GPU without bfloat16 computes in
    assert dtype == torch.float32 and line is not None and "float32" in line
    with pytest.raises(ConfigError, match="loss scaler"):
        dtype_that_trains("float16", torch.float16)

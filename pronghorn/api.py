"""The public face: ``FastLanguageModel``, ``PatchFastRL`` and the methods that a loaded model carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from types import MethodType
from typing import Any

from torch import nn

from . import loader
from .config.adapters import LIVE, AdapterChoice, LoraHandle
from .config.errors import ConfigError, reject_unknown
from .config.load import LoadConfig
from .config.lora import LoraDefaults
from .config.plan import PlanSettings
from .config.sampling import SamplingParams
from .models import state_of
from .models.plan import TrainingPlan
from .rollout import base as rollout
from .rollout.warmup import warm_up
from .sft.trl_head import install as answer_trl_sft


class FastLanguageModel:
    """Loads models and adds adapters; every method is static, the name is what scripts for this flow use."""

    @staticmethod
    def from_pretrained(
        model_name: str, max_seq_length: int | None = 2048, dtype: Any = None, load_in_4bit: bool = True, **options: Any
    ) -> tuple[Any, Any]:
        """Load a causal language model and its tokenizer, ready to train and to sample.

        Args:
            model_name: hub name or local folder.
            max_seq_length: longest prompt + completion, in tokens; None takes the model's own maximum.
            dtype: compute dtype; None picks what the device does best (float32 on the CPU).
            load_in_4bit: NF4 base weights with double quantization, else 16 bits.
            options: the other fields of :class:`pronghorn.config.load.LoadConfig`.

        Returns:
            ``(model, tokenizer)``: a transformers model and tokenizer; the model also has ``fast_generate``,
            ``save_lora``, ``load_lora``, ``save_pretrained_merged`` and ``push_to_hub_merged``.

        Raises:
            ConfigError: an unknown option, a model that is absent, partial or of an unknown family, or a combination
                that cannot work; always before weights are read.
        """
        config = LoadConfig.of(
            model_name=model_name, max_seq_length=max_seq_length, dtype=dtype, load_in_4bit=load_in_4bit, **options
        )
        model, tokenizer = loader.from_pretrained(config)
        state_of(model).tokenizer = tokenizer
        add_methods(model)
        if config.fast_inference:
            rollout.engine_of(model, tokenizer)
        return model, tokenizer

    @staticmethod
    def get_peft_model(model: nn.Module, r: int = 16, **options: Any) -> Any:
        """Add LoRA adapters through PEFT; ``options`` are fields of :class:`pronghorn.config.lora.LoraDefaults`.

        Raises:
            ConfigError: an unknown option or target module, or a rank over the model's ``max_lora_rank``.
        """
        LoraDefaults.of(r=r, **options)
        peft_model = loader.get_peft_model(model, r=r, **options)
        add_methods(peft_model)
        warm_up(peft_model)
        return peft_model

    @staticmethod
    def for_training(model: nn.Module) -> nn.Module:
        """Put the model in training mode; returns it."""
        return model.train()

    @staticmethod
    def for_inference(model: nn.Module) -> nn.Module:
        """Put the model in evaluation mode; returns it. ``fast_generate`` is right in either mode."""
        return model.eval()


def fast_generate(
    self: nn.Module,
    prompts: Any,
    sampling_params: Any = None,
    lora_request: AdapterChoice = LIVE,
    use_tqdm: bool = False,
) -> list[rollout.RequestOutput]:
    """Complete prompts with the model's own weights.

    Args:
        prompts: one or several of: a string, a list of token ids, a chat (list of role/content messages).
        sampling_params: a :class:`SamplingParams`, a ``vllm.SamplingParams``, a dict, a list of one for each prompt,
            or None for the defaults.
        lora_request: what answers: the live adapter by default, None for the base model, or what ``load_lora`` gave.
        use_tqdm: show a progress bar.

    Returns:
        One :class:`RequestOutput` a prompt, in order: ``.outputs[i].text``, ``.token_ids``, ``.logprobs``,
        ``.finish_reason``.
    """
    from .rollout.text import encode_prompts

    tokenizer = state_of(self).tokenizer
    engine = rollout.engine_of(self, tokenizer)
    if isinstance(sampling_params, list | tuple):
        params: Any = [SamplingParams.from_any(p) for p in sampling_params]
    else:
        params = SamplingParams.from_any(sampling_params)
    if lora_request is not None and lora_request is not LIVE and not isinstance(lora_request, LoraHandle):
        raise ConfigError(
            f"lora_request={lora_request!r} is a {type(lora_request).__name__}; pass what model.load_lora(dir) "
            "returned, None for the base model, or nothing for the live adapter"
        )
    ids = encode_prompts(tokenizer, prompts)
    if not use_tqdm:
        return engine.generate(ids, params, adapter=lora_request)
    with _progress_bar(len(ids)) as update:
        return engine.generate(ids, params, adapter=lora_request, progress=update)


class _progress_bar:
    """A rich progress bar as a context manager that gives the engine's ``progress`` callback."""

    def __init__(self, total: int) -> None:
        from rich.progress import Progress

        self.bar = Progress(transient=True)
        self.task = self.bar.add_task("generating", total=total)

    def __enter__(self) -> Callable[[int, int, int], None]:
        self.bar.start()
        return lambda finished, total, tokens: self.bar.update(self.task, completed=finished, total=total)

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


def save_lora(self: nn.Module, path: str, **options: Any) -> None:
    """Save the live adapter to ``path`` as a plain PEFT folder, whole or not at all."""
    from .lora.io import save_lora as save

    save(self, path, **options)


def load_lora(self: nn.Module, path: str) -> LoraHandle:
    """Load the adapter in folder ``path`` beside the live one; pass the result as ``lora_request``."""
    from .lora.io import load_lora as load

    return load(self, path)


def save_pretrained_merged(
    self: nn.Module, save_directory: str, tokenizer: Any = None, save_method: str = "merged_16bit", **options: Any
) -> None:
    """Save the model with its adapter merged.

    Args:
        save_directory: the folder, which appears whole or not at all.
        tokenizer: saved beside; None saves the one that the model was loaded with.
        save_method: ``"merged_16bit"`` (into the original 16-bit weights), ``"merged_4bit"`` (that, quantized again in
            bitsandbytes' format), or ``"lora"`` (the adapter alone).
        options: ``base=`` or ``dequantize_base=True`` for a base that was loaded already quantized.
    """
    from .export import save_merged

    save_merged(self, tokenizer or state_of(self).tokenizer, save_directory, save_method=save_method, **options)


def push_to_hub_merged(
    self: nn.Module, repo_id: str, tokenizer: Any = None, save_method: str = "merged_16bit", **options: Any
) -> None:
    """Merge as :func:`save_pretrained_merged` does and upload the folder to ``repo_id`` on the hub."""
    from .export import push_to_hub_merged as push

    push(self, repo_id, tokenizer or state_of(self).tokenizer, save_method=save_method, **options)


def save_pretrained(self: nn.Module, *args: Any, **options: Any) -> Any:
    """PEFT's own ``save_pretrained``, which takes the adapter out of the whole model's state dict: of one without the
    4-bit weights, which would be copied for it (half a byte a weight, at each checkpoint of TRL's trainers)."""
    from .quant.linear4bit import weights_left_out

    with weights_left_out():
        return type(self).save_pretrained(self, *args, **options)  # type: ignore[attr-defined]


_METHODS = (fast_generate, save_lora, load_lora, save_pretrained_merged, push_to_hub_merged)


def add_methods(model: Any) -> None:
    """Bind the public methods to this instance, and let TRL's SFTTrainer be answered; its class stays as it is."""
    for function in (*_METHODS, save_pretrained) if hasattr(model, "peft_config") else _METHODS:
        setattr(model, function.__name__, MethodType(function, model))
    answer_trl_sft(model)


def PatchFastRL(algorithm: str = "GRPO", FastLanguageModel: Any = None, mode: str = "native") -> None:
    """Make ``trl.GRPOTrainer`` and ``trl.GRPOConfig`` Pronghorn's, by name; no source changes.

    Args:
        algorithm: ``"GRPO"``.
        FastLanguageModel: accepted as scripts pass it; nothing depends on it.
        mode: ``"native"``: the names in ``trl`` and ``trl.trainer`` are Pronghorn's. ``"stock"``: they stay TRL's, and
            TRL's trainer with ``use_vllm=True`` samples with Pronghorn's engine on the weights that it trains.

    Raises:
        ConfigError: another algorithm or mode, or (``"stock"``) a TRL that the engine does not know how to serve.
    """
    from .grpo.trl_adapter import patch

    if str(algorithm).upper() != "GRPO":
        raise ConfigError(f"PatchFastRL: algorithm={algorithm!r} is not offered; give 'GRPO'")
    patch(mode=mode)


def plan(model: Any, **settings: Any) -> TrainingPlan:
    """What a training step would take in memory and time, without running it.

    Args:
        model: a live model, a transformers config, a folder with a config.json, or a hub name.
        settings: fields of :class:`pronghorn.config.plan.PlanSettings`: ``batch_size``, ``seq_length``,
            ``gpu="H200"`` (default: the GPU here), ``memory_gb``, ``use_gradient_checkpointing``, ``load_in_4bit``,
            ``r``, ``target_modules``, ``optimizer``.

    Returns:
        The plan: ``peak_bytes``, ``step_seconds``, ``tokens_per_second``, each layer's part, and ``line()``.

    Raises:
        ConfigError: a bad value, an unknown card, no GPU to plan for, or a step that does not fit, with the smallest
            peak that it could have and what to lower.
    """
    reject_unknown("plan", settings, [f.name for f in fields(PlanSettings)])
    return loader.plan(model, PlanSettings(**settings))

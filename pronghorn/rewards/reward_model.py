"""Reward models among the reward functions, served as TRL's trainer serves them: a sequence classifier of one score."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from ..config.errors import ConfigError


class RewardModel:
    """A reward function that scores prompt and completion by a model, in the trainer's process and without gradients.

    Texts are TRL's: prompt + completion, or both chats through the reward tokenizer's template; no special tokens are
    added; rows are padded on the right, where a classifier looks for each row's last token.

    Args:
        model: a ``*ForSequenceClassification`` of one label; it is moved to ``device`` and put in evaluation mode.
        tokenizer: the reward model's own; None loads it from where the model came from. Without a padding token it gets
            its end token for that, and the model's config is told.
        device: where it runs.
        autocast: dtype of the products in its forward, that of mixed-precision training; None leaves the model's own.
        template_kwargs: further variables of the chat template.
        trust_remote_code: for loading the tokenizer.

    Raises:
        ConfigError: a model of several labels, or no usable tokenizer.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        device: torch.device | str = "cpu",
        autocast: torch.dtype | None = None,
        template_kwargs: dict[str, Any] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        config: Any = getattr(model, "config", None)
        if config is None:
            raise ConfigError(
                f"reward_funcs has a {type(model).__name__}, a module without a config; give a sequence classifier of "
                "transformers, or wrap the module in a function of (prompts, completions, **kwargs)"
            )
        self.__name__ = str(getattr(config, "_name_or_path", "") or type(model).__name__).rstrip("/").split("/")[-1]
        if config.num_labels != 1:
            raise ConfigError(
                f"reward_funcs: {self.__name__!r} is a {type(model).__name__} with num_labels={config.num_labels}; a "
                "reward model gives one score: load it with num_labels=1"
            )
        self.tokenizer = _tokenizer_of(config, self.__name__, trust_remote_code) if tokenizer is None else tokenizer
        if self.tokenizer.pad_token_id is None:
            if self.tokenizer.eos_token is None:
                raise ConfigError(
                    f"reward_processing_classes: the tokenizer of {self.__name__!r} has neither pad_token nor "
                    "eos_token; set its pad_token"
                )
            self.tokenizer.pad_token = self.tokenizer.eos_token
        config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        self.device, self.autocast, self.template_kwargs = torch.device(device), autocast, template_kwargs or {}
        here = next(model.parameters()).device
        if here.type != self.device.type or (here.index or 0) != (self.device.index or 0):
            model.to(self.device)
        self.model = model.eval()

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **_: Any) -> list[float]:
        """The score of each completion after its prompt.

        Raises:
            ValueError: prompts of token ids, which are another tokenizer's.
        """
        if isinstance(prompts[0], str):
            texts = [prompt + completion for prompt, completion in zip(prompts, completions)]
        elif not isinstance(prompts[0][0], dict):
            raise ValueError(
                f"prompts[0]={prompts[0]!r} is neither text nor a chat, and a reward model has a tokenizer of its own; "
                "give prompts as text or chats"
            )
        else:
            texts = [
                self.tokenizer.apply_chat_template(prompt + completion, tokenize=False, **self.template_kwargs)
                for prompt, completion in zip(prompts, completions)
            ]
        inputs = self.tokenizer(
            text=texts, return_tensors="pt", padding=True, padding_side="right", add_special_tokens=False
        )
        given = {name: values.to(self.device) for name, values in inputs.items()}
        mixed = torch.autocast(self.device.type, self.autocast) if self.autocast else contextlib.nullcontext()
        with torch.inference_mode(), mixed:
            logits_BL = self.model(**given).logits
        return logits_BL[:, 0].float().tolist()


def with_reward_models(
    reward_funcs: Any, processing_classes: Any = None, *, trust_remote_code: bool = False, **options: Any
) -> list[Callable[..., Any]]:
    """``reward_funcs`` as a list of functions, in which models, and names or folders of models, became `RewardModel`.

    Args:
        reward_funcs: one or several functions, classifiers of one label, or names of such.
        processing_classes: the reward models' tokenizers, one for each entry of ``reward_funcs`` (None for functions).
        options: of `RewardModel`.

    Raises:
        ConfigError: a name that does not load, a model that is no reward model, or tokenizers that fit nothing.
    """
    many = isinstance(reward_funcs, list | tuple)
    given = list(reward_funcs) if many else [] if reward_funcs is None else [reward_funcs]
    tokenizers = processing_classes if isinstance(processing_classes, list | tuple) else [processing_classes]
    if processing_classes is None:
        tokenizers = [None] * len(given)
    if len(tokenizers) != len(given):
        raise ConfigError(
            f"reward_processing_classes has {len(tokenizers)} entries for {len(given)} reward functions: give one for "
            "each, None for those that are no models"
        )
    made = []
    for func, tokenizer in zip(given, tokenizers):
        if isinstance(func, str):
            func = _load(func, trust_remote_code)
        if isinstance(func, nn.Module):
            func = RewardModel(func, tokenizer, trust_remote_code=trust_remote_code, **options)
        elif tokenizer is not None:
            raise ConfigError(
                f"reward_processing_classes has a {type(tokenizer).__name__} for "
                f"{getattr(func, '__name__', type(func).__name__)!r}, which is no model and reads no tokens; give None"
            )
        made.append(func)
    return made


def _load(name: str, trust_remote_code: bool) -> nn.Module:
    """The classifier of that name or folder, in the dtype of its files; its head must be among them."""
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=1, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"reward_funcs: {name!r} does not load as a sequence classifier with num_labels=1 ({reason}); give the "
            "name or folder of a reward model, the model itself, or a function"
        ) from error
    if info["missing_keys"]:
        raise ConfigError(
            f"reward_funcs: {name!r} holds no {sorted(info['missing_keys'])[0]!r}, which would be drawn at random: it "
            "is no reward model; train one (TRL's RewardTrainer), or give another"
        )
    return model


def _tokenizer_of(config: Any, name: str, trust_remote_code: bool) -> Any:
    origin = getattr(config, "_name_or_path", "")
    try:
        return AutoTokenizer.from_pretrained(origin, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"reward_funcs: no tokenizer of {name!r} could be had from {origin!r}; pass "
            "reward_processing_classes=tokenizer"
        ) from error

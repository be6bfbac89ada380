"""Proof of a merge in plain transformers and PEFT: the merged folder against 16-bit original + saved adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..config.errors import ConfigError
from ..weights.shards import read_shards

# Largest relative error of the logits that float32 sums in another order explain.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class MergeCheck:
    """What :func:`verify_merged` found. Errors are the largest difference of logits over the largest logit.

    Attributes:
        prompts: how many were answered.
        same_answers: greedy answers equal, token for token, to those of original + adapter unmerged.
        merge_error: merged folder against the same merge by PEFT, rounded to the same dtype: zero but for float sums.
        rounding: PEFT's merge rounded to that dtype against original + adapter: what 16 bits cost.
        adapter_effect: original + adapter against the original: what a merge without effect would be off by.
        matches: merge_error is at most 1e-3, and a tenth of the adapter's effect, and all answers equal PEFT's merge's.
    """

    prompts: int
    same_answers: int
    merge_error: float
    rounding: float
    adapter_effect: float
    matches: bool

    def describe(self) -> str:
        """One line."""
        verdict = "matches" if self.matches else "DOES NOT MATCH"
        return (
            f"{verdict} 16-bit original + adapter: {self.same_answers} of {self.prompts} greedy answers equal, logits "
            f"off by {self.merge_error:.1e} (rounding {self.rounding:.1e}, adapter's effect {self.adapter_effect:.1e})"
        )


@torch.no_grad()
def verify_merged(
    folder: str | os.PathLike[str],
    base: str,
    adapter: str | os.PathLike[str],
    prompts: Sequence[Any],
    max_new_tokens: int = 64,
    device: torch.device | str = "cpu",
) -> MergeCheck:
    """Reload ``folder`` in plain transformers and compare it, in float32, with ``base`` + ``adapter`` in plain PEFT.

    Args:
        folder: a "merged_16bit" export.
        base: the 16-bit original, folder or hub name.
        adapter: the folder that ``save_lora`` wrote.
        prompts: strings, chats (lists of messages) or lists of token ids.
        max_new_tokens: length of the greedy answers.

    Raises:
        ConfigError: no prompts, or a folder that is no adapter.
    """
    if not prompts:
        raise ConfigError("verify_merged: prompts is empty; give at least one")
    if not (Path(adapter) / "adapter_config.json").is_file():
        raise ConfigError(f"verify_merged: adapter={str(adapter)!r} holds no adapter; give what save_lora wrote")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [_encode(tokenizer, prompt) for prompt in prompts]
    wrapped = PeftModel.from_pretrained(_load(base, device), str(adapter)).eval()
    answers = _greedy(wrapped, tokenizer, rows, max_new_tokens)
    texts = [row + answer for row, answer in zip(rows, answers)]
    expected = _logits(wrapped, texts)
    with wrapped.disable_adapter():
        original = _logits(wrapped, texts)
    _untie(wrapped)
    rounded = _round(wrapped.merge_and_unload(), Path(folder))
    by_peft, peft_answers = _logits(rounded, texts), _greedy(rounded, tokenizer, rows, max_new_tokens)
    del wrapped, rounded
    merged = _load(folder, device)
    got, got_answers = _logits(merged, texts), _greedy(merged, tokenizer, rows, max_new_tokens)
    merge_error, effect = _error(got, by_peft), _error(original, expected)
    return MergeCheck(
        prompts=len(rows),
        same_answers=sum(a == b for a, b in zip(got_answers, answers)),
        merge_error=merge_error,
        rounding=_error(by_peft, expected),
        adapter_effect=effect,
        matches=merge_error <= min(_TOLERANCE, max(effect / 10, 1e-5)) and got_answers == peft_answers,
    )


def _load(folder: str | os.PathLike[str], device: torch.device | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).to(device).eval()


def _untie(wrapped: Any) -> None:
    """Give an adapted head weights of its own: PEFT would merge both adapters of a tied pair into the one tensor."""
    head = wrapped.get_base_model().lm_head
    if hasattr(head, "base_layer"):
        head.base_layer.weight = torch.nn.Parameter(head.base_layer.weight.detach().clone())


def _round(model: Any, folder: Path) -> Any:
    """Round each weight of ``model`` to the dtype that the merged files have for it, and back to float32."""
    dtypes = {entry.name: entry.dtype for shard in read_shards(folder) for entry in shard.entries}
    for name, parameter in model.named_parameters():
        if name in dtypes:
            parameter.data = parameter.data.to(dtypes[name]).float()
    return model


def _encode(tokenizer: Any, prompt: Any) -> list[int]:
    """Token ids of a prompt; a chat's template writes its own BOS, so none is added."""
    if isinstance(prompt, str):
        has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        return list(tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"])
    if isinstance(prompt[0], int):
        return list(prompt)
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _greedy(model: Any, tokenizer: Any, rows: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Greedy answers, ids without padding, in one batch padded on the left."""
    longest = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    out = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad,
        temperature=None, top_p=None, top_k=None,
    )  # fmt: skip
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or ())
    return [_until_end(row, ends) for row in out[:, longest:].tolist()]


def _until_end(ids: list[int], ends: set[int]) -> list[int]:
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1]
    return ids


def _logits(model: Any, texts: list[list[int]]) -> list[torch.Tensor]:
    return [model(torch.tensor([ids], device=model.device)).logits[0].float().cpu() for ids in texts]


def _error(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Largest absolute difference over the largest absolute value of ``b``."""
    difference = max(float((x - y).abs().max()) for x, y in zip(a, b))
    return difference / max(max(float(y.abs().max()) for y in b), 1e-30)

"""The tokenizer, with a pad token that is not an end of sequence where the vocabulary has one to spare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from ..config.errors import ConfigError

# Reserved tokens that no text and no template uses, best first.
PAD_CANDIDATES = (
    "<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|padding|>", "<|PAD|>", "<|vision_pad|>",
    "<|reserved_special_token_0|>", "<|reserved_special_token_1|>", "<|reserved_special_token_2|>", "<unused0>",
)  # fmt: skip


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer, padding on the left as generation and GRPO need it.

    Raises:
        ConfigError: the folder has no tokenizer, or one that cannot be read.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        raise ConfigError(f"folder={str(folder)!r} has no tokenizer (tokenizer.json, tokenizer_config.json)")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, local_files_only=True, padding_side="left"
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"folder={str(folder)!r}: its tokenizer cannot be loaded ({error})") from error
    return tokenizer


def choose_pad(tokenizer: Any, end_ids: list[int], vocab_size: int) -> str | None:
    """Give ``tokenizer`` a pad token, and return the line that says which, or None where it had a good one.

    A pad that is also an end of sequence hides the end from a loss that masks padding, so a reserved token is taken
    instead, as long as the embedding has a row for it.

    Args:
        end_ids: the ids that end a sequence.
        vocab_size: rows of the embedding.
    """
    had = tokenizer.pad_token_id
    ends = {*end_ids, tokenizer.eos_token_id}
    if had is not None and had not in ends and had < vocab_size:
        return None
    vocabulary = tokenizer.get_vocab()
    for name in PAD_CANDIDATES:
        number = vocabulary.get(name)
        if number is not None and number < vocab_size and number not in ends:
            tokenizer.pad_token = name
            return f"Pronghorn: pad token {name!r} (id {number}), which the tokenizer did not set"
    if had is not None and had < vocab_size:
        return f"Pronghorn: pad token {tokenizer.pad_token!r} also ends sequences, and the vocabulary has none to spare"
    if tokenizer.eos_token_id is None:
        raise ConfigError("tokenizer: it has neither a pad nor an end-of-sequence token; set tokenizer.eos_token")
    tokenizer.pad_token = tokenizer.eos_token
    return f"Pronghorn: pad token {tokenizer.eos_token!r}, the end of sequence, as the vocabulary has none to spare"

"""GSM8K (Cobbe et al. 2021, arXiv:2110.14168) as the GRPO flow uses it: loading, the system prompt, the mapping.

In the data an answer follows `####`; in responses it stands in XML tags.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

SYSTEM_PROMPT = """
Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>
"""

XML_COT_FORMAT = """\
<reasoning>
{reasoning}
</reasoning>
<answer>
{answer}
</answer>
"""


def extract_hash_answer(text: str) -> str | None:
    """What follows `####`, stripped; None without `####`. Thousands separators stay as they are ("1,000")."""
    if "####" not in text:
        return None
    return text.split("####")[1].strip()


def load_gsm8k(path_or_hub: str = "openai/gsm8k", split: str = "train") -> Dataset:
    """The split as a `datasets.Dataset` with string columns `question` and `answer`.

    `path_or_hub` is a `.jsonl` file (then `split` is not used), a folder with `<split>.jsonl`, or a hub name (its
    configuration `main`). Raises `ConfigError` for a path that is not there and for rows without the two columns.
    """
    from datasets import load_dataset

    path = Path(path_or_hub).expanduser()
    if path.is_dir() or path.suffix in (".jsonl", ".json"):
        file = path / f"{split}.jsonl" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(
                f"dataset={path_or_hub!r}: no file {file}; give a .jsonl file or a folder with {split}.jsonl"
            )
        data = load_dataset("json", data_files=str(file), split="train")
    elif path_or_hub.startswith(("/", ".", "~")):
        raise ConfigError(
            f"dataset={path_or_hub!r} is not there; give a .jsonl file, a folder with {split}.jsonl or a hub name"
        )
    else:
        data = load_dataset(path_or_hub, "main", split=split)
    missing = [column for column in ("question", "answer") if column not in data.column_names]
    if missing:
        raise ConfigError(
            f"dataset={path_or_hub!r} lacks {', '.join(missing)} (its columns: {', '.join(data.column_names)}); "
            "GSM8K's schema is question, answer"
        )
    return data


def to_prompt(row: dict[str, Any], system_prompt: str = SYSTEM_PROMPT) -> dict[str, Any]:
    """One GSM8K row as a GRPO row: `prompt` (a system and a user message) and `answer` (what follows `####`)."""
    return {
        "prompt": [{"role": "system", "content": system_prompt}, {"role": "user", "content": row["question"]}],
        "answer": extract_hash_answer(row["answer"]),
    }


def as_prompts(data: Dataset, system_prompt: str = SYSTEM_PROMPT) -> Dataset:
    """Any data set in GSM8K's schema mapped by `to_prompt`; the column `question` stays, for tables and metrics."""
    return data.map(to_prompt, fn_kwargs={"system_prompt": system_prompt})


def get_gsm8k_questions(
    split: str = "train", path_or_hub: str = "openai/gsm8k", system_prompt: str = SYSTEM_PROMPT
) -> Dataset:
    """GSM8K ready for GRPO: columns `question`, `prompt` (chat) and `answer`. See `load_gsm8k` for the errors."""
    return as_prompts(load_gsm8k(path_or_hub, split), system_prompt)

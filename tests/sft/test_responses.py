"""``train_on_responses_only`` on trainers: right labels on every data set, packed ones too, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import transformers
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

import pronghorn
from pronghorn.config.errors import ConfigError
from pronghorn.sft.masks import IGNORE
from tests.helpers import tiny_config, tiny_tokenizer

ANSWERS = ["It is 2.", "4", "Six apples"]


def chats(answers: list[str]) -> Dataset:
    rows = [
        [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": answer}]
        for i, answer in enumerate(answers)
    ]
    return Dataset.from_dict({"messages": rows})


def trainer(tmp_path: Path, data: Any = None, eval_dataset: Any = None, **args: Any) -> Any:
    model = transformers.LlamaForCausalLM(tiny_config(num_hidden_layers=1))
    settings: dict[str, Any] = {"max_length": 128, "report_to": [], "use_cpu": True, "bf16": False, **args}
    return SFTTrainer(
        model=model, processing_class=tiny_tokenizer(extra=("<|finetune_right_pad_id|>",)),
        train_dataset=chats(ANSWERS) if data is None else data, eval_dataset=eval_dataset,
        args=SFTConfig(output_dir=str(tmp_path), **settings),
    )  # fmt: skip


def learned(made: Any, labels: list[int]) -> str:
    return str(made.processing_class.decode([label for label in labels if label != IGNORE]))


def test_every_data_set_of_the_trainer_learns_the_answers_alone(tmp_path: Path) -> None:
    made = trainer(tmp_path, eval_dataset={"a": chats(ANSWERS[:1]), "b": chats(ANSWERS[1:])})
    assert pronghorn.train_on_responses_only(made) is made
    assert [learned(made, row) for row in made.train_dataset["labels"]] == [f"{a}<|eot_id|>" for a in ANSWERS]
    assert learned(made, made.eval_dataset["a"]["labels"][0]) == "It is 2.<|eot_id|>"
    assert learned(made, made.eval_dataset["b"]["labels"][1]) == "Six apples<|eot_id|>"
    batch = next(iter(made.get_train_dataloader()))
    assert int((batch["labels"] != IGNORE).sum()) == sum(
        label != IGNORE for row in made.train_dataset["labels"] for label in row
    )
    made.args.max_steps = 1
    assert made.train().training_loss > 0


def test_packed_rows_are_masked_example_by_example(tmp_path: Path) -> None:
    made = trainer(tmp_path, packing=True, packing_strategy="bfd")
    (row,) = made.train_dataset
    assert len(row["seq_lengths"]) == 3
    pronghorn.train_on_responses_only(made)
    ids, labels, at, found = row["input_ids"], made.train_dataset[0]["labels"], 0, []
    for length in row["seq_lengths"]:
        found.append(learned(made, labels[at : at + length]))
        assert labels[at] == IGNORE and all(a in (IGNORE, b) for a, b in zip(labels, ids))
        at += length
    assert sorted(found) == sorted(f"{a}<|eot_id|>" for a in ANSWERS)


def test_the_same_from_the_name_that_scripts_use_and_with_parts_given(tmp_path: Path) -> None:
    from pronghorn.chat_templates import train_on_responses_only

    made = train_on_responses_only(
        trainer(tmp_path),
        instruction_part="<|start_header_id|>user<|end_header_id|>\n\n",
        response_part="<|start_header_id|>assistant<|end_header_id|>\n\n",
    )
    assert learned(made, made.train_dataset["labels"][1]) == "4<|eot_id|>"


def test_a_mask_that_hides_everything_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wrong = {"instruction_part": "### User:", "response_part": "### Assistant:"}
    with pytest.raises(ConfigError, match=r"trainer.train_dataset: row 0: .*### Assistant:.*hidden='drop'"):
        pronghorn.train_on_responses_only(trainer(tmp_path), **wrong)
    with pytest.raises(ConfigError, match="hides every token of every row"):
        pronghorn.train_on_responses_only(trainer(tmp_path), **wrong, hidden="drop")
    long = [{"role": "user", "content": "apples " * 200}, {"role": "assistant", "content": "4"}]
    data = Dataset.from_dict({"messages": [long, *chats(ANSWERS)["messages"]]})
    with pytest.raises(ConfigError, match=r"row 0: .*max_length"):
        pronghorn.train_on_responses_only(trainer(tmp_path, data))
    with caplog.at_level(logging.WARNING, logger="pronghorn"):
        made = pronghorn.train_on_responses_only(trainer(tmp_path, data), hidden="drop")
    assert len(made.train_dataset) == 3 and "1 of 4 rows" in caplog.text
    with pytest.raises(ConfigError, match="hidden='skip'"):
        pronghorn.train_on_responses_only(trainer(tmp_path), hidden="skip")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"eval_dataset\['b'\]: row 0"):
        pronghorn.train_on_responses_only(trainer(tmp_path, eval_dataset={"a": chats(ANSWERS), "b": data}))


@pytest.mark.parametrize("strategy", ["wrapped", "bfd_split"])
def test_packing_that_cuts_examples_is_refused(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(ConfigError, match="packing_strategy='bfd'"):
        pronghorn.train_on_responses_only(trainer(tmp_path, packing=True, packing_strategy=strategy, max_length=16))


def test_streams_and_labels_that_were_there_already(tmp_path: Path) -> None:
    made = pronghorn.train_on_responses_only(trainer(tmp_path, chats(ANSWERS).to_iterable_dataset(), max_steps=1))
    assert [learned(made, row["labels"]) for row in made.train_dataset] == [f"{a}<|eot_id|>" for a in ANSWERS]
    with pytest.raises(ConfigError, match="row 0"):
        pronghorn.train_on_responses_only(
            trainer(tmp_path, chats(ANSWERS).to_iterable_dataset(), max_steps=1), "### User:", "### Assistant:"
        )
    half = trainer(tmp_path)

    def hide(row: dict[str, Any]) -> dict[str, Any]:
        return {"labels": [*row["input_ids"][:-1], IGNORE]}

    half.train_dataset = half.train_dataset.map(hide)
    pronghorn.train_on_responses_only(half)
    assert [learned(half, row) for row in half.train_dataset["labels"]] == ANSWERS


def test_a_collator_that_makes_labels_anew_and_raw_text_are_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.data_collator = transformers.DataCollatorForLanguageModeling(made.processing_class, mlm=False)
    made.data_collator.tokenizer.pad_token = "<|finetune_right_pad_id|>"
    made.train_dataset = made.train_dataset.remove_columns("labels")
    with pytest.raises(ConfigError, match="DataCollatorForSeq2Seq"):
        pronghorn.train_on_responses_only(made)
    made.data_collator = lambda rows: {"labels": [[1, 2, 3]]}
    with pytest.raises(ConfigError, match="gives 3 labels"):
        pronghorn.train_on_responses_only(made)
    made.train_dataset = chats(ANSWERS)
    with pytest.raises(ConfigError, match="not tokenized"):
        pronghorn.train_on_responses_only(made)

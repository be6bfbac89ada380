"""Several turns with tools: token-exact histories, masks, TRL's loop as the oracle, and what may go wrong in a call."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from peft import get_peft_model
from trl.trainer.grpo_config import GRPOConfig as TRLConfig
from trl.trainer.grpo_trainer import GRPOTrainer as TRLTrainer

from pronghorn.config.errors import ConfigError
from pronghorn.grpo.trainer import GRPOTrainer
from tests.grpo.support import adapter_weights, config, llama, lora, prompts
from tests.grpo.tool_support import CALL, ScriptedEngine, add, questions, tool_model, tool_tokenizer

END = "<|im_end|>"


def script(text: str, i: int) -> str:
    """Sample 0 calls and answers, 1 answers at once, 2 calls twice, 3 calls what is not there."""
    turns = text.count("</tool_response>")
    if i == 1 and not turns:
        return f"no{END}"
    if "Tool sub not found" in text:
        return f"so{END}"
    if turns:
        return f"{CALL}{END}" if turns == 1 and "twice" in text else f"seven{END}"
    return {0: f"{CALL}{END}", 2: f"twice\n{CALL}{END}", 3: CALL.replace("add", "sub") + END}[i]


def length(completions: list[Any], **kwargs: Any) -> list[float]:
    return [float(len(messages)) for messages in completions]


def made_with(
    folder: Path, script: Any = script, tools: Any = (add,), data: Any = None, model: Any = None, **overrides: Any
) -> Any:
    model = tool_model() if model is None else model
    settings = {"max_completion_length": 300, "max_steps": 1, **overrides}
    made = GRPOTrainer(
        model, length, config(folder, **settings), questions() if data is None else data,
        processing_class=tool_tokenizer(), tools=list(tools),
    )  # fmt: skip
    made.sampling._engine = ScriptedEngine(model, made.processing_class, script)
    return made


def drawn(made: Any) -> Any:
    return made.sampling.draw([dict(made.train_dataset[0])] * 4, 4, seed=1)


def test_histories_are_what_the_template_writes_and_masks_what_it_wrote(tmp_path: Path) -> None:
    made = made_with(tmp_path)
    generation = drawn(made)
    tokenizer, schemas = made.processing_class, made.sampling.drawer.tools.schemas
    for messages, r in zip(generation.completions, generation.rollouts):
        whole = [*made.train_dataset[0]["prompt"], *messages]
        rendered = tokenizer.apply_chat_template(whole, tools=schemas, tokenize=False)
        assert tokenizer.decode(r.prompt_ids + r.completion_ids) == rendered.rstrip("\n")
        mask = r.tool_mask or [1] * len(r.completion_ids)
        said = tokenizer.decode([t for t, m in zip(r.completion_ids, mask) if m])
        read = tokenizer.decode([t for t, m in zip(r.completion_ids, mask) if not m])
        answers = [m["content"] for m in messages if m["role"] == "tool"]
        assert read.count("<tool_response>") == len(answers) and all(a in read for a in answers)
        assert said.count("</tool_call>") == len(answers) and "response" not in said
        assert len(r.sampler_logps) == sum(mask) and not r.truncated
    roles = [[m["role"][0] for m in messages] for messages in generation.completions]
    assert ["".join(r) for r in roles] == ["ata", "a", "atata", "ata"]
    assert [m["content"] for m in generation.completions[2] if m["role"] == "tool"] == ["7", "7"]
    logged = {name: value for name, value, _ in generation.logged}
    assert logged["tools/call_frequency"] == 1.0 and logged["tools/failure_frequency"] == 0.25


def test_later_turns_go_on_from_the_sampled_ids(tmp_path: Path) -> None:
    """The engine is asked with prompt + what it sampled + the answer, each request under a seed of its own."""
    made = made_with(tmp_path)
    generation = drawn(made)
    engine = made.sampling.engine
    assert engine.calls == [1, 3, 1]
    assert len({seed for seed, _ in engine.seeds}) == 5 and [n for _, n in engine.seeds] == [4, 1, 1, 1, 1]
    for r, asked in zip((generation.rollouts[i] for i in (0, 2, 3)), engine.prompts[1:4]):
        assert asked == (r.prompt_ids + r.completion_ids)[: len(asked)] and asked[: len(r.prompt_ids)] == r.prompt_ids
        assert r.tool_mask[len(asked) - len(r.prompt_ids)] == 1 and r.tool_mask[len(asked) - len(r.prompt_ids) - 1] == 0


def trl_loop(folder: Path, tools: Any, script: Any, **settings: Any) -> Any:
    """TRL's trainer, whose turns are the script's."""
    tokenizer = tool_tokenizer()
    args = TRLConfig(
        str(folder), per_device_train_batch_size=4, num_generations=4, report_to="none", bf16=False,
        gradient_checkpointing=False, **settings,
    )  # fmt: skip
    model = get_peft_model(llama(max_position_embeddings=1024), lora())
    made = TRLTrainer(model, length, args, questions(), processing_class=tokenizer, tools=list(tools))

    def turn(self: Any, prompt_ids: Any, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        texts = [tokenizer.decode(ids) for ids in prompt_ids]
        said = [script(text, i) for i, text in enumerate(texts)]
        return [tokenizer(s, add_special_tokens=False)["input_ids"][: self.max_completion_length] for s in said], None

    made._generate_single_turn = MethodType(turn, made)
    made.model.train()
    return made


async def slowly(a: int, b: int) -> int:
    """Adds two numbers, slowly.

    Args:
        a: The first.
        b: The second.
    """
    await asyncio.sleep(0)
    return a + b


def broken(a: int, b: int) -> int:
    """Does not work.

    Args:
        a: The first.
        b: The second.
    """
    raise ZeroDivisionError(f"{a} by {b}")


@pytest.mark.parametrize(
    "name, settings",
    [
        ("add", {}),
        ("add", {"max_tool_calling_iterations": 1}),
        ("add", {"max_completion_length": 180}),  # the first answer fits, another does not
        ("add", {"max_completion_length": 90}),  # no answer fits
        ("slowly", {}),
        ("broken", {}),
    ],
    ids=str,
)
def test_the_loop_is_trls(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    """Ids, masks, messages and the tool metrics of the same turns."""
    tool = {"add": add, "slowly": slowly, "broken": broken}[name]
    settings = {"max_completion_length": 300, **settings}

    def says(text: str, i: int) -> str:
        return script(text, i).replace('"add"', f'"{name}"')

    trl = trl_loop(tmp_path / "trl", [tool], says, **settings)
    batch = [dict(trl.train_dataset[0]) for _ in range(4)]
    theirs = trl._generate_and_score_completions([dict(row) for row in batch])
    made = made_with(tmp_path / "ours", says, [tool], **settings)
    rollouts = made._generate(batch, 4, "train", 0)
    widths = [int(n) for n in theirs["completion_mask"].sum(1)]
    assert any(r.tool_mask for r in rollouts) == (settings["max_completion_length"] != 90)
    for i, r in enumerate(rollouts):
        assert r.prompt_ids == [t for t, m in zip(theirs["prompt_ids"][i], theirs["prompt_mask"][i]) if m]
        assert r.completion_ids == theirs["completion_ids"][i][: widths[i]].tolist()
        assert (r.tool_mask or [1] * widths[i]) == theirs["tool_mask"][i][: widths[i]].tolist()
        assert r.advantage == pytest.approx(theirs["advantages"][i].item(), abs=1e-6)  # of len(messages)
    log = made.metrics["train"].flush()
    for metric, values in trl._metrics["train"].items():
        if metric.startswith(("tools/", "completions/", "reward", "num_tokens")):
            assert log[metric] == pytest.approx(values[-1], abs=1e-6), metric


def test_what_is_scored_is_what_was_sampled(tmp_path: Path) -> None:
    """The trainer's log-probabilities are the engine's, token by token, though the engine saw one turn at a time."""
    made = made_with(tmp_path, max_steps=2)
    before = adapter_weights(made.model)
    made.train()
    log = made.state.log_history[0]
    assert log["sampling/sampling_logp_difference/max"] < 1e-5
    assert log["completions/mean_length"] < sum(len(r.completion_ids) for r in made.position.buffer) / 4
    assert {"tools/call_frequency", "tools/failure_frequency"} <= set(log)
    assert any(not torch.equal(w, before[n]) for n, w in adapter_weights(made.model).items())


def test_an_unfinished_call_closes_the_turn_by_the_template(tmp_path: Path) -> None:
    """A turn that a stop string ended has no end-of-turn id: the template's is written, and not trained on."""

    def cut(text: str, i: int) -> str:
        return f"7{END}" if "</tool_response>" in text else CALL

    made = made_with(tmp_path, cut)
    generation = drawn(made)
    r, end = generation.rollouts[0], made.processing_class.eos_token_id
    said = len(made.processing_class(CALL, add_special_tokens=False)["input_ids"])
    assert r.completion_ids[said] == end and r.tool_mask[said] == 0 and r.tool_mask[said - 1] == 1
    assert r.completion_ids[-1] == end and r.tool_mask[-1] == 1 and not r.truncated


def test_what_cannot_work_fails_at_construction(tmp_path: Path) -> None:
    def bare(a, b):  # type: ignore[no-untyped-def]
        return a

    with pytest.raises(ConfigError, match="tools: 'bare' has no schema .*give it type hints"):
        made_with(tmp_path, tools=[bare])
    with pytest.raises(ConfigError, match="two functions named 'add'"):
        made_with(tmp_path, tools=[add, add])
    model = tool_model()
    with pytest.raises(ConfigError, match="max_tool_calling_iterations=2 has no effect without tools; pass tools="):
        GRPOTrainer(
            tool_model(), length, config(tmp_path, max_tool_calling_iterations=2), questions(),
            processing_class=tool_tokenizer(),
        )  # fmt: skip
    with pytest.raises(ConfigError, match="tools and rollout_func are both given"):
        GRPOTrainer(
            model, length, config(tmp_path), questions(), processing_class=tool_tokenizer(), tools=[add],
            rollout_func=lambda prompts, trainer: {},
        )  # fmt: skip
    with pytest.raises(ConfigError, match="tools need chats"):
        drawn(made_with(tmp_path, data=prompts()))


@pytest.mark.parametrize(
    "template, message",
    [
        ("qwen3_chat_template", "rewrites earlier turns once a .*get_training_chat_template"),
        ("llama3_chat_template", "cannot render a tool call"),
        ("qwen3_training_chat_template", "no parser of tool calls is known"),
    ],
)
def test_templates_that_are_not_fit_are_refused(tmp_path: Path, template: str, message: str) -> None:
    import trl.chat_template_utils as templates

    tokenizer = tool_tokenizer()
    tokenizer.chat_template = getattr(templates, template)
    args = config(tmp_path, max_completion_length=150)
    with pytest.raises(ConfigError, match=message):
        GRPOTrainer(tool_model(), length, args, questions(), processing_class=tokenizer, tools=[add])


def test_the_remedy_for_a_rewriting_template_works(tmp_path: Path) -> None:
    from trl.chat_template_utils import add_response_schema, get_training_chat_template, qwen3_chat_template

    tokenizer = tool_tokenizer()
    tokenizer.chat_template = qwen3_chat_template
    add_response_schema(tokenizer)
    tokenizer.chat_template = get_training_chat_template(tokenizer)
    args = config(tmp_path, max_completion_length=150)
    made = GRPOTrainer(tool_model(), length, args, questions(), processing_class=tokenizer, tools=[add])
    made.sampling._engine = ScriptedEngine(made.model, tokenizer, script)
    assert drawn(made).rollouts[0].tool_mask.count(0) > 0

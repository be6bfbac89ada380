"""Several turns with tools: the policy calls, the tool answers, the policy goes on, all of it one completion."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..config.errors import ConfigError
from ..data.chat import is_chat
from ..rollout.base import eos_ids
from .drawing import Seeds
from .generation import Generation
from .history import History
from .tool_calls import Message, Tools
from .tool_template import ToolTemplate

if TYPE_CHECKING:
    from .sampling_loop import SamplingLoop


class ToolLoop:
    """Draws completions of chats by TRL's contract for ``tools`` (1.15 and 1.16).

    A turn without tool calls ends the completion, as do ``max_tool_calling_iterations`` rounds of calls, and an answer
    that does not fit ``max_completion_length`` (which counts answers too) or the model's length: the answer is then
    left out. Ids are only appended: nothing is rendered or tokenized twice.

    Args:
        loop: the engine, encoder and settings.
        tools: the functions.
        max_length: most tokens of prompt and completion together.
    """

    def __init__(self, loop: SamplingLoop, tools: Tools, max_length: int) -> None:
        self.loop, self.tools, self.max_length = loop, tools, max_length
        kwargs = {name: value for name, value in loop.encoder.template_kwargs.items() if name != "tools"}
        self.template = ToolTemplate(loop.tokenizer, kwargs)
        self.ends = eos_ids(loop.model, loop.tokenizer)
        self.limit: int = loop.params.fields["max_tokens"] or loop.args.max_completion_length

    def __call__(self, rows: list[dict[str, Any]], group: int, seeds: Seeds, first: int) -> Generation:
        if not is_chat(rows[0]["prompt"]):
            raise ConfigError(
                "tools need chats: give train_dataset's 'prompt' as a list of messages with role and content"
            )
        prompt_ids, truncated = self.loop.encoder([row["prompt"] for row in rows[::group]])
        histories = [History(prompt_ids[i // group]) for i in range(len(rows))]
        params = [self.loop.params(group, seeds(first + p)) for p in range(len(prompt_ids))]
        outputs = self.loop.generate(prompt_ids, params)
        messages: list[list[Message]] = [[] for _ in rows]
        calling = self._listen(dict(zip(range(len(rows)), outputs)), histories, messages)
        calls = failures = turn = 0
        most = self.loop.args.max_tool_calling_iterations
        while calling and (most is None or turn < most):
            turn += 1
            answering = []
            for i in calling:
                answers, failed = self.tools.answer(messages[i][-1]["tool_calls"])
                calls, failures = calls + len(answers), failures + failed
                if self._append(histories[i], answers):
                    messages[i] += answers
                    answering.append(i)
            own = {i: seeds(first + i // group, i % group, turn) for i in answering}
            calling = self._go_on(own, histories, messages)
        made = Generation(rows, [history.rollout() for history in histories], messages, group)
        made.note("prompts/truncated_ratio", truncated / len(prompt_ids), len(prompt_ids))
        made.note("tools/call_frequency", calls / len(rows), len(rows))
        made.note("tools/failure_frequency", failures / calls if calls else 0.0)
        return made

    def _listen(self, outputs: dict[int, Any], histories: list[History], messages: list[list[Message]]) -> list[int]:
        """Append each output to its history and messages; those that call tools."""
        calling = []
        for i, output in outputs.items():
            before = histories[i].ids
            histories[i].sampled(output.token_ids, output.policy_logprobs, output.finish_reason == "length")
            message = self.template.parse(output.token_ids, before, self.tools.schemas)
            messages[i].append(message)
            if message.get("tool_calls"):
                calling.append(i)
        return calling

    def _append(self, history: History, answers: list[Message]) -> bool:
        """Put the answers behind the turn that asked for them, if they fit."""
        suffix = self.template.suffix_ids(answers)
        if history.completion_ids[-1] not in self.ends:  # ended by a stop string: the template closes the turn
            suffix = [self.loop.tokenizer.eos_token_id, *suffix]
        fits = len(history.completion_ids) + len(suffix) <= self.limit
        if not fits or len(history.ids) + len(suffix) >= self.max_length:
            return False
        history.wrote(suffix)
        return True

    def _go_on(self, own: dict[int, int], histories: list[History], messages: list[list[Message]]) -> list[int]:
        """One more turn of each history in ``own``, under the seed there; those that call tools again."""
        rooms = {i: self.limit - len(histories[i].completion_ids) for i in own}
        for i in own:
            histories[i].truncated = rooms[i] == 0  # an answer that fills the completion to the last token
        going = [i for i in own if rooms[i] > 0]
        if not going:
            return []
        params = [self.loop.params(1, own[i], rooms[i]) for i in going]
        outputs = self.loop.generate([histories[i].ids for i in going], params)
        return self._listen(dict(zip(going, outputs)), histories, messages)

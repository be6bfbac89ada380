"""When a sequence ends: end-of-sequence ids, stop ids, stop strings across tokens, length. No torch here."""

from __future__ import annotations

from typing import Any

from ...config.sampling import SamplingParams
from .request import Sequence

_CONTEXT = 6  # prompt tokens decoded before the first new one, so that a tokenizer's leading space is not lost
_UNFINISHED = "\ufffd"  # how decoding shows the first bytes of a character whose last bytes are still to come


def stop_ids(params: SamplingParams, eos: frozenset[int]) -> frozenset[int]:
    """Ids that end a request with these settings."""
    return frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)


class StopStrings:
    """Looks for stop strings in the text of one sequence as it grows.

    Text is decoded from a window of the newest ids: a token's text can depend on the one before it, and a character can
    take several tokens.
    """

    def __init__(self, tokenizer: Any, sequence: Sequence) -> None:
        self.tokenizer = tokenizer
        self.params = sequence.params
        self.ids = sequence.prompt.tokens[-_CONTEXT:]
        self.window, self.read = 0, len(self.ids)
        self.text = ""

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=self.params.skip_special_tokens)
        return text

    def push(self, token: int, may_stop: bool) -> str | None:
        """Add a token; returns the stop string whose match begins first, or None; ``text`` then ends there."""
        self.ids.append(token)
        before = self._decode(self.ids[self.window : self.read])
        after = self._decode(self.ids[self.window :])
        if len(after) <= len(before) or after.endswith(_UNFINISHED):
            return None
        known = len(self.text)
        self.text += after[len(before) :]
        self.window, self.read = self.read, len(self.ids)
        if not may_stop:
            return None
        hits = [(self.text.find(s, max(known - len(s) + 1, 0)), s) for s in self.params.stop]
        hits = [(at, s) for at, s in hits if at >= 0]
        if not hits:
            return None
        at, stop = min(hits, key=lambda hit: hit[0])
        self.text = self.text[: at + len(stop)] if self.params.include_stop_str_in_output else self.text[:at]
        return stop


class Stopper:
    """Decides after each token of a run whether its sequence has ended, and what its text is."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._strings: dict[int, StopStrings] = {}

    def check(self, sequence: Sequence) -> bool:
        """Whether ``sequence`` ends with its newest token; sets its ``finish_reason`` and ``stop_reason``."""
        token, count, params = sequence.output[-1], len(sequence.output), sequence.params
        may_stop = count >= params.min_tokens
        if may_stop and token in sequence.stop_ids:
            sequence.finish_reason = "stop"
            sequence.stop_reason = token if token in params.stop_token_ids else None
            return True
        if params.stop:
            strings = self._strings.get(sequence.order)
            if strings is None:
                strings = self._strings[sequence.order] = StopStrings(self.tokenizer, sequence)
            hit = strings.push(token, may_stop)
            if hit is not None:
                sequence.finish_reason, sequence.stop_reason, sequence.stopped_text = "stop", hit, strings.text
                return True
        if count >= sequence.max_new:
            sequence.finish_reason = "length"
            return True
        return False

    def text(self, sequence: Sequence) -> str:
        """The completion's text: up to the stop string, without the ending id unless the request keeps stops."""
        params = sequence.params
        if not params.detokenize:
            return ""
        if sequence.stopped_text is not None:
            return sequence.stopped_text
        ids = sequence.output
        if sequence.finish_reason == "stop" and not params.include_stop_str_in_output:
            ids = ids[:-1]
        text: str = self.tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
        return text

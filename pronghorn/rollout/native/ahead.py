"""The loop on a GPU: prefills and several decode steps for every look of the host."""

from __future__ import annotations

from ...kernels.head import head_logits
from .decoder import Decoder, Drawn
from .ending import Ending
from .request import Sequence
from .runner import Runner
from .scheduler import Scheduler, Step

STEPS, FEW_STEPS = 32, 8
"""Steps between two looks, at most, of few rows and of many: a row that ends meanwhile idles until the next."""

_FEW = 32  # rows up to which idling is cheap: a step reads all weights whatever their number


def run_ahead(scheduler: Scheduler, runner: Runner, ending: Ending, decoder: Decoder) -> None:
    """Run until every sequence has ended. On the way out, however that comes, no sequence holds a slot.

    Prefills are launched one behind the other and the first burst of decode steps behind them: while the GPU computes
    one chunk, the host packs the next. It looks after a burst, and where the scheduler has to know who has ended.
    """
    try:
        while (step := scheduler.next_step(_steps(scheduler))) is not None:
            runner.cache.copy(step.copies)
            if step.prefill:
                _prefill(step, scheduler, runner, decoder)
                ending.report(0)  # the next look may be seconds away; whoever listens can stop it here
                continue
            if step.decode:
                decoder.forget_all_but(step.decode)
                decoder.admit(decoder.without_slot(step.decode))  # all but whose newest token a prefill computed anew
                decoder.run(step.decode, step.ahead)
            _look(scheduler, decoder, ending)
    finally:
        decoder.clear()


def _prefill(step: Step, scheduler: Scheduler, runner: Runner, decoder: Decoder) -> None:
    """Launch the chunks, and the draws of those that end a prompt."""
    hidden_LD, copies, sequences = runner.prefill(step, decoder.prefill_walk)
    if sequences:
        decoder.forget_all_but(scheduler.running)
        decoder.admit(sequences)
        x_LV = head_logits(hidden_LD, decoder.head.weight_VD, None)
        decoder.draw(x_LV.index_select(0, runner.ids(copies)), sequences)


def _look(scheduler: Scheduler, decoder: Decoder, ending: Ending) -> None:
    """Take in all that was drawn since the last look; who has ended leaves."""
    sequences = [s for s in scheduler.running if s.unseen]
    drawn = decoder.look(sequences)
    decoder.release([s for s, new in zip(sequences, drawn) if _record(s, new, ending)])
    ending.report(sum(len(new.tokens) for new in drawn))


def _steps(scheduler: Scheduler) -> int:
    return STEPS if len(scheduler.running) <= _FEW else FEW_STEPS


def _record(sequence: Sequence, drawn: Drawn, ending: Ending) -> bool:
    """Append what a row drew, up to its end; whether it has ended. The host knows stop strings, the GPU does not."""
    each = len(drawn.tokens) if sequence.params.stop else 0  # tokens to look at one by one
    for token, own, policy in zip(drawn.tokens[:each], drawn.token_logps, drawn.policy_logps):
        sequence.output.append(token)
        sequence.token_logprobs.append(own)
        sequence.policy_logprobs.append(policy)
        if ending.check(sequence):
            return True
    sequence.output += drawn.tokens[each:]
    sequence.token_logprobs += drawn.token_logps[each:]
    sequence.policy_logprobs += drawn.policy_logps[each:]
    if drawn.ended:
        if not ending.check(sequence):
            raise RuntimeError(f"request {sequence.request} ended on the device and not on the host: a fault")
        return True
    sequence.computed = len(sequence) - 1  # all but the newest token are in the cache
    return False

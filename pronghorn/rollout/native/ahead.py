"""The loop on a GPU: prefills and several decode steps for every look of the host, and the next ones before it."""

from __future__ import annotations

from ...kernels.head import head_logits
from .decoder import Decoder
from .ending import Ending
from .look import Drawn, Look
from .request import Sequence
from .runner import Runner
from .scheduler import Scheduler, Step

STEPS, FEW_STEPS = 8, 4
"""Steps between two looks, at most, of few rows and of many. A row that ends idles for the rest of its burst and for
the next one, which is launched by then; so these are as few as keep a burst several times longer than what the host
does for it.
"""

_FEW = 32  # rows up to which idling is cheap: a step reads all weights whatever their number


def run_ahead(scheduler: Scheduler, runner: Runner, ending: Ending, decoder: Decoder) -> None:
    """Run until every sequence has ended. On the way out, however that comes, no sequence holds a slot.

    Prefills are launched one behind the other and the first burst of decode steps behind them: while the GPU computes
    one chunk, the host packs the next. From then on the host launches the next burst, or prefill, before it takes the
    look at the burst before: while it waits for that look, records it and plans, the GPU has work. So two bursts are in
    flight at most. Where the scheduler has to know who has ended, the look comes first and the GPU waits.

    Whoever a look shows to have ended gives slot and blocks back while the next burst is in flight. In it the row idles
    or, ended by a stop string, which the GPU does not know, draws on and writes to blocks that were its own when the
    burst was planned. Whoever gets them next is queued behind that burst, on the same stream: block copies, prefills,
    slots and tables, so it neither reads nor loses anything by it. Tokens of that burst are never looked at.
    """
    begun: Look | None = None
    try:
        while (step := scheduler.next_step(_steps(scheduler))) is not None:
            runner.cache.copy(step.copies)
            if step.prefill:
                _prefill(step, scheduler, runner, decoder)
            elif step.decode:
                decoder.forget_all_but(scheduler.running)
                decoder.admit(decoder.without_slot(step.decode))  # all but whose newest token a prefill computed anew
                decoder.run(step.decode, step.ahead)
            elif begun is None:
                begun = _begin(scheduler, decoder)
            if begun is not None:
                _take(begun, decoder, ending)
            elif step.prefill:
                ending.report(0)  # the next look may be seconds away; whoever listens can stop it here
            begun = _begin(scheduler, decoder) if step.decode else None
    finally:
        decoder.clear()


def _prefill(step: Step, scheduler: Scheduler, runner: Runner, decoder: Decoder) -> None:
    """Launch the chunks, and the draws of those that end a prompt."""
    hidden_LD, copies, sequences = runner.prefill(step, decoder)
    if sequences:
        decoder.forget_all_but(scheduler.running)
        decoder.admit(sequences)
        x_LV = head_logits(hidden_LD, decoder.head.weight_VD, None)
        decoder.draw(x_LV.index_select(0, runner.ids(copies)), sequences)


def _begin(scheduler: Scheduler, decoder: Decoder) -> Look | None:
    """Begin to look at all that was drawn since the last look, which has been taken."""
    sequences = [s for s in scheduler.running if s.unseen]
    return decoder.begin_look(sequences) if sequences else None


def _take(look: Look, decoder: Decoder, ending: Ending) -> None:
    """Take in what a look shows; who has ended leaves."""
    ending.meanwhile(look.sequences)
    drawn = look.take()
    decoder.release([s for s, new in zip(look.sequences, drawn) if _record(s, new, ending)])
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
    return False

"""The native engine: queue, blocks, model step, sampler and stopping, composed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch

from ...config.adapters import LIVE, AdapterChoice, Live
from ...config.errors import ConfigError
from ...config.sampling import SamplingParams
from ...models.modes import inference
from ...models.packed_layer import prepared, prepared_layers
from ...models.parts import release_held
from ...models.state import state_of
from ...models.tree import layers, unwrap
from ..base import KeptPolicy, Progress, RequestOutput, eos_ids
from ..warmup import compile_ahead
from .ahead import run_ahead
from .blocks import BlockManager
from .decode_walk import few_rows, why_no_walk
from .decoder import MOST_ROWS, Decoder, held_bytes_of, sizes_of
from .dry_run import WALKS
from .ending import Ending
from .exact import check_exact
from .held import Buffers
from .kv_cache import KVCache, KVShape, capacity, memory_budget, total_memory
from .outputs import request_outputs
from .overlap import Drawing, SideStream
from .plan import blocks_needed, make_sequences
from .request import Sequence
from .runner import LivePolicy, Runner
from .scheduler import Scheduler
from .snapshot import Snapshot
from .stepwise import run_stepwise

_ROUNDED_UP = 1 << 28  # bytes that the memory of a cache's tensors may be larger than they are, and more


class NativeEngine:
    """Generates with the model's own modules and weights; nothing is copied, so an optimizer step shows at once.

    What is made :meth:`ready` is drawn under a snapshot of the adapters instead, and from then on so is every live
    generation, the snapshot taken anew: graphs hold its memory and serve both. One generation runs at a time, whatever
    thread asks.

    Args:
        model: a Pronghorn model, with or without PEFT around it. ``engine.model`` may be set anew when PEFT wraps it.
        tokenizer: decodes completions.
        max_seq_length: longest prompt + completion in tokens; default what the model was loaded with.
        gpu_memory_utilization: most of the device's memory that may be in use with the KV cache; default as loaded.
        max_num_seqs: most sequences that run at once.
        max_prefill_tokens: most prompt tokens in one step.
        block_size: tokens of one KV block.
        num_kv_blocks: exactly so many blocks, whatever a run needs; None sizes the cache by the run.
        ahead: decode several steps for every look of the host; None does so on a GPU in 16 bits, True also elsewhere
            (slower on a CPU, for tests).
        oom_retry: run a rollout that runs out of memory again with half as many rows at once, and say so.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        max_seq_length: int | None = None,
        gpu_memory_utilization: float | None = None,
        max_num_seqs: int = 256,
        max_prefill_tokens: int = 4096,
        block_size: int = 16,
        num_kv_blocks: int | None = None,
        ahead: bool | None = None,
        oom_retry: bool = False,
    ) -> None:
        for name, value in {
            "max_num_seqs": max_num_seqs, "max_prefill_tokens": max_prefill_tokens, "block_size": block_size
        }.items():  # fmt: skip
            if value < 1:
                raise ConfigError(f"rollout engine: {name}={value} is out of range; give 1 or more")
        if max_num_seqs > MOST_ROWS:
            raise ConfigError(f"rollout engine: max_num_seqs={max_num_seqs} is out of range; give {MOST_ROWS} or less")
        self.model = model
        self.tokenizer = tokenizer
        self.max_seq_length = max_seq_length or state_of(model).max_seq_length
        self.utilization = (
            state_of(model).gpu_memory_utilization if gpu_memory_utilization is None else gpu_memory_utilization
        )
        self.max_num_seqs = max_num_seqs
        self.max_prefill_tokens = max_prefill_tokens
        self.block_size = block_size
        self.num_kv_blocks = num_kv_blocks
        self.ahead = ahead
        self.oom_retry = oom_retry
        self.cache: KVCache | None = None
        self.scheduler: Scheduler | None = None
        self._blocks_asked = 0
        self._buffers = Buffers()
        self._decoder: Decoder | None = None
        self._said: set[str] = set()
        self._requests = itertools.count()
        self._turn = threading.RLock()  # held by whoever generates, or gives memory back
        self._turns = 0
        self._snapshot: Snapshot | None = None
        self._keep_share = 1.0
        self._stream: torch.cuda.Stream | None = None

    def generate(
        self,
        prompts: Seq[Seq[int]],
        params: SamplingParams | Seq[SamplingParams],
        adapter: AdapterChoice = LIVE,
        progress: Progress | None = None,
    ) -> list[RequestOutput]:
        """See :class:`pronghorn.rollout.base.Engine`. An exception or interrupt leaves the engine as before the call.

        Raises:
            ConfigError: an empty or too long prompt, an id outside the vocabulary, a request too large for the cache.
            torch.OutOfMemoryError: with the remedy, when the cache, the graphs or a step do not fit the device.
            FloatingPointError: the model gave logits that are not numbers.
        """
        sequences = self._sequences(prompts, params)
        if sequences:
            with self._turn, self._on_device(), ExitStack() as policy:
                self._turns += 1
                with self._remedied(sequences):
                    policy.enter_context(self._policy(adapter))
                    compile_ahead(self.model, WALKS)
                sequences = self._run_or_retry(sequences, progress)
        return request_outputs(sequences, len(prompts), self._requests, self.tokenizer)

    def ready(
        self,
        prompts: Seq[Seq[int]],
        params: SamplingParams | Seq[SamplingParams],
        keep_share: float,
        policy: KeptPolicy | None = None,
    ) -> Drawing:
        """See :class:`pronghorn.rollout.base.Engine`. Cache, slots and every graph that the drawing can ask for are
        made here: while another thread trains, a capture would be broken by whatever waits for the whole GPU.

        Raises:
            ConfigError, torch.OutOfMemoryError: as :meth:`generate`; ``oom_retry`` has no say here.
        """
        sequences = self._sequences(prompts, params)
        if not sequences:
            raise ConfigError("rollout engine: prompts is empty; give at least one to draw from")
        with self._turn, self._on_device(), inference(self.model), self._remedied(sequences):
            self._keep_share = keep_share
            if self._snapshot is not None and self._snapshot.serves(self.model):
                self._snapshot.refresh()
            else:
                self._snapshot = None  # its memory first
                self._snapshot = Snapshot(self.model)
            if policy is not None:
                self._snapshot.load(policy)
            compile_ahead(self.model, WALKS)
            cache = self._ready_cache(sequences)
            decoder = self._ready_decoder(sequences, cache)
            if decoder is not None:
                decoder.capture_all()
            where = SideStream(cache.shape.device, self._own_stream(cache.shape.device))
            self._turns += 1
            turn = self._turns

        def run(progress: Progress) -> list[RequestOutput]:
            with self._remedied(sequences):
                self._run(sequences, progress, cache)
            return request_outputs(sequences, len(prompts), self._requests, self.tokenizer)

        def policy_of_now() -> KeptPolicy:
            assert self._snapshot is not None  # the drawing has its turn
            return self._snapshot.copies()

        return Drawing(self._turn, lambda: self._turns == turn, where, run, policy_of_now)

    def _own_stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """Where graphs are captured, and what is ready is drawn; None on the CPU."""
        if self._stream is None and device.type == "cuda":
            self._stream = torch.cuda.Stream(device)
        return self._stream

    def _sequences(self, prompts: Seq[Seq[int]], params: SamplingParams | Seq[SamplingParams]) -> list[Sequence]:
        base = unwrap(self.model)
        ends = eos_ids(base, self.tokenizer)
        return make_sequences(prompts, params, self.max_seq_length, base.config.vocab_size, ends)

    def _on_device(self) -> AbstractContextManager[Any]:
        """Graphs are captured on the current GPU, so the model's own is made the current one."""
        return torch.cuda.device_of(unwrap(self.model).get_input_embeddings().weight)

    @contextmanager
    def _policy(self, adapter: AdapterChoice) -> Iterator[None]:
        """What answers, for the time of a rollout on the trainer's thread: the model as it stands, under ``adapter``,
        or, where generations are drawn beside training, the snapshot of it, taken now.
        """
        snapshot = self._snapshot
        if snapshot is not None and isinstance(adapter, Live) and snapshot.serves(self.model):
            snapshot.refresh()
            with inference(self.model):
                yield
            return
        self._snapshot = None
        with _adapter(self.model, adapter), inference(self.model), prepared(self.model):
            yield

    def _run_or_retry(self, sequences: list[Sequence], progress: Progress | None) -> list[Sequence]:
        """Run them to their end; with ``oom_retry`` again from their start with half the rows, until it fits."""
        while True:
            rows = min(self.max_num_seqs, len(sequences))
            try:
                with self._remedied(sequences):
                    self._run(sequences, progress, self._ready_cache(sequences))
                return sequences
            except torch.OutOfMemoryError as error:
                if not self.oom_retry or rows == 1:
                    raise
                line = str(error).splitlines()[0]
            # The exception is gone by now, and with it the frames that hold tensors.
            self.max_num_seqs = rows // 2
            print(f"Pronghorn: {line}; running it again with max_num_seqs={self.max_num_seqs}", flush=True)
            sequences = [s.anew() for s in sequences]

    @contextmanager
    def _remedied(self, sequences: list[Sequence]) -> Iterator[None]:
        """Running out of memory within is one error that says what to lower, and leaves no cache, graphs or weights."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            device = unwrap(self.model).get_input_embeddings().weight.device
            _finish_queued(device)
            held = "" if self.cache is None else f" with a KV cache of {self.cache.bytes / 2**30:.2f} GiB"
            self._turns += 1  # what was ready before cannot be drawn any more
            self.cache, self._decoder, self._buffers = None, None, Buffers()
            raise torch.OutOfMemoryError(
                f"generation of {len(sequences)} completions ran out of memory on {device}{held}; lower "
                f"gpu_memory_utilization (now {self.utilization}), the number of samples, or max_tokens: {error}"
            ) from error

    def _run(self, sequences: list[Sequence], progress: Progress | None, cache: KVCache) -> None:
        blocks = BlockManager(cache.num_blocks, self.block_size)
        # A GPU decodes while the host launches a prefill: rows that idle until then are what few admissions cost.
        together = max(1, self.max_num_seqs // (32 if cache.shape.device.type == "cuda" else 8))
        scheduler = Scheduler(blocks, self.max_num_seqs, self.max_prefill_tokens, together)
        self.scheduler = scheduler
        runner = Runner(self._snapshot or LivePolicy(self.model), cache, self._buffers)
        try:
            for sequence in sequences:
                scheduler.add(sequence)
            ending = Ending(scheduler, self.tokenizer, len(sequences), progress)
            decoder = self._ready_decoder(sequences, cache)
            if decoder is None:
                vocab = unwrap(self.model).config.vocab_size
                run_stepwise(scheduler, runner, ending, vocab, self.tokenizer)
            else:
                run_ahead(scheduler, runner, ending, decoder)
        except FloatingPointError:
            _finish_queued(cache.shape.device)
            self.release()  # masked or not, a NaN left in the cache would spread
            raise
        finally:
            scheduler.abort()

    def _ready_decoder(self, sequences: list[Sequence], cache: KVCache) -> Decoder | None:
        """The graphs that decode on a GPU, made anew where these do not serve; None where steps go one by one."""
        ahead = cache.shape.device.type == "cuda" if self.ahead is None else self.ahead
        if not ahead:
            return None
        found = prepared_layers(self.model) if self._snapshot is None else self._snapshot.found
        reason = "layers that run by their own modules" if found is None else why_no_walk(self.model)
        if self.ahead is None and cache.shape.dtype not in (torch.bfloat16, torch.float16):
            reason = f"a model in {cache.shape.dtype}"
        if any(s.params.logprobs is not None for s in sequences):
            reason = "alternatives (logprobs=)"
        if reason or found is None:
            if reason not in self._said:
                self._said.add(reason)
                print(f"Pronghorn: rollouts launch their steps one by one, slower than graphs, because of {reason}")
            return None
        sizes = sizes_of(sequences, self.max_num_seqs)
        if self._decoder is None or not self._decoder.serves(found, cache, sizes):
            device = cache.shape.device
            _finish_queued(device)  # a burst for rows that have all ended may still run on its graphs
            self._decoder = None  # its memory first
            spare = memory_budget(device, self.utilization)
            if self._snapshot is not None:  # it stays while the policy trains
                spare = min(spare, int(self._keep_share * total_memory(device)) - cache.bytes)
            self._decoder = Decoder(self.model, found, cache, sizes, spare, self._own_stream(device))
        self._decoder.begin(sequences)
        return self._decoder

    def _ready_cache(self, sequences: list[Sequence]) -> KVCache:
        """The cache, made or made larger where this run needs it."""
        shape = KVShape.of(unwrap(self.model))
        needed, at_least = blocks_needed(sequences, self.block_size, self.max_num_seqs)
        if self.num_kv_blocks is not None:
            needed = self.num_kv_blocks
        if self.cache is not None and self.cache.shape == shape:
            # Beside training a cache that memory cut short stays: another would need all graphs captured again.
            cut = self._snapshot is not None and needed <= self._blocks_asked and at_least <= self.cache.num_blocks
            if self.cache.num_blocks >= needed or cut:
                return self.cache
        self.release()
        self._blocks_asked = needed
        release_held(layers(self.model))  # training's; generation reads the 4-bit ones
        if self.num_kv_blocks is None:
            others = self._kept_weights(min(self.max_num_seqs, len(sequences)), shape)
            needed = capacity(shape, self.block_size, needed, at_least, self.utilization, others)
        self.cache = KVCache(shape, needed, self.block_size)
        return self.cache

    def _kept_weights(self, rows: int, shape: KVShape) -> int:
        """Bytes of the 4-bit weights in 16 bits, where a decoder of so many rows wants to keep them so."""
        found = prepared_layers(self.model) if shape.device.type == "cuda" and self._snapshot is None else None
        if found is None or rows <= few_rows(hold=True):
            return 0
        return held_bytes_of(found, shape.dtype) + _ROUNDED_UP

    def release(self) -> None:
        """Give the KV cache's memory back to the device; the next call makes it again."""
        with self._turn:
            self._turns += 1
            self._buffers = Buffers()
            if self.cache is not None:
                _finish_queued(self.cache.shape.device)  # as above
            self._decoder = None  # its graphs hold the cache's addresses
            if self.cache is None:
                return
            on_gpu = self.cache.shape.device.type == "cuda"
            self.cache = None
            if on_gpu:
                torch.cuda.empty_cache()

    @property
    def held_bytes(self) -> int:
        """Memory that :meth:`release` gives back: the KV cache, and weights that decoding keeps in 16 bits."""
        weights = 0 if self._decoder is None else self._decoder.held_bytes
        return weights + (0 if self.cache is None else self.cache.bytes)

    def rest(self, keep_share: float) -> bool:
        """See :class:`pronghorn.rollout.base.Engine`. Keeping costs training memory; giving back costs the next rollout
        the time to make cache and graphs again.
        """
        with self._turn:
            if self.cache is None or self.held_bytes <= keep_share * total_memory(self.cache.shape.device):
                return False
            self.release()
            return True

    def check_exact(self) -> None:
        """See :class:`pronghorn.rollout.base.Engine`."""
        with self._turn, inference(self.model), prepared(self.model):
            check_exact(self.model, prepared_layers(self.model), self.max_num_seqs)

    def policy_changed(self) -> None:
        """Forget keys and values of the old weights. None outlive a call of ``generate`` in this version."""
        with self._turn:
            self.scheduler = None


def _finish_queued(device: torch.device) -> None:
    """Wait for what this thread has queued: memory that it reads is about to be free for another stream's use."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _adapter(model: Any, which: AdapterChoice) -> AbstractContextManager[Any]:
    """The chosen adapter for the time of a rollout."""
    if isinstance(which, Live) or (which is None and not hasattr(model, "peft_config")):
        return nullcontext()
    from ...lora.active import adapter  # imports PEFT: seconds that a model without adapters need not wait

    return adapter(model, which)

"""The native engine: queue, blocks, model step, sampler and stopping, composed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager, nullcontext
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
from ..base import Progress, RequestOutput, eos_ids
from ..warmup import compile_ahead
from .ahead import run_ahead
from .blocks import BlockManager
from .decode_walk import why_no_walk
from .decoder import MOST_ROWS, Decoder, sizes_of
from .dry_run import rollout_steps
from .ending import Ending
from .exact import check_exact
from .held import Buffers
from .kv_cache import KVCache, KVShape, capacity, memory_budget, total_memory
from .outputs import request_outputs
from .plan import blocks_needed, make_sequences
from .request import Sequence
from .runner import Runner
from .scheduler import Scheduler
from .stepwise import run_stepwise


class NativeEngine:
    """Generates with the model's own modules and weights; nothing is copied, so an optimizer step shows at once.

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
        self._buffers = Buffers()
        self._decoder: Decoder | None = None
        self._said: set[str] = set()
        self._requests = itertools.count()

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
            torch.OutOfMemoryError: with the remedy, when a step does not fit the device.
            FloatingPointError: the model gave logits that are not numbers.
        """
        base = unwrap(self.model)
        vocab = base.config.vocab_size
        sequences = make_sequences(prompts, params, self.max_seq_length, vocab, eos_ids(base, self.tokenizer))
        if sequences:
            on_gpu = torch.cuda.device_of(base.get_input_embeddings().weight)  # graphs are captured on the current one
            with on_gpu, _adapter(self.model, adapter), inference(self.model), prepared(self.model):
                compile_ahead(self.model, {"rollouts": rollout_steps})
                sequences = self._run_or_retry(sequences, vocab, progress)
        return request_outputs(sequences, len(prompts), self._requests, self.tokenizer)

    def _run_or_retry(self, sequences: list[Sequence], vocab: int, progress: Progress | None) -> list[Sequence]:
        """Run them to their end; with ``oom_retry`` again from their start with half the rows, until it fits."""
        while True:
            rows = min(self.max_num_seqs, len(sequences))
            try:
                self._run(sequences, vocab, progress)
                return sequences
            except torch.OutOfMemoryError as error:
                if not self.oom_retry or rows == 1:
                    raise
                line = str(error).splitlines()[0]
            # The exception is gone by now, and with it the frames that hold tensors.
            self.max_num_seqs = rows // 2
            print(f"Pronghorn: {line}; running it again with max_num_seqs={self.max_num_seqs}", flush=True)
            sequences = [s.anew() for s in sequences]

    def _run(self, sequences: list[Sequence], vocab: int, progress: Progress | None) -> None:
        cache = self._ready_cache(sequences)
        blocks = BlockManager(cache.num_blocks, self.block_size)
        together = max(1, self.max_num_seqs // 8)
        scheduler = Scheduler(blocks, self.max_num_seqs, self.max_prefill_tokens, together)
        self.scheduler = scheduler
        runner = Runner(self.model, cache, self._buffers)
        try:
            for sequence in sequences:
                scheduler.add(sequence)
            ending = Ending(scheduler, self.tokenizer, len(sequences), progress)
            decoder = self._ready_decoder(sequences, cache)
            if decoder is None:
                run_stepwise(scheduler, runner, ending, vocab, self.tokenizer)
            else:
                run_ahead(scheduler, runner, ending, decoder)
        except torch.OutOfMemoryError as error:
            self.cache, self._decoder, self._buffers = None, None, Buffers()
            raise torch.OutOfMemoryError(
                f"generation of {len(sequences)} completions ran out of memory on {cache.shape.device} with a KV cache "
                f"of {cache.bytes / 2**30:.2f} GiB; lower gpu_memory_utilization (now {self.utilization}), the number "
                f"of samples, or max_tokens: {error}"
            ) from error
        except FloatingPointError:
            self.release()  # masked or not, a NaN left in the cache would spread
            raise
        finally:
            scheduler.abort()

    def _ready_decoder(self, sequences: list[Sequence], cache: KVCache) -> Decoder | None:
        """The graphs that decode on a GPU, made anew where these do not serve; None where steps go one by one."""
        ahead = cache.shape.device.type == "cuda" if self.ahead is None else self.ahead
        if not ahead or any(s.params.logprobs is not None for s in sequences):
            return None
        found = prepared_layers(self.model)
        reason = "layers that run by their own modules" if found is None else why_no_walk(self.model)
        if self.ahead is None and cache.shape.dtype not in (torch.bfloat16, torch.float16):
            reason = f"a model in {cache.shape.dtype}"
        if reason or found is None:
            if reason not in self._said:
                self._said.add(reason)
                print(f"Pronghorn: rollouts launch their steps one by one, slower than graphs, because of {reason}")
            return None
        sizes = sizes_of(sequences, self.max_num_seqs)
        if self._decoder is None or not self._decoder.serves(found, cache, sizes):
            self._decoder = None  # its memory first
            spare = memory_budget(cache.shape.device, self.utilization)
            self._decoder = Decoder(self.model, found, cache, sizes, spare)
        self._decoder.begin(sequences)
        return self._decoder

    def _ready_cache(self, sequences: list[Sequence]) -> KVCache:
        """The cache, made or made larger where this run needs it."""
        shape = KVShape.of(unwrap(self.model))
        needed, at_least = blocks_needed(sequences, self.block_size, self.max_num_seqs)
        if self.num_kv_blocks is not None:
            needed = self.num_kv_blocks
        if self.cache is not None and self.cache.shape == shape and self.cache.num_blocks >= needed:
            return self.cache
        self.release()
        release_held(layers(self.model))  # training's; generation reads the 4-bit ones
        if self.num_kv_blocks is None:
            needed = capacity(shape, self.block_size, needed, at_least, self.utilization)
        self.cache = KVCache(shape, needed, self.block_size)
        return self.cache

    def release(self) -> None:
        """Give the KV cache's memory back to the device; the next call makes it again."""
        self._buffers = Buffers()
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
        if self.cache is None or self.held_bytes <= keep_share * total_memory(self.cache.shape.device):
            return False
        self.release()
        return True

    def check_exact(self) -> None:
        """See :class:`pronghorn.rollout.base.Engine`."""
        with inference(self.model), prepared(self.model):
            check_exact(self.model, prepared_layers(self.model), self.max_num_seqs)

    def policy_changed(self) -> None:
        """Forget keys and values of the old weights. None outlive a call of ``generate`` in this version."""
        self.scheduler = None


def _adapter(model: Any, which: AdapterChoice) -> AbstractContextManager[Any]:
    """The chosen adapter for the time of a rollout."""
    if isinstance(which, Live) or (which is None and not hasattr(model, "peft_config")):
        return nullcontext()
    from ...lora.active import adapter  # imports PEFT: seconds that a model without adapters need not wait

    return adapter(model, which)

"""512 prompts x 8 samples with completions of 16 to 2,048 tokens, ends mixed: tokens/s of one engine.

    python -m benchmarks.throughput --model FOLDER --impl vllm  > vllm.log
    python -m benchmarks.throughput --model FOLDER --impl hf-cb > hf.log
    python -m benchmarks.throughput --model FOLDER --peer vllm=vllm.log --peer transformers=hf.log

The same prompts (64 to 256 random tokens) and the same length of each completion (log-uniform) for every engine, which
is made to reach it: 4,096 completions; ``--prompts 512,128`` measures fewer as well, for an engine that would take too
long. ``--impl vllm`` and ``--impl hf-cb`` print a ``RESULT`` line, in bf16 as they are fastest; ours reads them by
``--peer``. Case ``throughput/mixed/<prompts>x8``: ``tokens_per_s`` of generated tokens, ``s``, ``load_s``,
``lora_rank`` and ``bits`` of the base, as what is compared differs in them, and ``most_rows`` at once.

``hf-cb`` is transformers' continuous batching: paged cache, prefix sharing, CUDA graphs, the next batch prepared while
one computes, one manager kept for all runs. What bounds it is its attention, so ``--attention`` says which:

- ``torch-flash``: torch's own flash attention, registered with transformers; many rows pay (256). Needs CUDA and a
  transformers that has ``paged|sdpa`` (5.17).
- ``eager``, ``sdpa``: every query meets the gathered keys of all rows under one mask, so few rows pay (16 to 32).
- ``auto``: what transformers chooses, a flash-attention package where there is one.

Every 10 s it says how far it is. After ``--limit-s`` it stops, and ``tokens_per_s_until_limit``, ``share_of_tokens``
(generated of wanted) and ``s_until_limit`` stand in for ``tokens_per_s`` and ``s``.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.decode import load, timed
from benchmarks.results import Results, arguments, distributions, peer_results, start

SHORTEST, LONGEST, PROMPT = 16, 2048, 256
PROGRESS_S = 10
Run = Callable[[list[list[int]], list[list[int]], float], tuple[int, float]]
"""Prompts, lengths and a limit in s (``hf-cb`` alone keeps it) to tokens generated and the seconds it took."""


def workload(prompts: int, samples: int, longest: int = LONGEST) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts as ids, and for each the lengths of its completions; the same for everyone."""
    rng = random.Random(0)
    ids = [[rng.randrange(5, 16000) for _ in range(rng.randrange(64, PROMPT + 1))] for _ in range(prompts)]
    low, high = math.log(SHORTEST), math.log(longest)
    lengths = [[round(math.exp(rng.uniform(low, high))) for _ in range(samples)] for _ in range(prompts)]
    return ids, lengths


def clocked(generate: Callable[[list[list[int]], list[list[int]]], int]) -> Run:
    def run(ids: list[list[int]], lengths: list[list[int]], limit_s: float) -> tuple[int, float]:
        tokens: list[int] = []
        seconds = timed(lambda: tokens.append(generate(ids, lengths)))
        return tokens[0], seconds

    return run


def pronghorn(args: argparse.Namespace) -> Run:
    """The native engine; equal prompts of separate requests share their blocks, so each length is a request."""
    from pronghorn.config.sampling import SamplingParams
    from pronghorn.rollout import base as rollout

    model, tokenizer = load(args.model, args.base)
    engine = rollout.create(
        "native", model, tokenizer, max_seq_length=LONGEST + PROMPT, max_num_seqs=args.rows, gpu_memory_utilization=0.85
    )  # fmt: skip

    def generate(ids: list[list[int]], lengths: list[list[int]]) -> int:
        params = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True) for row in lengths for n in row]
        outputs = engine.generate([p for p, row in zip(ids, lengths) for _ in row], params)
        return sum(len(o.outputs[0].token_ids) for o in outputs)

    return clocked(generate)


def vllm(args: argparse.Namespace) -> Run:
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model, dtype="bfloat16", gpu_memory_utilization=0.85, max_model_len=LONGEST + PROMPT,
        max_num_seqs=args.rows, enable_prefix_caching=True,
    )  # fmt: skip

    def generate(ids: list[list[int]], lengths: list[list[int]]) -> int:
        params = [
            SamplingParams(temperature=1.0, max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False)
            for row in lengths
            for n in row
        ]
        prompts = [{"prompt_token_ids": p} for p, row in zip(ids, lengths) for _ in row]
        return sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False))

    return clocked(generate)


def torch_flash(
    module: Any, query_1HTD: Any, key_1KTD: Any, value_1KTD: Any, attention_mask: None, *, scaling: float, **batch: Any
) -> tuple[Any, None]:
    """transformers' own flash path (cache written, rows gathered, causal by sequence) on the kernel inside torch."""
    import torch

    key_SKD, value_SKD = batch["cache"].update(
        key_states=key_1KTD, value_states=value_1KTD, layer_idx=module.layer_idx, read_index=batch["read_index"],
        write_index=batch["write_index"],
    )  # fmt: skip
    out_THD, *_ = torch.ops.aten._flash_attention_forward(
        query_1HTD.transpose(1, 2).squeeze(0).contiguous(), key_SKD.contiguous(), value_SKD.contiguous(),
        batch["cu_seq_lens_q"], batch["cu_seq_lens_k"], batch["max_seqlen_q"], batch["max_seqlen_k"],
        0.0, True, False, scale=scaling,
    )  # fmt: skip
    return out_THD, None


def attention_name(attention: str) -> str | None:
    """What transformers calls it. A name with "flash" in it would have transformers look for a package."""
    if attention == "torch-flash":
        from transformers import AttentionInterface

        AttentionInterface.register("paged|torch_varlen", torch_flash)
        return "paged|torch_varlen"
    return None if attention == "auto" else f"paged|{attention}"


def batching(args: argparse.Namespace) -> dict[str, Any]:
    """Fields of ``ContinuousBatchingConfig``: a batch of ``--rows``, and few shapes, as each is a CUDA graph.

    Queries are padded to a multiple of the rows and keys to one of 128 or 256 a row. Where there may be a mask the
    cache holds what the rows can fill and no more, as one of the whole cache and batch is copied to the GPU at every
    step; without a mask it fills the memory. Blocks of 64 share what prompts have in common; a package needs 256.
    """
    import torch

    cuda, masked = torch.cuda.is_available(), args.attention != "torch-flash"
    queries = -(-args.rows // 16) * 16
    block = 256 if args.attention == "auto" else 64
    return {
        "block_size": block,
        "num_blocks": args.rows * ((LONGEST + PROMPT) // block + 2) if masked else None,
        "max_batch_tokens": args.batch_tokens or queries + max(queries, 64),
        "max_requests_per_batch": args.rows,
        "max_memory_percent": 0.85,
        "allow_block_sharing": True,
        "use_async_batching": cuda,
        "use_cuda_graph": cuda and args.graphs,
        "q_padding_interval_size": queries,
        "kv_padding_interval_size": args.rows * (128 if masked else 256),
        "default_compile_level": args.compile_level,
    }


def hf_cb(args: argparse.Namespace) -> Run:
    """transformers' continuous batching; cache and graphs of the first run serve the later ones."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    fields = batching(args)
    print(f"hf-cb: attention {args.attention}, {fields}", flush=True)
    model = AutoModelForCausalLM.from_pretrained(
        args.model, dtype=torch.bfloat16, device_map="cuda" if torch.cuda.is_available() else "cpu",
        attn_implementation=attention_name(args.attention),
    )  # fmt: skip
    sampling = GenerationConfig(do_sample=True, temperature=1.0, max_new_tokens=LONGEST, eos_token_id=-1)
    config = ContinuousBatchingConfig(**fields)

    def run(ids: list[list[int]], lengths: list[list[int]], limit_s: float) -> tuple[int, float]:
        manager = model.init_continuous_batching(generation_config=sampling, continuous_batching_config=config)
        manager.start()
        try:
            begun = time.perf_counter()
            wanted = [(p, n) for p, row in zip(ids, lengths) for n in row]
            for prompt, new in wanted:
                manager.add_request(input_ids=prompt, max_new_tokens=new)
            tokens, seconds = collect(manager, len(wanted), begun, limit_s)
        finally:  # its thread would keep the process alive
            manager.stop(hard_stop=True, keep_for_next_session=True)
        while (cut := manager.get_result()) is not None:  # with what the stop left unfinished
            tokens += len(cut.generated_tokens)
        return tokens, seconds

    return run


def collect(manager: Any, wanted: int, begun: float, limit_s: float) -> tuple[int, float]:
    """Tokens of finished requests, and the seconds since ``begun``, until all have finished or the time is up."""
    tokens = done = 0
    shown = seconds = 0.0
    while done < wanted and seconds < limit_s:
        result = manager.get_result(timeout=0.5)
        seconds = time.perf_counter() - begun
        if result is None and not manager.is_running() or result is not None and result.error is not None:
            why = "its thread ended" if result is None else result.error
            raise SystemExit(f"hf-cb: {done} of {wanted} requests done, then: {why}; see the log above")
        if result is not None and result.is_finished():
            done, tokens = done + 1, tokens + len(result.generated_tokens)
        if seconds - shown >= PROGRESS_S:
            shown = seconds
            so_far = tokens + unfinished(manager)
            print(f"hf-cb: {done} of {wanted} requests, {so_far} tokens, {seconds:.0f} s", flush=True)
    return tokens, seconds


def unfinished(manager: Any) -> int:
    """Tokens of requests that are still running."""
    processor = manager.batch_processor
    running = [] if processor is None else list(processor.scheduler.active_requests.values())
    return sum(len(state.generated_tokens) for state in running)


ENGINES = {"pronghorn": pronghorn, "vllm": vllm, "hf-cb": hf_cb}


def warm_up(args: argparse.Namespace, run: Run, ids: list[list[int]], lengths: list[list[int]]) -> None:
    """A small run. hf-cb's graphs have the shapes of the real lengths: those, on prompts that no later run shares."""
    if args.impl == "hf-cb":
        run([prompt[::-1] for prompt in ids], lengths, args.warm_s)
    else:
        few = ids[:64]
        run(few, warm_lengths(len(few), len(lengths[0])), math.inf)


def warm_lengths(prompts: int, samples: int) -> list[list[int]]:
    """Lengths by whose ends every number of rows is come by: it halves each 24 steps. What is compiled and captured for
    few rows would else be so within the measured time, in whose last steps few are left.
    """
    total = prompts * samples
    flat = [16 + math.ceil(24 * math.log2(total / (i + 1))) for i in range(total)]
    return [flat[i * samples : (i + 1) * samples] for i in range(prompts)]


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Load, warm up, and each workload."""
    begun = time.perf_counter()
    run = ENGINES[args.impl](args)
    load_s = time.perf_counter() - begun
    nf4 = args.impl == "pronghorn" and args.base == "nf4-lora"
    own = {"lora_rank": 32 if nf4 else 0, "bits": 4 if nf4 else 16, "most_rows": args.rows, "load_s": load_s}
    for prompts in map(int, args.prompts.split(",")):
        ids, lengths = workload(prompts, args.samples)
        warm_up(args, run, ids, lengths)
        tokens, seconds = run(ids, lengths, args.limit_s)
        speed = speed_of(args, tokens, sum(map(sum, lengths)), seconds)
        yield {"impl": args.impl, "case": f"{prompts}x{args.samples}", **speed, **own}


def speed_of(args: argparse.Namespace, tokens: int, expected: int, seconds: float) -> dict[str, float]:
    """Metrics of a whole run, or of one that the limit cut."""
    if tokens == expected:
        return {"tokens_per_s": tokens / seconds, "s": seconds}
    if tokens > expected or args.impl != "hf-cb" or seconds < args.limit_s:
        raise SystemExit(f"--impl {args.impl} generated {tokens} tokens of {expected}: the numbers do not compare")
    return {
        "tokens_per_s_until_limit": tokens / seconds, "share_of_tokens": tokens / expected, "s_until_limit": seconds,
    }  # fmt: skip


def add(results: Results, name: str, run: dict[str, Any]) -> None:
    found = {k: v for k, v in run.items() if k not in ("impl", "case")}
    results.add(f"throughput/mixed/{run['case']}", name, **found)


def main() -> None:
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--impl", default="pronghorn", choices=list(ENGINES))
    parser.add_argument("--base", default="nf4-lora", choices=["nf4-lora", "bf16"], help="ours")
    parser.add_argument("--prompts", default="512", help="how many, one number or several")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rows", type=int, default=256, help="most sequences at once")
    parser.add_argument(
        "--attention", default="torch-flash", choices=["torch-flash", "eager", "sdpa", "auto"], help="hf-cb"
    )
    parser.add_argument("--batch-tokens", type=int, help="hf-cb: most tokens of a batch; twice the rows, or 64 more")
    parser.add_argument("--graphs", action=argparse.BooleanOptionalAction, default=True, help="hf-cb: CUDA graphs")
    parser.add_argument("--compile-level", type=int, default=0, choices=range(4), help="hf-cb: of torch.compile")
    parser.add_argument("--warm-s", type=float, default=20, help="hf-cb: most seconds of the run that warms up")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="hf-cb: most seconds of a measured run")
    args = parser.parse_args()
    if args.impl != "pronghorn":
        for run in measured(args):
            print("RESULT", json.dumps(run), flush=True)
        return
    peers = peer_results(args.peer)
    results = start("throughput", distributions(peers), args)
    for name, runs in peers.items():
        for run in runs:
            add(results, name, run)
    for run in measured(args):
        add(results, "pronghorn", run)
    results.write(args.out)


if __name__ == "__main__":
    main()

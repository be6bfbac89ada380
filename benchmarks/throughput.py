"""512 prompts x 8 samples with completions of 16 to 2,048 tokens, ends mixed: tokens/s of one engine.

    python -m benchmarks.throughput --model FOLDER --impl vllm  > vllm.log
    python -m benchmarks.throughput --model FOLDER --impl hf-cb > hf.log
    python -m benchmarks.throughput --model FOLDER --peer vllm=vllm.log --peer transformers=hf.log

The same prompts (64 to 256 random tokens) and the same length of each completion (log-uniform) for every engine, which
is made to reach it: 4,096 completions; ``--prompts 512,128`` measures fewer as well, for an engine that would take too
long. ``--impl vllm`` and ``--impl hf-cb`` (transformers' continuous batching: paged cache, CUDA graphs, prefix sharing,
one manager kept for all runs) print a ``RESULT`` line, in bf16 as they are fastest; ours reads them by ``--peer``. Case
``throughput/mixed/<prompts>x8``: ``tokens_per_s`` of generated tokens, ``s``, ``load_s``, ``lora_rank`` and ``bits`` of
the base, as what is compared differs in them, and ``most_rows`` at once (ours and vLLM's).
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

SHORTEST, LONGEST = 16, 2048


def workload(prompts: int, samples: int, longest: int = LONGEST) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts as ids, and for each the lengths of its completions; the same for everyone."""
    rng = random.Random(0)
    ids = [[rng.randrange(5, 16000) for _ in range(rng.randrange(64, 257))] for _ in range(prompts)]
    low, high = math.log(SHORTEST), math.log(longest)
    lengths = [[round(math.exp(rng.uniform(low, high))) for _ in range(samples)] for _ in range(prompts)]
    return ids, lengths


def pronghorn(args: argparse.Namespace) -> Callable[[list[list[int]], list[list[int]]], int]:
    """The native engine; equal prompts of separate requests share their blocks, so each length is a request."""
    from pronghorn.config.sampling import SamplingParams
    from pronghorn.rollout import base as rollout

    model, tokenizer = load(args.model, args.base)
    engine = rollout.create(
        "native", model, tokenizer, max_seq_length=LONGEST + 256, max_num_seqs=args.rows, gpu_memory_utilization=0.85
    )  # fmt: skip

    def run(ids: list[list[int]], lengths: list[list[int]]) -> int:
        params = [SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True) for row in lengths for n in row]
        outputs = engine.generate([p for p, row in zip(ids, lengths) for _ in row], params)
        return sum(len(o.outputs[0].token_ids) for o in outputs)

    return run


def vllm(args: argparse.Namespace) -> Callable[[list[list[int]], list[list[int]]], int]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        args.model, dtype="bfloat16", gpu_memory_utilization=0.85, max_model_len=LONGEST + 256, max_num_seqs=args.rows,
        enable_prefix_caching=True,
    )  # fmt: skip

    def run(ids: list[list[int]], lengths: list[list[int]]) -> int:
        params = [
            SamplingParams(temperature=1.0, max_tokens=n, min_tokens=n, ignore_eos=True, detokenize=False)
            for row in lengths
            for n in row
        ]
        prompts = [{"prompt_token_ids": p} for p, row in zip(ids, lengths) for _ in row]
        return sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, params, use_tqdm=False))

    return run


def hf_cb(args: argparse.Namespace) -> Callable[[list[list[int]], list[list[int]]], int]:
    """transformers' continuous batching, its manager started once and kept."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16, device_map={"": 0})
    model.eval()
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=True, temperature=1.0, max_new_tokens=LONGEST, eos_token_id=-1),
        continuous_batching_config=ContinuousBatchingConfig(
            use_cuda_graph=True, use_async_batching=True, allow_block_sharing=True, max_memory_percent=0.85
        ),
    )
    manager.start()

    def run(ids: list[list[int]], lengths: list[list[int]]) -> int:
        wanted = [(p, n) for p, row in zip(ids, lengths) for n in row]
        for prompt, new in wanted:
            manager.add_request(input_ids=prompt, max_new_tokens=new)
        tokens = done = 0
        while done < len(wanted):
            result = manager.get_result(timeout=60)
            if result is None:
                raise SystemExit(f"hf-cb: no result for 60 s, {done} of {len(wanted)} done; see the log above")
            if result.is_finished():
                done, tokens = done + 1, tokens + len(result.generated_tokens)
        return tokens

    return run


ENGINES = {"pronghorn": pronghorn, "vllm": vllm, "hf-cb": hf_cb}


def measured(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Load, one small run that warms up, and each workload."""
    begun = time.perf_counter()
    run = ENGINES[args.impl](args)
    load_s = time.perf_counter() - begun
    nf4 = args.impl == "pronghorn" and args.base == "nf4-lora"
    own = {"lora_rank": 32 if nf4 else 0, "bits": 4 if nf4 else 16, "most_rows": args.rows, "load_s": load_s}
    for prompts in map(int, args.prompts.split(",")):
        ids, lengths = workload(prompts, args.samples)
        expected = sum(map(sum, lengths))
        run(ids[:64], [[min(n, 64) for n in row] for row in lengths[:64]])
        tokens: list[int] = []
        seconds = timed(lambda: tokens.append(run(ids, lengths)))  # noqa: B023 - called at once
        if tokens[0] != expected:
            raise SystemExit(
                f"--impl {args.impl} generated {tokens[0]} tokens of {expected}: the numbers do not compare"
            )
        case = f"{prompts}x{args.samples}"
        yield {"impl": args.impl, "case": case, "tokens_per_s": expected / seconds, "s": seconds, **own}


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
    parser.add_argument("--rows", type=int, default=256, help="most sequences at once, ours and vLLM's")
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

"""Decoding on a local 8B model: ms a step and tokens/s, prompt 256 + 256 new, at batches of 1, 6, 64 and 256.

    python -m benchmarks.decode --model FOLDER [--bases nf4-lora,bf16,fp16] [--peer vllm-bf16=LOG] ...

Cases ``decode/nf4-lora/b<N>`` (4-bit base under a live LoRA adapter of rank 32, every B nonzero), ``decode/bf16/b<N>``
and ``decode/fp16/b<N>`` (16-bit base, no adapter): ``ms_per_step``, the whole call of ``generate`` over 256, prefill,
host and sampling included, the best of two calls as the peers' script takes it; ``tokens_per_s``; ``graph_ms``, one
replay of the step's graph with nobody in its slots; ``s``, every call. Case ``decode/<base>/memory``: ``weights_gb``,
``kv_gb`` at 256 rows, ``sleep_ms`` (memory given back) and ``wake_ms`` (the first call after it, over one before it).
A peer's log holds the ``RESULT`` line of ``gen_bench.py``; GB are 2^30 bytes.
"""

from __future__ import annotations

import gc
import time
from typing import Any

from benchmarks.results import Results, arguments, distributions, peer_results, start

PROMPT, NEW = 256, 256


def case(base: str, rows: int | str) -> str:
    return f"decode/{base}/b{rows}"


def add_peers(results: Results, peers: dict[str, list[dict[str, Any]]]) -> None:
    """Every peer's batches, by the base that it ran: ``nf4`` with the adapter is ours to compare with."""
    for name, runs in peers.items():
        for run in runs:
            base = "nf4-lora" if run["quant"] == "nf4" else run["quant"]
            for rows, found in run["res"].items():
                results.add(
                    case(base, rows), name, ms_per_step=found["ms_per_step"], tokens_per_s=found["tok_s"],
                    lora_rank=run["lora"],
                )  # fmt: skip


def load(folder: str, base: str) -> tuple[Any, Any]:
    """The model, and for ``nf4-lora`` a rank-32 adapter whose every B is nonzero."""
    import torch

    from pronghorn import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(
        folder,
        max_seq_length=1024,
        dtype=torch.float16 if base == "fp16" else None,
        load_in_4bit=base == "nf4-lora",
        fast_inference=True,
        max_lora_rank=32,
        compile_ahead=False,  # no compilers beside what is timed
    )
    if base != "nf4-lora":
        model.requires_grad_(False)
        return model, tokenizer
    model = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=32)
    generator = torch.Generator("cuda").manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, device="cuda") * 0.01)
    return model, tokenizer


def timed(run: Any) -> float:
    """Seconds of a call, the GPU's queue empty before and after."""
    import torch

    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begun


def graph_ms(decoder: Any, rows: int) -> float:
    """One replay of the graph of so many slots, all of them empty."""
    import torch

    from pronghorn.rollout.native.decoder import bucket_of

    decoder.clear()
    graph = decoder._graph(bucket_of(rows))
    for _ in range(3):
        graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(20):
        graph.replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 20


def measure(results: Results, folder: str, base: str, batches: list[int], repeats: int) -> None:
    """All batches on one base."""
    import torch

    from pronghorn.config.sampling import SamplingParams
    from pronghorn.rollout import base as rollout

    gc.collect()  # the model before
    before_load = torch.cuda.memory_allocated()
    model, tokenizer = load(folder, base)
    weights_gb = (torch.cuda.memory_allocated() - before_load) / 2**30
    engine: Any = rollout.engine_of(model, tokenizer)
    torch.manual_seed(0)
    prompts = torch.randint(5, 16000, (max(batches), PROMPT)).tolist()
    params = SamplingParams(temperature=1.0, max_tokens=NEW, ignore_eos=True, detokenize=False)  # as the peers' script
    for rows in batches:
        engine.generate(prompts[:rows], params)  # its cache and graphs are made
        seconds = [timed(lambda rows=rows: engine.generate(prompts[:rows], params)) for _ in range(repeats)]
        best = min(seconds)
        results.add(
            case(base, rows), "pronghorn", ms_per_step=best / NEW * 1e3, tokens_per_s=rows * NEW / best,
            graph_ms=graph_ms(engine._decoder, rows),
        )  # fmt: skip
        for s in seconds:
            results.add(case(base, rows), "pronghorn", s=s)
    few = prompts[:6]
    kv_gb = engine.cache.bytes / 2**30
    engine.generate(few, params)  # so few have not run where none of the batches is as small
    before = timed(lambda: engine.generate(few, params))
    sleep = timed(engine.release)
    wake = timed(lambda: engine.generate(few, params)) - before
    results.add(
        f"decode/{base}/memory", "pronghorn", weights_gb=weights_gb, kv_gb=kv_gb, sleep_ms=sleep * 1e3,
        wake_ms=wake * 1e3,
    )  # fmt: skip
    engine.release()


def main() -> None:
    parser = arguments((__doc__ or "").split("\n")[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--bases", default="nf4-lora,bf16", help="nf4-lora, bf16, fp16: some of them")
    parser.add_argument("--batches", default="1,6,64,256")
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    peers = peer_results(args.peer)
    results = start("decode", distributions(peers), args)
    add_peers(results, peers)
    for base in args.bases.split(","):
        measure(results, args.model, base, [int(rows) for rows in args.batches.split(",")], args.repeats)
        results.write(args.out)  # of the bases so far: what comes may be cut off


if __name__ == "__main__":
    main()

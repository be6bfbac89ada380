"""What the rollout benchmarks count, on the CPU and on made-up records."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from benchmarks import decode, parity, readme, throughput
from benchmarks.results import Results, peer_results
from pronghorn.rollout.native.decoder import BUCKETS, bucket_of
from tests.helpers import tiny_llama
from tests.rollout.conftest import load, with_lora


def metrics(results: Results, case: str, impl: str) -> dict[str, float]:
    return {row.metric: row.value for row in results.rows if (row.case, row.impl) == (case, impl)}


def test_the_workload_is_the_same_for_everyone_and_mixed():
    prompts, lengths = throughput.workload(512, 8)
    assert (prompts, lengths) == throughput.workload(512, 8)
    flat = sorted(n for row in lengths for n in row)
    assert len(prompts) == 512 and len(flat) == 4096
    assert flat[0] >= 16 and flat[-1] <= 2048 and flat[0] < 18 and flat[-1] > 2000
    assert flat[len(flat) // 2] == pytest.approx((16 * 2048) ** 0.5, rel=0.1), "as many short ones as long ones"
    assert {64, 256} <= {min(map(len, prompts)), max(map(len, prompts))}


@pytest.fixture
def continuous(tmp_path, monkeypatch) -> argparse.Namespace:
    """Options of transformers' continuous batching, on a small model and with short completions."""
    made = throughput.workload
    monkeypatch.setattr(throughput, "LONGEST", 24)
    monkeypatch.setattr(throughput, "workload", lambda prompts, samples: made(prompts, samples, 24))
    return argparse.Namespace(
        impl="hf-cb", model=str(tiny_llama(tmp_path, vocab_size=16384)), attention="eager", rows=4, batch_tokens=None,
        graphs=True, compile_level=0, warm_s=0.2, limit_s=math.inf, prompts="3", samples=4, base="bf16",
    )  # fmt: skip


def test_a_warm_up_comes_by_every_graph():
    """A burst is 8 steps at most, so a size that is asked for through 8 steps begins one."""
    flat = [n for row in throughput.warm_lengths(64, 8) for n in row]
    rows = [bucket_of(sum(n > step for n in flat)) for step in range(max(flat))]
    sizes = [size for size in BUCKETS if size <= 512]
    assert sorted(set(rows)) == sizes and all(rows.count(size) >= 8 for size in sizes)


def test_continuous_batching_reaches_every_length(continuous):
    ids, lengths = throughput.workload(3, 4)
    run = throughput.hf_cb(continuous)
    for _ in range(2):  # the manager is kept
        tokens, seconds = run(ids, lengths, math.inf)
        assert tokens == sum(map(sum, lengths)) and seconds > 0
    (found,) = throughput.measured(continuous)
    assert found["case"] == "3x4" and found["tokens_per_s"] == pytest.approx(tokens / found["s"])


def test_continuous_batching_keeps_what_it_had_when_the_time_is_up(continuous, monkeypatch, capsys):
    monkeypatch.setattr(throughput, "PROGRESS_S", 0)
    continuous.prompts, continuous.limit_s = "100", 0.5
    (found,) = throughput.measured(continuous)
    assert "tokens_per_s" not in found and 0 < found["share_of_tokens"] < 1 and found["s_until_limit"] >= 0.5
    tokens = found["tokens_per_s_until_limit"] * found["s_until_limit"]
    assert tokens == pytest.approx(found["share_of_tokens"] * sum(map(sum, throughput.workload(100, 4)[1])))
    assert "of 400 requests" in capsys.readouterr().out


def test_a_run_that_no_limit_cut_and_is_too_short_does_not_count(continuous):
    continuous.limit_s = 5.0
    with pytest.raises(SystemExit, match="9 tokens of 10"):
        throughput.speed_of(continuous, 9, 10, 4.0)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (5, 1.0), (0, 0.7), (10, 0.6)])
def test_the_kept_set_is_that_of_transformers(top_k, top_p):
    x = torch.randn(20, 60)
    expected = x if top_k == 0 else TopKLogitsWarper(top_k)(None, x)
    expected = expected if top_p == 1.0 else TopPLogitsWarper(top_p)(None, expected)
    assert torch.equal(parity.keep(x, top_k, top_p), expected > -torch.inf)


@pytest.fixture
def small(tmp_path, monkeypatch) -> Any:
    model, tokenizer = load(tiny_llama(tmp_path))
    monkeypatch.setattr(parity, "LENGTHS", (5, 17))
    monkeypatch.setattr(
        parity, "SAMPLINGS",
        {"plain": {"n": 3, "max_tokens": 20}, "top-p": {"n": 3, "max_tokens": 20, "temperature": 0.8, "top_p": 0.7}},
    )  # fmt: skip
    return with_lora(model), tokenizer


def test_parity_counts_what_differs(small):
    results = Results("parity", (), "c")
    parity.measure(results, "tiny", *small)
    for what in ("plain", "top-p"):
        found = metrics(results, f"parity/nf4-lora/tiny/{what}", "pronghorn")
        assert found["tokens"] == 2 * 3 * 20
        assert 0 < found["mean_abs_logp"] < found["max"] < 1e-4, "float32 on the CPU"
        assert abs(found["kl"]) < 1e-9 and abs(found["kl_drawn"]) < 1e-9
        assert found["mean_abs_drawn"] < 1e-5 and 0 < found["unequal"] <= 1


def test_parity_sees_a_sampler_that_lags_behind(small, monkeypatch):
    """The weights move between rollout and scoring: every number must show it."""
    model, tokenizer = small
    honest = parity.trainers

    def after_a_step(*args: Any) -> Any:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.add_(torch.randn_like(p) * 0.02)
        return honest(*args)

    monkeypatch.setattr(parity, "trainers", after_a_step)
    results = Results("parity", (), "c")
    parity.measure(results, "tiny", model, tokenizer)
    found = metrics(results, "parity/nf4-lora/tiny/top-p", "pronghorn")
    assert found["mean_abs_logp"] > 0.005 and found["kl"] > 1e-5 and found["unequal"] > 0.99
    assert found["mean_abs_drawn"] > 0.005


PEER: dict[str, Any] = {
    "impl": "vllm", "quant": "nf4", "lora": 1, "load_s": 90.0, "used_gb": 80.0,
    "res": {
        "6": {"s": 3.2, "tok_s": 480, "ms_per_step": 12.5}, "64": {"s": 4.4, "tok_s": 3700, "ms_per_step": 17.2},
    },
}  # fmt: skip


def test_a_peers_log_becomes_rows(tmp_path: Path):
    log = tmp_path / "vllm.log"
    log.write_text("INFO x\nRESULT " + json.dumps(PEER) + "\n")
    results = Results("decode", ("vllm",), "c")
    decode.add_peers(results, peer_results([f"vllm-nf4={log}"]))
    assert metrics(results, "decode/nf4-lora/b6", "vllm-nf4") == {
        "ms_per_step": 12.5, "tokens_per_s": 480.0, "lora_rank": 1.0
    }  # fmt: skip
    assert metrics(results, "decode/nf4-lora/b64", "vllm-nf4")["ms_per_step"] == 17.2


def write(folder: Path, results: Results) -> None:
    (folder / "gpu").mkdir(exist_ok=True)
    rows = [vars(row) for row in results.rows]
    record = {"gpu": "G", "torch": "t", "triton": "t", "commit": "abc", "date": "2026-01-01", "peers": {"vllm": "1.0"}}
    (folder / "gpu" / f"{results.name}.json").write_text(json.dumps({**record, "rows": rows}))


def test_the_readmes_tables(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    assert readme.decode_table() == readme.parity_table() == readme.throughput_table() == []
    results = Results("decode", ("vllm",), "c")
    decode.add_peers(results, {"vllm-nf4": [PEER]})
    results.add("decode/nf4-lora/b6", "pronghorn", ms_per_step=3.217, tokens_per_s=1865.2, graph_ms=2.9)
    results.add("decode/bf16/b6", "pronghorn", ms_per_step=5.0, tokens_per_s=1200.0, graph_ms=4.6)
    results.add("decode/nf4-lora/memory", "pronghorn", weights_gb=5.6, kv_gb=16.0, sleep_ms=3.0, wake_ms=800.0)
    write(tmp_path, results)
    table = "\n".join(readme.decode_table())
    assert "| | batch 6 | batch 64 |" in table
    assert "| vLLM, NF4 | 12.50 (480) | 17.20 (3,700) |" in table
    assert "| **Pronghorn**, NF4 under a live adapter of rank 32 | 3.22 (1,865) |  |" in table
    assert "| **Pronghorn**, bf16 | 5.00 (1,200) |  |" in table and "vllm 1.0" in table
    older = Results("decode_16bit", ("vllm",), "c")
    for base, ms in (("nf4-lora", 7.0), ("bf16", 8.0), ("fp16", 9.0)):
        older.add(f"decode/{base}/b6", "pronghorn", ms_per_step=ms, tokens_per_s=600.0)
    write(tmp_path, older)
    second = "\n".join(readme.decode_table()).removeprefix(table)
    assert "| **Pronghorn**, fp16 | 9.00 (600) |" in second, "the newer run has none"
    assert "7.00" not in second and "8.00" not in second
    results.add("decode/fp16/b6", "pronghorn", ms_per_step=4.0, tokens_per_s=1500.0)
    write(tmp_path, results)
    assert "16 bits" not in "\n".join(readme.decode_table()), "no table without a row"
    results = Results("throughput", ("vllm",), "c")
    results.add("throughput/mixed/512x8", "vllm", tokens_per_s=9000.4, bits=16, lora_rank=0)
    results.add("throughput/mixed/512x8", "pronghorn", tokens_per_s=9500.0, bits=4, lora_rank=32)
    write(tmp_path, results)
    table = "\n".join(readme.throughput_table())
    assert "| 512x8 | vLLM | 16 bits | 9,000 |" in table
    assert "| 512x8 | **Pronghorn** | 4 bits, LoRA rank 32 | 9,500 |" in table
    results = Results("parity", (), "c")
    results.add("parity/nf4-lora/8b/plain", "pronghorn", mean_abs_logp=0, max=0, kl=0, unequal=0, tokens=4800)
    write(tmp_path, results)
    assert "| 8b/plain | 0 | 0 | 0 | 0.00% of 4,800 |" in "\n".join(readme.parity_table())
    results = Results("grpo", (), "c")
    results.add("grpo/blog", "pronghorn", s_per_step=1.0549, load_s=20.5, first_step_s=5.25, used_gb=7.9)
    write(tmp_path, results)
    assert "| **Pronghorn** | 1.05 | 20.5 | 5.2 | 25.8 | 7.9 |" in "\n".join(readme.flow_table(*readme.TABLES[0]))

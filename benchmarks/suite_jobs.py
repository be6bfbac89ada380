"""What ``benchmarks/suite.py`` runs of each topic: the peers' cases, ours, and which of them are run a second time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Peer:
    """One case of a peer's script.

    Attributes:
        name: what our JSON calls it.
        script: file in the folder of the peers' scripts.
        needs: distributions without which it is left out.
        options: its flags, ``--impl`` and the implementation first.
        timeout: seconds.
        anchor: the case that is run again at the end.
        long: only with ``--long``.
    """

    name: str
    script: str
    needs: tuple[str, ...]
    options: tuple[str, ...]
    timeout: float = 240
    anchor: bool = False
    long: bool = False


@dataclasses.dataclass(frozen=True)
class Topic:
    """One of Pronghorn's benchmarks and the peers beside it.

    Attributes:
        name: of ``--what``.
        module: ours, in ``benchmarks``.
        peers: in the order in which they run.
        options, long_options: ours, usually and with ``--long``.
        anchor: our options for the case that is run again; ``anchor_case`` is its name in the JSON and ``metric`` the
            number that is compared; ``read`` takes a peer's from its ``RESULT``.
        dataset: whether ours takes ``--dataset``.
        timeout: seconds for ours.
    """

    name: str
    module: str
    peers: tuple[Peer, ...]
    options: tuple[str, ...]
    long_options: tuple[str, ...]
    anchor: tuple[str, ...]
    anchor_case: str
    metric: str
    read: Callable[[dict[str, Any]], float]
    dataset: bool = False
    timeout: float = 300

    def peers_of(self, long: bool) -> list[Peer]:
        return [peer for peer in self.peers if long or not peer.long]

    def options_of(self, long: bool) -> tuple[str, ...]:
        return self.long_options if long else self.options


HF = ("transformers", "peft", "bitsandbytes")
UNSLOTH = ("unsloth",)


def _sft(
    name: str, needs: tuple[str, ...], shape: str = "2x2048", quant: str = "nf4", steps: int = 7, **more: Any
) -> Peer:
    """A step of a peer; the script leaves the first two out of its median."""
    batch, length = shape.split("x")
    options = ("--impl", name, "--quant", quant, "--bs", batch, "--seq", length, "--steps", str(steps))
    return Peer(name, "sft_step.py", needs, options, **more)


SFT = Topic(
    "sft",
    "sft",
    (
        _sft("hf", HF),
        _sft("unsloth", UNSLOTH, anchor=True),
        _sft("unsloth", UNSLOTH, "8x2048"),
        _sft("liger", (*HF, "liger-kernel"), long=True),
        _sft("unsloth", UNSLOTH, quant="bf16", long=True),
        _sft("hf", HF, quant="bf16", long=True),
        _sft("unsloth", UNSLOTH, "1x32768", steps=4, long=True, timeout=300),
        _sft("unsloth", UNSLOTH, "1x65536", steps=2, long=True, timeout=300),
    ),
    options=("--steps", "7", "--cases", "nf4/2x2048/memory,nf4/8x2048/memory,nf4/2x2048/off,nf4/8x2048/off"),
    long_options=(
        "--steps",
        "7",
        "--cases",
        "nf4/2x2048/memory,nf4/8x2048/memory,nf4/1x32768/memory/4,nf4/1x65536/memory/2,"
        "nf4/2x2048/off,nf4/8x2048/off,bf16/2x2048/memory,bf16/2x2048/off",
    ),
    anchor=("--steps", "7", "--cases", "nf4/2x2048/memory"),
    anchor_case="sft/nf4/2x2048/same-memory",
    metric="tokens_per_s",
    read=lambda result: float(result["tok_s"]),
)


def _grpo(name: str, needs: tuple[str, ...], *options: str, steps: int = 7, **more: Any) -> Peer:
    return Peer(name, "seed_flow.py", needs, ("--impl", *options, "--steps", str(steps)), **more)


def _seconds(result: dict[str, Any]) -> float:
    """Median of the steps after the second."""
    tail = sorted(result["step_s"][2:])
    return float(tail[len(tail) // 2])


GRPO = Topic(
    "grpo",
    "grpo",
    (
        _grpo("trl", ("trl", *HF), "trl", timeout=300),
        _grpo("unsloth", UNSLOTH, "unsloth", anchor=True),
        _grpo("unsloth-vllm", (*UNSLOTH, "vllm"), "unsloth", "--vllm", "1", long=True, timeout=360),
    ),
    options=("--steps", "10"),
    long_options=("--steps", "10"),
    anchor=("--steps", "7"),
    anchor_case="grpo/blog",
    metric="s_per_step",
    read=_seconds,
    dataset=True,
)


def _decode(name: str, impl: str, needs: tuple[str, ...], quant: str, batches: str, *more: str, **how: Any) -> Peer:
    options = ("--impl", impl, "--quant", quant, "--batches", batches, *more)
    return Peer(name, "gen_bench.py", needs, options, **how)


DECODE = Topic(
    "decode",
    "decode",
    (
        _decode("vllm-bf16", "vllm", ("vllm",), "bf16", "1,6,64,256", anchor=True),
        _decode("vllm-nf4", "vllm", ("vllm", "bitsandbytes"), "nf4", "1,6,64,256"),
        _decode("transformers-nf4", "hf", HF, "nf4", "6", long=True),
        _decode("unsloth-nf4", "unsloth", UNSLOTH, "nf4", "6", long=True),
    ),
    options=(),
    long_options=(),
    anchor=("--bases", "nf4-lora", "--batches", "6"),
    anchor_case="decode/nf4-lora/b6",
    metric="ms_per_step",
    read=lambda result: float(result["res"]["6"]["ms_per_step"]),
)

TOPICS = {topic.name: topic for topic in (SFT, DECODE, GRPO)}

"""Attention over spans of packed tokens, forward and backward: which path runs, and why.

- ``cudnn``: cuDNN's fused attention, about twice as fast as flash on Hopper; spans of one length only, since it builds
  a plan for every shape.
- ``flash``: FlashAttention-2 (arXiv:2307.08691) as torch ships it, spans of any length.
- ``cpu``: torch's fused attention for the CPU.
- ``reference``: plain PyTorch in chunks of queries, for whatever the others do not take.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch

from pronghorn.kernels import attention_cpu
from pronghorn.kernels.reference import attention as reference
from pronghorn.kernels.spans import Spans

CUDNN_TAKES_GROUPED_HEADS = True
"""Whether cuDNN reads K < H key/value heads as they are; else they are repeated for it and their gradients summed."""


class Path(Enum):
    """Who computes attention."""

    CUDNN = "cudnn"
    FLASH = "flash"
    CPU = "cpu"
    REFERENCE = "reference"


def worth_a_plan(length: int) -> bool:
    """Whether cuDNN gains on rows of ``length`` tokens: each new shape costs it 100 ms, so lengths must come again.

    Multiples of 128 are lengths that somebody chose. A length of chance may never come again; that it pays from 16,384
    tokens on is a guess: attention is about 40% of an 8B model's step of 1.3 s there, and a tenth of 0.3 s at 4,096. By
    length alone, so that a resumed run takes the paths of the uninterrupted one.
    """
    return length >= 16384 or (length >= 512 and length % 128 == 0)


class Choice(NamedTuple):
    """A path, and in words why it and not a faster one."""

    path: Path
    reason: str


def choose(
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
    head_dim: int,
    equal_causal_length: int | None,
    window: int | None = None,
    softcap: float | None = None,
    deterministic: bool = False,
) -> Choice:
    """The path for inputs of this kind; plain facts in, so that ``doctor`` and the log can ask too.

    Args:
        capability: of the GPU; None for the CPU.
        equal_causal_length: tokens of every row, if all rows have as many and see nothing else; None otherwise.
        deterministic: gradients must be the same in every run; cuDNN's are not, flash's are where torch is told so.

    Raises:
        ValueError: a softcap on a GPU.
    """
    if capability is None:
        if window is not None or softcap is not None:
            return Choice(Path.REFERENCE, f"window={window}, softcap={softcap} on the CPU")
        return Choice(Path.CPU, "tensors on the CPU")
    if softcap is not None:
        raise ValueError(
            f"softcap={softcap}: no attention kernel on the GPU caps its scores; run on the CPU, or without softcap"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        return Choice(Path.REFERENCE, f"{dtype}: the fused kernels take bfloat16 and float16")
    if capability < (8, 0):
        return Choice(Path.REFERENCE, f"compute capability {capability[0]}.{capability[1]}: flash needs 8.0")
    if head_dim > 256 or head_dim % 8:
        return Choice(Path.REFERENCE, f"head_dim={head_dim}: flash takes multiples of 8 up to 256")
    if head_dim > 192 and capability not in ((8, 0), (9, 0), (10, 0)):
        return Choice(Path.REFERENCE, f"head_dim={head_dim}: flash's backward needs 8.0, 9.0 or 10.0 above 192")
    if window is not None:
        return Choice(Path.FLASH, f"window={window}")
    if capability < (9, 0) or head_dim > 128:
        return Choice(Path.FLASH, f"head_dim={head_dim} on {capability[0]}.{capability[1]}: cuDNN is no faster")
    if equal_causal_length is None:
        return Choice(Path.FLASH, "rows of unequal length")
    if deterministic:
        return Choice(Path.FLASH, "deterministic kernels are asked for")
    if not worth_a_plan(equal_causal_length):
        return Choice(Path.FLASH, f"rows of {equal_causal_length} tokens: no cuDNN plan for a length of chance")
    return Choice(Path.CUDNN, "rows of one length on Hopper or newer")


def attention_forward(
    q_THE: torch.Tensor,
    k_UKE: torch.Tensor,
    v_UKE: torch.Tensor,
    spans: Spans,
    scale: float,
    path: Path,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(o_THE, lse)`` of T queries over U keys, H query heads sharing K kv heads (H divisible by K).

    ``lse`` is the log-sum-exp of each query's scores in nats, float32 (float64 for float64), ``[H, T]``; from cuDNN
    ``[B, H, S, 1]``.
    """
    if path is Path.REFERENCE:
        return reference.attention_forward(q_THE, k_UKE, v_UKE, spans, scale, softcap)
    if path is Path.CPU:
        return attention_cpu.attention_forward(q_THE, k_UKE, v_UKE, spans, scale)
    from pronghorn.kernels import attention_cuda

    run = attention_cuda.cudnn_forward if path is Path.CUDNN else attention_cuda.flash_forward
    return run(q_THE, k_UKE, v_UKE, spans, scale)


def attention_backward(
    do_THE: torch.Tensor,
    q_THE: torch.Tensor,
    k_UKE: torch.Tensor,
    v_UKE: torch.Tensor,
    o_THE: torch.Tensor,
    lse: torch.Tensor,
    spans: Spans,
    scale: float,
    path: Path,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``(dq_THE, dk_UKE, dv_UKE)`` in the inputs' dtypes.

    ``o`` and ``lse`` may be those of a softmax over more keys than ``spans`` hold: the result is then these keys' share
    of dq, and their whole dk and dv (see :mod:`pronghorn.kernels.shared_prefix`).
    """
    if path is Path.REFERENCE:
        return reference.attention_backward(do_THE, q_THE, k_UKE, v_UKE, o_THE, lse, spans, scale, softcap)
    if path is Path.CPU:
        return attention_cpu.attention_backward(do_THE, q_THE, k_UKE, v_UKE, o_THE, lse, spans, scale)
    from pronghorn.kernels import attention_cuda

    run = attention_cuda.cudnn_backward if path is Path.CUDNN else attention_cuda.flash_backward
    return run(do_THE, q_THE, k_UKE, v_UKE, o_THE, lse, spans, scale)

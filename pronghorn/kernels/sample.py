r"""One sampling step: from raw logits to the next token of each row, its log-probabilities, and a row's bookkeeping.

With raw logits x (a head's product), the policy is :math:`\operatorname{softmax}(z)`,
:math:`z = \operatorname{cap}(s (x + b)) / \tau` (``logits.py``). What is drawn from is z after, in vLLM's order, a
minimum length (stop ids are forbidden), repetition penalty (Keskar et al. 2019, arXiv:1909.05858), frequency and
presence penalties (:math:`(f n_v + p [n_v > 0]) / \tau` less for a token v drawn n_v times), min-p
(arXiv:2407.01082), top-k and top-p (Holtzman et al. 2020, arXiv:1904.09751; equal logits stay together, and the token
that crosses p stays). The draw inverts the cumulative distribution, in the order of ids, at a uniform number that
SplitMix64 makes from the row's key and count alone (Steele, Lea and Flood 2014, doi:10.1145/2714064.2660195).

On a GPU nothing is decided on the host: two kernels read and write the tensors of a :class:`SampleState`, so a CUDA
graph captured over the call serves every step while rows come and go. A row's probabilities are whole numbers of 2^-40
of its likeliest token's, so that their sums, and with them the draw and the log-probability, have the same bits in any
batch. The policy's log-probability has the bits of :func:`pronghorn.kernels.logits.logit_stats_`.
"""

from __future__ import annotations

from types import ModuleType

import torch

from pronghorn.kernels.reference import sample as reference
from pronghorn.kernels.sample_state import SampleState, Variant


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; Triton is imported only where it is used."""
    if not tensor.is_cuda:
        return reference
    from pronghorn.kernels import sample_triton

    return sample_triton


def sample_step(
    x_NV: torch.Tensor,
    state: SampleState,
    variant: Variant,
    rows_N: torch.Tensor | None = None,
    bias_V: torch.Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Draw one token for each row that runs, and count it in. Nothing is returned: see :class:`SampleState`.

    A row that runs gets its token in ``tokens_B`` and, with both log-probabilities, at its count in the outputs; its
    count, position, slot and length go up by one. If it ends with this token, ``finished_B`` says why, ``slots_B`` is
    -1 and ``lengths_B`` 0 (padding for the cache), and from then on nothing of it changes, whatever its logits. Logits
    without a distribution (a NaN, +inf, or all forbidden) end it too: -1 and NaN are recorded, ``tokens_B`` stays.

    Args:
        x_NV: float32, contiguous: the head's product, no bias, scale or softcap applied yet. Only read.
        state: the rows.
        variant: what the batch needs, :meth:`Variant.of`. A row that asks for more gets the variant's.
        rows_N: int32, the state's row of each row of logits, none twice; one below 0 is left out. None: row n is n.
        bias_V, scale, softcap: see :func:`pronghorn.kernels.logits.logit_stats_`, whose arguments they are.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    N, V = x_NV.shape
    if x_NV.dtype != torch.float32 or not x_NV.is_contiguous():
        raise ValueError(f"logits are {x_NV.dtype} with strides {x_NV.stride()}; give dense float32 rows")
    if state.vocab != V or state.rows < N:
        raise ValueError(f"logits of shape {(N, V)} do not fit a state of {state.rows} rows of {state.vocab} tokens")
    if rows_N is not None and (rows_N.shape != (N,) or rows_N.dtype != torch.int32):
        raise ValueError(f"rows are {rows_N.dtype} of shape {tuple(rows_N.shape)}; give int32 of shape [{N}]")
    if bias_V is not None and bias_V.shape != (V,):
        raise ValueError(f"bias has shape {tuple(bias_V.shape)}; logits of {V} tokens need [{V}]")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} bounds nothing; give a positive number, or None for no bound")
    if variant.penalised and not state.seen_BW.shape[1]:
        raise ValueError("the variant is penalised and the state has no room for what was seen; penalties=True")
    if variant.tallied and not state.tally_BV.shape[1]:
        raise ValueError("the variant is tallied and the state has no room to count what was drawn; tallies=True")
    _path(x_NV).sample_step(x_NV, state, variant, rows_N, bias_V, scale, softcap)

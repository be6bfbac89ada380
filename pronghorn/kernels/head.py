"""The output head over many rows, one chunk of logits at a time: what a loss on it needs, gradients included.

Each chunk's logits are made by one product, read and overwritten by their gradient in one kernel (``logits.py``), and
turned by a second product into the gradient of the hidden states, by a third into that of the head's weight where it
trains. Peak memory is the results and one chunk, ``4 * chunk * (V + D)`` bytes: 256 MiB by default, and a little. Where
the head trains, every chunk reads and writes that float32 gradient whole, so there a chunk's logits may take a quarter
of its size: fewer chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from pronghorn.kernels.logits import logit_stats_

CHUNK_ELEMENTS = 1 << 26
"""Logits alive at once (rows x V), if that is 128 rows or more: 256 MiB in float32."""

ORDERED_ROWS = 64
"""Rows from which on cuBLAS sums the head's products in order (measured on an H200)."""

_TILE = 128  # rows of a matrix product's tile: a part of one costs as much as all of it


def chunk_rows(N: int, V: int, trained: int = 0) -> int:
    """Rows whose logits exist at once: a multiple of 128, of about :data:`CHUNK_ELEMENTS` logits; N at most.

    ``trained``: D where the weight ``[V, D]`` trains; then up to D / 4 rows, a quarter of its gradient's size.
    """
    return max(1, min(N, max(CHUNK_ELEMENTS // V // _TILE, trained // 4 // _TILE, 1) * _TILE))


def head_logits(hidden_ND: torch.Tensor, weight_VD: torch.Tensor, bias_V: torch.Tensor | None) -> torch.Tensor:
    """``hidden @ weight^T + bias``, ``[N, V]`` in float32 (float64 for float64), not rounded to 16 bits on the way.

    A bfloat16 logit of 8 is off by up to 0.016, and so would be every log-probability; a GPU's matrix product hands out
    its float32 accumulator as it is. Trainer and sampler both come through here: few rows are multiplied as 64, from
    which on cuBLAS sums in one order, so that a logit has the same bits however many there are.
    """
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    rows = hidden_ND.shape[0]
    if hidden_ND.is_cuda and 0 < rows < ORDERED_ROWS:
        padded = hidden_ND.new_zeros(ORDERED_ROWS, hidden_ND.shape[1])
        padded[:rows] = hidden_ND
        return head_logits(padded, weight_VD, bias_V)[:rows]
    if hidden_ND.is_cuda and hidden_ND.dtype != dtype:
        z_NV = torch.mm(hidden_ND, weight_VD.to(hidden_ND.dtype).T, out_dtype=dtype)
    else:
        z_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype)).to(dtype)
    return z_NV if bias_V is None else z_NV.add_(bias_V.to(dtype))


class Gradients(NamedTuple):
    """Which gradients are to be made."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False


class HeadResult(NamedTuple):
    """What the walk over a head's rows gives; None where it was not asked for.

    The log-probabilities and entropies are float32 (float64 for float64). Row n of ``hidden_ND`` is the gradient of
    ``weights_n * logp_n`` (plus ``entropy_weights_n * H_n``), times the factor that was given, in the hidden states'
    dtype; ``weight_VD`` and ``bias_V``, gradients of the sum over n without that factor, are float32 or float64.
    """

    logps_N: torch.Tensor
    entropy_N: torch.Tensor | None
    hidden_ND: torch.Tensor | None
    weight_VD: torch.Tensor | None
    bias_V: torch.Tensor | None


def check_head(
    hidden_ND: torch.Tensor, weight_VD: torch.Tensor, targets_N: torch.Tensor, chunk: int | None, trains: bool
) -> int:
    """Rows of a chunk; ``trains``: the weight's gradient is wanted.

    Raises:
        ValueError: the shapes do not fit, or ``chunk`` is below 1.
    """
    if hidden_ND.dim() != 2 or targets_N.shape != hidden_ND.shape[:1] or weight_VD.shape[1:] != hidden_ND.shape[1:]:
        raise ValueError(
            f"shapes do not fit: hidden {tuple(hidden_ND.shape)}, weight {tuple(weight_VD.shape)}, "
            f"targets {tuple(targets_N.shape)}; expected [N, D], [V, D], [N]"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk={chunk} rows hold no logits; give 1 or more, or None for the default")
    return chunk_rows(hidden_ND.shape[0], weight_VD.shape[0], weight_VD.shape[1] * trains) if chunk is None else chunk


def walk(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None,
    weights_N: torch.Tensor | None,
    chunk: int,
    wanted: Gradients,
    factor: torch.Tensor | None = None,
    *,
    scale: float,
    softcap: float | None,
    temperature: float = 1.0,
    ignore_index: int | None = None,
    with_entropy: bool = False,
    entropy_weights_N: torch.Tensor | None = None,
) -> HeadResult:
    """Log-probabilities of ``targets_N``, and the gradients of the sum of ``weights_N`` times them. No autograd.

    With ``entropy_weights_N`` the sum of these times the entropies is added. ``factor`` (0-d, where the hidden states
    are) multiplies their gradients before these are rounded. The others are those of
    :func:`pronghorn.kernels.logits.logit_stats_`, for all rows.
    """
    dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
    weight_VD = weight_VD.to(hidden_ND.dtype)
    N = hidden_ND.shape[0]
    logps_N = hidden_ND.new_empty(N, dtype=dtype)
    entropy_N = torch.empty_like(logps_N) if with_entropy else None
    gradient_ND = torch.empty_like(hidden_ND, memory_format=torch.contiguous_format) if wanted.hidden else None
    gradient_VD = torch.zeros_like(weight_VD, dtype=dtype) if wanted.weight else None
    gradient_V = torch.zeros_like(bias_V, dtype=dtype) if wanted.bias and bias_V is not None else None

    def one_chunk(rows: slice) -> None:  # what it holds is free before the next one is made
        x_CV = head_logits(hidden_ND[rows], weight_VD, None)
        logps_C, entropy_C, d_CV = logit_stats_(
            x_CV,
            targets_N[rows],
            bias_V,
            None if weights_N is None else weights_N[rows],
            scale=scale,
            softcap=softcap,
            temperature=temperature,
            ignore_index=ignore_index,
            with_entropy=with_entropy,
            gradient=hidden_ND.dtype if any(wanted) else None,
            entropy_weights_C=None if entropy_weights_N is None else entropy_weights_N[rows],
        )
        logps_N[rows] = logps_C
        if entropy_N is not None and entropy_C is not None:
            entropy_N[rows] = entropy_C
        if d_CV is None:
            return
        if gradient_ND is not None:
            _product_into(gradient_ND[rows], d_CV, weight_VD, factor)
        if gradient_VD is not None:
            _add_product(gradient_VD, d_CV.T, hidden_ND[rows])
        if gradient_V is not None:
            gradient_V.add_(d_CV.sum(0, dtype=dtype))

    for start in range(0, N, chunk):
        one_chunk(slice(start, start + chunk))
    return HeadResult(logps_N, entropy_N, gradient_ND, gradient_VD, gradient_V)


def _product_into(out_CD: torch.Tensor, a_CV: torch.Tensor, b_VD: torch.Tensor, factor: torch.Tensor | None) -> None:
    """``out_CD = factor * (a_CV @ b_VD)``, rounded once on a GPU."""
    if factor is None:
        torch.mm(a_CV, b_VD, out=out_CD)
        return
    wide = a_CV.is_cuda and a_CV.dtype != factor.dtype
    product_CD = torch.mm(a_CV, b_VD, out_dtype=factor.dtype) if wide else a_CV @ b_VD
    # [1], not 0-d: a 0-d factor would be rounded to a 16-bit product's dtype before it multiplies.
    torch.mul(product_CD, factor.reshape(1), out=out_CD)


def _add_product(sum_VD: torch.Tensor, a_VC: torch.Tensor, b_CD: torch.Tensor) -> None:
    """``sum_VD += a_VC @ b_CD``, 16-bit factors and a float32 sum without a float32 product beside it on a GPU."""
    if a_VC.dtype == sum_VD.dtype:
        sum_VD.addmm_(a_VC, b_CD)
    elif a_VC.is_cuda:
        torch.addmm(sum_VD, a_VC, b_CD, out_dtype=sum_VD.dtype, out=sum_VD)
    else:
        sum_VD.addmm_(a_VC.to(sum_VD.dtype), b_CD.to(sum_VD.dtype))


def unit_weights(*weights_N: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """``(*(w / unit for w in weights_N), unit)``, ``unit`` the largest magnitude (1 if all are 0), 0-d, on the device.

    A gradient that is rounded to float16 after its row's weight came in keeps its bits, however small the weights are.
    """
    if not len(weights_N[0]):
        return *weights_N, weights_N[0].new_ones(())
    unit = torch.stack([w.abs().amax() for w in weights_N]).amax()
    unit = unit.masked_fill(unit == 0, 1)
    return *(w / unit for w in weights_N), unit

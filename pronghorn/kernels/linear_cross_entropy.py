r"""Cross-entropy straight from hidden states: one walk over the head's chunks gives the loss and all its gradients.

.. math:: L = - \frac1M \sum_n w_n \log p_n(t_n), \qquad p_n = \operatorname{softmax}(\operatorname{cap}(s (W h_n + b)))

over rows whose target is not ``ignore_index``; M, the denominator, is the caller's: tokens of a whole optimizer step,
say, of which this is one micro-batch. With :math:`G_n = w_n \, \partial \log p_n / \partial (W h_n + b)`, which the
forward pass makes over the chunk's logits (``logits.py``), :math:`dh_n = -\frac gM G_n W`, :math:`dW = -\frac gM \sum_n
G_n h_n^T` and :math:`db = -\frac gM \sum_n G_n`: the incoming gradient g is a factor, so the products are done in the
forward pass too, and backward scales their results in place. No logits are computed twice.

Rounding to 16 bits: the weights go into G divided by their largest, so that equal ones are 1. With that largest over M
as :math:`f \, 2^e`, :math:`1/2 \le f < 1`, each :math:`dh_n` is rounded with f in it, and multiplied by :math:`-g 2^e`,
which rounds nothing more where g is a power of two, as 1 and a loss scaler's factors are. (1/M within G would be worse:
at the target G is close to 1, which 16 bits hold, and to 1/M they would be off by as much in every row.) And float16
sees numbers of its own size until g is there. :math:`dW` and db are float32 sums, scaled before they are rounded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pronghorn.kernels.head import Gradients, HeadResult, check_head, unit_weights, walk


def linear_cross_entropy(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    denominator: int | float | torch.Tensor,
    *,
    bias_V: torch.Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    weights_N: torch.Tensor | None = None,
    ignore_index: int = -100,
    chunk: int | None = None,
) -> torch.Tensor:
    """Sum over rows of ``weights_N`` times the negative log-probability of the target, over ``denominator``.

    Nothing waits for the GPU. Beside the loss, forward keeps the gradients: one ``[N, D]`` in the hidden states' dtype
    where those need it, and ``[V, D]`` in float32 where the head trains. While it runs, one chunk of logits in float32
    exists beside them (:func:`pronghorn.kernels.head.chunk_rows`: by default 256 MiB, or a quarter of the head's
    gradient where it trains and that is more).

    Args:
        hidden_ND: hidden states that predict the targets, in the compute dtype.
        weight_VD: output projection. Gradients flow to it, and to ``bias_V``, where they require it.
        targets_N: int64 token ids in [0, V), or ``ignore_index``. Any other raises on a CPU; on a GPU, which is not
            waited for, it makes the loss NaN.
        denominator: a number, or a 0-d tensor (on the GPU, too) that gets no gradient.
        bias_V: added to the products.
        softcap: bound of the logits (Gemma 2), None for none.
        scale: multiplies the logits before the softcap.
        weights_N: of each row; 1 by default. They get no gradient.
        ignore_index: rows with this target count for nothing, whatever they hold.
        chunk: rows whose logits exist at once; by default :func:`pronghorn.kernels.head.chunk_rows`.

    Returns:
        The loss, 0-d: float32 (float64 for float64 input). Its backward runs once.

    Raises:
        ValueError: the shapes do not fit, or ``softcap`` is not positive.
        RuntimeError: backward through the same loss a second time.
    """
    differentiable = torch.is_grad_enabled()
    wanted = Gradients(*(differentiable and t is not None and t.requires_grad for t in (hidden_ND, weight_VD, bias_V)))
    chunk = check_head(hidden_ND, weight_VD, targets_N, chunk, wanted.weight)
    if weights_N is not None and weights_N.shape != targets_N.shape:
        raise ValueError(f"weights have shape {tuple(weights_N.shape)}; targets {tuple(targets_N.shape)} need the same")
    if isinstance(denominator, torch.Tensor) and denominator.numel() != 1:
        raise ValueError(f"denominator has shape {tuple(denominator.shape)}; give a number or a 0-d tensor")
    loss: torch.Tensor = _LinearCrossEntropy.apply(
        hidden_ND, weight_VD, bias_V, targets_N, weights_N, denominator, wanted,
        {"softcap": softcap, "scale": scale, "ignore_index": ignore_index, "chunk": chunk},
    )  # fmt: skip
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """Keeps no input: the gradients of forward are all that backward needs, and they are given away by it."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        weights_N: torch.Tensor | None,
        denominator: int | float | torch.Tensor,
        wanted: Gradients,
        settings: dict[str, Any],
    ) -> torch.Tensor:
        dtype = torch.promote_types(hidden_ND.dtype, torch.float32)
        unit, factors_N = torch.ones((), dtype=dtype, device=hidden_ND.device), None
        if weights_N is not None:
            counted_N = weights_N.detach().to(dtype).masked_fill(targets_N == settings["ignore_index"], 0)
            factors_N, unit = unit_weights(counted_N)
        if isinstance(denominator, torch.Tensor):
            denominator = denominator.detach().reshape(())
        total = (unit / denominator).to(dtype)
        mantissa, _ = torch.frexp(total)
        made = walk(
            hidden_ND, weight_VD, targets_N, bias_V, factors_N, wanted=wanted, factor=mantissa, **settings
        )  # fmt: skip
        ctx.made, ctx.total, ctx.power_of_two = made, total, total / mantissa
        ctx.dtypes = (weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        return -(made.logps_N if factors_N is None else made.logps_N * factors_N).sum() * total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.made is None:
            raise RuntimeError(
                "backward through this linear_cross_entropy ran before: its gradients, made in the forward pass, were "
                "given away. Call it again for a second backward pass (retain_graph does not reach here)"
            )
        made: HeadResult = ctx.made
        ctx.made = None
        # [1], not 0-d: a 0-d factor would be rounded to the 16-bit tensor's dtype before it multiplies.
        rest, all_of_it = (-g * ctx.power_of_two).reshape(1), (-g * ctx.total).reshape(1)
        weight_dtype, bias_dtype = ctx.dtypes
        hidden_grad = None if made.hidden_ND is None else made.hidden_ND.mul_(rest)
        weight_grad = None if made.weight_VD is None else made.weight_VD.mul_(all_of_it).to(weight_dtype)
        bias_grad = None if made.bias_V is None else made.bias_V.mul_(all_of_it).to(bias_dtype)
        return hidden_grad, weight_grad, bias_grad, None, None, None, None, None

"""Log-probabilities of chosen tokens straight from hidden states: logits exist one chunk of rows at a time.

With ``z = softcap(scale * (h W^T + b)) / temperature`` (``softcap(x) = c tanh(x / c)``), the log-probability of token
``t`` is ``z_t - logsumexp(z)``, and its gradient to ``h`` needs only ``W_t - softmax(z) W`` (times the slope of the
softcap): that row of D numbers is made in the forward pass, while the chunk's logits are at hand (``head.py``), so
backward to ``h`` is a product of ``[N, D]`` by ``[N]``. Only a head that trains has its logits computed again: its
gradient needs those of the log-probabilities first.

An entropy that is part of the loss has a gradient of its own, ``-p (log p + H)`` to ``z`` (``logits.py``). Two rows of
D numbers for each token would cost a third product beside the two of the forward pass; instead the logits are made anew
in the backward pass, where both upstream gradients are known and their sum takes one product: three products as well,
and only the hidden states are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from pronghorn.kernels.head import Gradients, check_head, unit_weights, walk


def chosen_logprobs(
    hidden_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_N: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    chunk: int | None = None,
    with_entropy: bool = False,
    entropy_gradient: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Log-probability of ``targets_N`` under the head's distribution, with gradient.

    Args:
        hidden_ND: hidden states that predict the targets, in the compute dtype.
        weight_VD: output projection. Gradients flow to it, and to ``bias_V``, where they require it.
        targets_N: int64 token ids in [0, V). One outside raises on a CPU, and gives NaN on a GPU, which is not
            waited for.
        bias_V: added to the products.
        temperature: divides the logits, as the sampler's does.
        softcap: bound of the logits (Gemma 2), None for none.
        scale: multiplies the logits before the softcap.
        chunk: rows whose logits exist at once; by default :func:`pronghorn.kernels.head.chunk_rows`.
        with_entropy: also return the entropy of each distribution.
        entropy_gradient: also let gradients flow through the entropies, at the price of the logits once more.

    Returns:
        ``(logps_N, entropy_N)`` in nats: float32 (float64 for float64 input); ``entropy_N`` is None unless asked for,
        and carries no gradient unless ``entropy_gradient``.

    Raises:
        ValueError: ``temperature`` or ``softcap`` is not positive, or the shapes do not fit.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} cannot divide logits; give a positive number (1.0 for greedy)")
    chunk = check_head(hidden_ND, weight_VD, targets_N, chunk, weight_VD.requires_grad and torch.is_grad_enabled())
    if entropy_gradient and with_entropy:
        both: tuple[torch.Tensor, torch.Tensor] = _ChosenLogprobsEntropy.apply(
            hidden_ND, weight_VD, targets_N, bias_V, temperature, softcap, scale, chunk
        )
        return both
    logps_N, entropy_N = _ChosenLogprobs.apply(
        hidden_ND, weight_VD, targets_N, bias_V, temperature, softcap, scale, chunk, with_entropy,
        hidden_ND.requires_grad and torch.is_grad_enabled(),
    )  # fmt: skip
    return logps_N, entropy_N if with_entropy else None


class _ChosenLogprobs(torch.autograd.Function):
    """See the module's docstring; ``U_ND`` below is the gradient of each log-probability to its hidden state."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        bias_V: torch.Tensor | None,
        temperature: float,
        softcap: float | None,
        scale: float,
        chunk: int,
        with_entropy: bool,
        with_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.settings = {"temperature": temperature, "softcap": softcap, "scale": scale}
        ctx.chunk = chunk
        logps_N, entropy_N, U_ND, _, _ = walk(
            hidden_ND, weight_VD, targets_N, bias_V, None, chunk, Gradients(hidden=with_gradient),
            with_entropy=with_entropy, **ctx.settings,
        )  # fmt: skip
        if entropy_N is None:
            entropy_N = logps_N.new_empty(0)
        ctx.mark_non_differentiable(entropy_N)
        trains_head = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(U_ND, *((hidden_ND, weight_VD, targets_N, bias_V) if trains_head else ()))
        return logps_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        U_ND, *head = ctx.saved_tensors
        hidden_grad = weight_grad = bias_grad = None
        if U_ND is not None:  # multiplied in g's float32 and rounded once, with no wide copy in between
            hidden_grad = torch.mul(U_ND, g_N.unsqueeze(1), out=torch.empty_like(U_ND))
        if head:
            hidden_ND, weight_VD, targets_N, bias_V = head
            wanted = Gradients(weight=ctx.needs_input_grad[1], bias=ctx.needs_input_grad[3])
            weights_N, unit = unit_weights(g_N)
            made = walk(hidden_ND, weight_VD, targets_N, bias_V, weights_N, ctx.chunk, wanted, **ctx.settings)
            if made.weight_VD is not None:
                weight_grad = made.weight_VD.mul_(unit).to(weight_VD.dtype)
            if made.bias_V is not None and bias_V is not None:
                bias_grad = made.bias_V.mul_(unit).to(bias_V.dtype)
        return hidden_grad, weight_grad, None, bias_grad, None, None, None, None, None, None


class _ChosenLogprobsEntropy(torch.autograd.Function):
    """Log-probabilities and entropies, both with gradient; the logits are made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        targets_N: torch.Tensor,
        bias_V: torch.Tensor | None,
        temperature: float,
        softcap: float | None,
        scale: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.settings = {"temperature": temperature, "softcap": softcap, "scale": scale, "with_entropy": True}
        ctx.chunk = chunk
        made = walk(hidden_ND, weight_VD, targets_N, bias_V, None, chunk, Gradients(), **ctx.settings)
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, bias_V)
        assert made.entropy_N is not None
        return made.logps_N, made.entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_N: torch.Tensor, entropy_g_N: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N, bias_V = ctx.saved_tensors
        wanted = Gradients(ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3])
        weights_N, entropy_weights_N, unit = unit_weights(g_N, entropy_g_N)
        made = walk(
            hidden_ND, weight_VD, targets_N, bias_V, weights_N, ctx.chunk, wanted, unit,
            entropy_weights_N=entropy_weights_N, **ctx.settings,
        )  # fmt: skip
        weight_grad = bias_grad = None
        if made.weight_VD is not None:
            weight_grad = made.weight_VD.mul_(unit).to(weight_VD.dtype)
        if made.bias_V is not None and bias_V is not None:
            bias_grad = made.bias_V.mul_(unit).to(bias_V.dtype)
        return made.hidden_ND, weight_grad, None, bias_grad, None, None, None, None

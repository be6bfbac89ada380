r"""What a chunk of logits is needed for: log-probabilities of the targets, entropies, and the gradient, in two sweeps.

A head's raw product ``x`` (``[C, V]``, no bias yet) becomes the logits of the distribution

.. math:: z = \operatorname{cap}(s (x + b)) / \tau, \qquad \operatorname{cap}(u) = c \tanh(u / c)

(c the softcap, Gemma 2, arXiv:2408.00118; s the scale; :math:`\tau` the temperature). With :math:`m = \max_v z_v`,
:math:`S = \sum_v e^{z_v - m}` and :math:`p_v = e^{z_v - m} / S`,

.. math::
    \log p_t = (z_t - m) - \log S, \qquad H = \log S - \frac1S \sum_v (z_v - m) e^{z_v - m}, \qquad
    \frac{\partial \log p_t}{\partial x_v} = ([v = t] - p_v) (1 - \tanh^2(u_v / c)) \, s / \tau .

The entropy :math:`H = -\sum_v p_v \log p_v` has a gradient of its own:

.. math::
    \frac{\partial \log p_v}{\partial z_i} = [v = i] - p_i, \qquad
    \frac{\partial p_v}{\partial z_i} = p_v ([v = i] - p_i), \\
    \frac{\partial H}{\partial z_i} = -\sum_v p_v ([v = i] - p_i) \log p_v - \sum_v p_v ([v = i] - p_i)
        = -p_i (\log p_i + H) ,

as the second sum is :math:`p_i - p_i = 0`; to :math:`x_i` it takes the same slope as above. H is known after the first
sweep, so the second one writes the weighted sum of both gradients.

The first sweep over a row gathers m, S and the sum in H (Milakov and Gimelshein, arXiv:1805.02867: one pass, rescaled
as the maximum grows), the second writes the gradient, rounded to the dtype in which the next product takes it, over the
logits: no second ``[C, V]`` exists.
"""

from __future__ import annotations

from types import ModuleType

import torch

from pronghorn.kernels.reference import logits as reference

Stats = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _path(tensor: torch.Tensor) -> ModuleType:
    """The module that does the work for ``tensor``; float64, which nobody trains in, is plain PyTorch's everywhere."""
    if not tensor.is_cuda or tensor.dtype == torch.float64:
        return reference
    from pronghorn.kernels import logits_triton

    return logits_triton


def logit_stats_(
    x_CV: torch.Tensor,
    targets_C: torch.Tensor,
    bias_V: torch.Tensor | None = None,
    weights_C: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int | None = None,
    with_entropy: bool = False,
    gradient: torch.dtype | None = None,
    entropy_weights_C: torch.Tensor | None = None,
) -> Stats:
    """Log-probabilities of ``targets_C``, entropies and gradients from raw products of a head. No autograd.

    Args:
        x_CV: float32 or float64, dense; given up to this function, which may write over it where a gradient is asked.
        targets_C: int64. One outside [0, V) that is not ``ignore_index`` is a caller's error, which a GPU cannot raise
            without waiting for it: its row's log-probability and gradient are NaN. On a CPU it raises.
        bias_V: added first.
        weights_C: multiplies each row's gradient, before it is rounded; any stride.
        scale, softcap, temperature: see the module's docstring.
        ignore_index: rows with this target get log-probability 0 and gradient 0, whatever their logits.
        with_entropy: also give the entropy of each row's distribution.
        gradient: dtype of the gradient; None for no gradient.
        entropy_weights_C: adds each row's gradient of the entropy, times this weight; any stride. Needs
            ``with_entropy``, and cannot go with ``ignore_index``.

    Returns:
        ``(logps_C, entropy_C, gradient_CV)`` in nats and in the dtype of ``x_CV``; ``gradient_CV``, of each row's
        log-probability (and entropy) to its raw products, in the dtype asked for, and on a GPU a view of ``x_CV``'s
        memory with row stride 2V where that is a 16-bit one. What was not asked for is None.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    C, V = x_CV.shape
    if x_CV.dtype not in (torch.float32, torch.float64) or not x_CV.is_contiguous():
        raise ValueError(f"x is {x_CV.dtype} with strides {x_CV.stride()}; give dense float32 or float64 rows")
    given = (
        ("targets", targets_C, C), ("weights", weights_C, C), ("bias", bias_V, V),
        ("entropy_weights", entropy_weights_C, C),
    )  # fmt: skip
    for name, tensor, size in given:
        if tensor is not None and tensor.shape != (size,):
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; x of shape {(C, V)} needs [{size}]")
    if targets_C.dtype != torch.int64:
        raise ValueError(f"targets are {targets_C.dtype}; give int64 token ids")
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} cannot divide logits; give a positive number (1.0 for greedy)")
    if softcap is not None and softcap <= 0:
        raise ValueError(f"softcap={softcap} bounds nothing; give a positive number, or None for no bound")
    if entropy_weights_C is not None and (not with_entropy or ignore_index is not None):
        raise ValueError(
            f"entropy_weights with with_entropy={with_entropy} and ignore_index={ignore_index}; give True and None"
        )
    stats: Stats = _path(x_CV).logit_stats_(
        x_CV, targets_C, bias_V, weights_C, scale, softcap, temperature, ignore_index, with_entropy, gradient,
        entropy_weights_C,
    )  # fmt: skip
    return stats

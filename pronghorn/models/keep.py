"""What a decoder layer keeps between its forward and its backward."""

from __future__ import annotations

import enum


class Keep(enum.Enum):
    """Besides the layer's input ``[T, D]``, which every level keeps.

    INPUT: nothing; everything but the last projection is computed again.
    CORE: the attention core's output and its statistics; projections are computed again, the attention core is not.
    ATTENTION: those, q, k, v and the middle of the residual stream; only gate and up are computed again.
    ALL: those and gate and up; only norms and element-wise products are computed again.
    """

    INPUT = "input"
    CORE = "core"
    ATTENTION = "attention"
    ALL = "all"

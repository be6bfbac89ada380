"""One projection as the fused path reads it: base weight, LoRA matrices and scale, or why it cannot be fused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ..quant.linear4bit import Linear4bit
from ..quant.nf4 import NF4Tensor
from .layer import LoraLinear

_CAPTURE = "transformers.utils.output_capturing"
_OWN = "pronghorn."


@dataclass(frozen=True)
class Projection:
    """``y = x W^T + bias + scaling * (x A^T) B^T``; reads the parameters of the modules it stands for, owns none.

    Attributes:
        base: holds W ``[O, I]``, in 16 or 32 bits or as ``Linear4bit``, and the bias.
        a_rI, b_Or: the float32 masters, or None without an active adapter.
        scaling: ``alpha / r`` (``alpha / sqrt(r)`` with rsLoRA).
    """

    base: nn.Linear
    a_rI: nn.Parameter | None = None
    b_Or: nn.Parameter | None = None
    scaling: float = 1.0

    @cached_property
    def nf4(self) -> NF4Tensor | None:
        """The base's weight in 4 bits, where it is."""
        return self.base.nf4 if isinstance(self.base, Linear4bit) else None

    @property
    def key(self) -> tuple[object, ...]:
        """What this projection is made of, now; as long as it does not change, everything made of it holds.

        Parameters count with their memory: ``.to()``, ``.data =`` and ``vector_to_parameters`` give them another.
        """
        weight, a, b = self.base.weight, self.a_rI, self.b_Or
        memory = (weight.data_ptr(), 0 if a is None else a.data_ptr(), 0 if b is None else b.data_ptr())
        parts = (self.base, weight, getattr(self.base, "scales", None), a, b)
        return (*(id(part) for part in parts), *memory, self.scaling)

    @property
    def rank(self) -> int:
        return 0 if self.a_rI is None else self.a_rI.shape[0]

    @cached_property
    def _writers(self) -> dict[tuple[torch.dtype, int, int], Callable[..., None]]:
        """What writes the 4-bit weight into tables, by their dtype, their width and the place of B."""
        return {}

    def write(self, table_OK: torch.Tensor, b_Or: torch.Tensor | None = None, start: int = 0) -> None:
        """The 4-bit weight into ``table_OK``; if that is wider, ``s B`` from column I + ``start`` on, between zeros."""
        key = table_OK.dtype, table_OK.shape[1], start
        writer = self._writers.get(key)
        if writer is None:
            assert self.nf4 is not None
            writer = self._writers[key] = self.nf4.writer(*key, self.scaling)
        writer(table_OK, b_Or)

    def weight(self, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
        """W ``[O, I]`` in ``dtype``: the parameter itself, or the 4-bit codes dequantized (into ``out`` if given)."""
        if self.nf4 is not None:
            return self.nf4.dequantize(dtype, out)
        return self.base.weight if self.base.weight.dtype == dtype else self.base.weight.to(dtype)


@dataclass(frozen=True)
class Group:
    """Projections that read one input, their adapters rounded to the compute dtype; outputs lie side by side.

    Attributes:
        members: the projections.
        a_RI: the A of all of them, one under another, ``[R, I]``; None where none has an adapter.
        bs_Or: the B of each, or None.
        spans: where each projection's rank lies among the R rows of ``a_RI``.
        columns: where each projection's outputs lie in ``[T, O]``, O being the sum of all.
    """

    members: tuple[Projection, ...]
    a_RI: torch.Tensor | None
    bs_Or: tuple[torch.Tensor | None, ...]
    spans: tuple[slice, ...]
    columns: tuple[slice, ...]

    @property
    def rank(self) -> int:
        return 0 if self.a_RI is None else self.a_RI.shape[0]

    @property
    def outputs(self) -> int:
        return self.columns[-1].stop


ROW_ALIGN = 64
"""Rows of tables begin at multiples of so many elements: of 128 bytes in 16 bits, the line of a GPU's cache.

``[W | s B]`` of 4,096 inputs and rank 32 is 64.5 lines wide: packed, every other row of it would begin in the middle of
one, and whoever reads a tile of 64 columns would read two lines for each of its rows.
"""


def row_columns(columns: int, align: int = ROW_ALIGN) -> int:
    """Elements from the begin of one row of a table to that of the next."""
    return -(-columns // align) * align


def table(rows: int, columns: int, dtype: torch.dtype, device: torch.device, align: int = ROW_ALIGN) -> torch.Tensor:
    """``[rows, columns]``, uninitialized, its rows a multiple of ``align`` apart."""
    return torch.empty(rows, row_columns(columns, align), dtype=dtype, device=device)[:, :columns]


def whole_rows(table: torch.Tensor) -> torch.Tensor:
    """A table's rows with what lies between them."""
    return table.as_strided((table.shape[0], table.stride(0)), table.stride())


STACK = 1 << 25
"""Weights of so many elements at most are dequantized side by side and multiplied at once (64 MiB in 16 bits)."""


@dataclass(frozen=True)
class Piece:
    """Part of a group's stacked weight.

    Attributes:
        columns: which of the group's outputs it makes.
        weight_OI: W of these outputs.
        wide_OK: ``[W | s B]``, K = I + R, so that ``[x | x A^T]`` times its transpose is the whole projection; each
            projection's B stands in the columns of its own rank, zeros beside it. None where W is a parameter itself.
    """

    columns: slice
    weight_OI: torch.Tensor
    wide_OK: torch.Tensor | None = None


def widens(group: Group) -> bool:
    """Whether the group's weights are made with room for B beside them: 4-bit ones are, as they are made anyway."""
    return group.rank > 0 and group.rank % 8 == 0 and all(p.nf4 is not None for p in group.members)


def runs(group: Group) -> list[list[int]]:
    """Members by the pieces that :func:`pieces` makes of them: 4-bit neighbours of at most :data:`STACK` elements."""
    found: list[list[int]] = []
    size = 0
    for i, p in enumerate(group.members):
        own = p.base.out_features * p.base.in_features
        joins = found and p.nf4 is not None and group.members[i - 1].nf4 is not None and size + own <= STACK
        if joins:
            found[-1].append(i)
            size += own
        else:
            found.append([i])
            size = own
    return found


def pieces(group: Group, dtype: torch.dtype, wide: bool) -> Iterator[Piece]:
    """The group's weights in ``dtype``, each piece made when it is asked for; with B beside W if ``wide``."""
    wide = wide and widens(group)
    for run in runs(group):
        members, columns = [group.members[i] for i in run], [group.columns[i] for i in run]
        own = slice(columns[0].start, columns[-1].stop)
        if len(run) == 1 and not wide and members[0].nf4 is None:
            yield Piece(own, members[0].weight(dtype))
            continue
        base = members[0].base
        width = base.in_features + (group.rank if wide else 0)
        rows, device = own.stop - own.start, base.weight.device
        table_OK = table(rows, width, dtype, device) if wide else torch.empty(rows, width, dtype=dtype, device=device)
        for i, p, at in zip(run, members, columns):
            part = table_OK if len(run) == 1 else table_OK[at.start - own.start : at.stop - own.start]
            if wide:
                p.write(part, group.bs_Or[i], group.spans[i].start)
            else:
                p.write(part)
        yield Piece(own, table_OK[:, : base.in_features] if wide else table_OK, table_OK if wide else None)
        del table_OK, part  # whoever was given it has dropped it, or keeps it


def hooked(module: nn.Module) -> bool:
    """Whether anything outside watches calls of ``module`` itself, or has put another ``forward`` on it.

    transformers leaves hooks behind once it was asked for hidden states or attentions; outside such a call they do
    nothing, and Pronghorn's own walk is never inside one. A ``forward`` that Pronghorn put there is its own.
    """
    d = module.__dict__  # nn.Module keeps them here; its own attribute lookup is slow, and this runs for every layer
    if "forward" in d and not str(getattr(d["forward"], "__module__", "")).startswith(_OWN):
        return True
    if d["_forward_pre_hooks"] or d["_backward_hooks"] or d.get("_backward_pre_hooks"):
        return True
    hooks = d["_forward_hooks"]
    return bool(hooks) and any(getattr(hook, "__module__", None) != _CAPTURE for hook in hooks.values())


def read_projection(module: Any) -> Projection | str:
    """``module`` as a :class:`Projection`, or in words why its own ``forward`` has to run."""
    if hooked(module):
        return f"a hook on {type(module).__name__}"
    if type(module) in (nn.Linear, Linear4bit):
        return _plain(module)
    if not isinstance(module, LoraLinear):
        return f"{type(module).__name__} in place of a linear layer"
    # Straight from the dictionaries, as above: a walk asks seven of these of every layer while the GPU waits.
    own = module.__dict__
    parts = own["_modules"]
    base = parts["base_layer"]
    plain = _plain(base) if not hooked(base) else "a hook on the base layer"
    if isinstance(plain, str) or own["merged_adapters"] or own["_disable_adapters"]:
        return plain
    names, all_a = own["_active_adapter"], parts["lora_A"]._modules
    active = [name for name in ([names] if isinstance(names, str) else names) if name in all_a]
    if not active:
        return plain
    if len(active) > 1:
        return f"{len(active)} adapters active at once"
    (name,) = active
    a, b, dropout = all_a[name], parts["lora_B"]._modules[name], parts["lora_dropout"]._modules[name]
    if own["lora_variant"].get(name) is not None:
        return "DoRA"
    if own["training"] and getattr(dropout, "p", 0.0) > 0:
        return "lora_dropout"
    if b.bias is not None:
        return "a bias on lora_B"
    if hooked(a) or hooked(b) or hooked(dropout):
        return "a hook on a LoRA matrix"
    return Projection(base, a.weight, b.weight, float(own["scaling"][name]))


def _plain(base: nn.Linear) -> Projection | str:
    if type(base) not in (nn.Linear, Linear4bit):
        return f"{type(base).__name__} in place of a linear layer"
    if any(parameter is not None and parameter.requires_grad for parameter in base._parameters.values()):
        return "a base weight or bias that trains"
    return Projection(base)

"""Calling a Triton kernel again without binding its arguments anew, and noting launches down instead of making them.

Triton's own call takes 40 to 50 microseconds of Python to bind arguments and look the compiled kernel up; a training
step launches a thousand kernels, and where those 50 ms are not hidden, the GPU waits for them. A compiled kernel can be
called by itself, for what its launch alone costs, if it is the one that Triton would pick: the key below holds what
Triton specializes on (https://triton-lang.org: dtype, divisibility by 16, the value 1, constants).

Inside :func:`chained`, kernels that can do so begin while the one before them ends: their blocks are put in place
meanwhile and wait there (programmatic dependent launch, on Hopper and later), where otherwise each of a decode step's
hundreds of launches costs a microsecond of an idle GPU.

While :func:`recording` holds, launches are noted down and nothing runs: a walk through a model then says which kernels
a step of it needs, and ``warm.py`` compiles them side by side, where a first step would compile them one by one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, NamedTuple

import torch


@dataclasses.dataclass(frozen=True)
class TensorLike:
    """What Triton's specialization looks at in a tensor, without its memory."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


def _stand_in(value: Any) -> Any:
    """The same, where it is a tensor or a descriptor of one, without memory."""
    if isinstance(value, torch.Tensor):
        return TensorLike(value.dtype, value.data_ptr())
    return dataclasses.replace(value, base=_stand_in(value.base)) if _is_descriptor(value) else value


def _is_descriptor(value: Any) -> bool:
    """Whether it is Triton's ``TensorDescriptor``, by which a kernel asks the copy engine for blocks of a tensor."""
    return hasattr(value, "block_shape")


class Launch(NamedTuple):
    """A launch that was not made: the ``@triton.jit`` function, its arguments (tensors as stand-ins) and options."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]


class Source(NamedTuple):
    """CUDA C++ that was not compiled: its text, macros, and the compute capability it is for."""

    text: str
    defines: Mapping[str, int]
    capability: tuple[int, int]


@dataclasses.dataclass
class Recorded:
    """What a walk would have launched, in its order, each specialization once."""

    launches: list[Launch] = dataclasses.field(default_factory=list)
    sources: list[Source] = dataclasses.field(default_factory=list)
    before: list[int] = dataclasses.field(default_factory=list)  # of each source, the launches that came before it
    _keys: set[tuple[Any, ...]] = dataclasses.field(default_factory=set, repr=False)

    def launch(self, kernel: Any, key: tuple[Any, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note a launch, unless one of the same kernel and key was."""
        if (kernel, key) not in self._keys:
            self._keys.add((kernel, key))
            self.launches.append(Launch(kernel, tuple(map(_stand_in, args)), options))

    def source(self, text: str, defines: Mapping[str, int], capability: tuple[int, int]) -> None:
        """Note a source, unless the same was."""
        found = Source(text, dict(defines), capability)
        if found not in self.sources:
            self.sources.append(found)
            self.before.append(len(self.launches))


_recorded: Recorded | None = None


@contextmanager
def recording() -> Iterator[Recorded]:
    """Kernels of all threads (autograd's, too) are noted down, not run: what they would have written is not written.
    Only those inside :func:`not_recorded` run.

    Raises:
        RuntimeError: inside another recording.
    """
    global _recorded
    if _recorded is not None:
        raise RuntimeError("launches are being recorded already")
    _recorded = Recorded()
    try:
        yield _recorded
    finally:
        _recorded = None


_real: ContextVar[bool] = ContextVar("real", default=False)


@contextmanager
def not_recorded() -> Iterator[None]:
    """This thread's launches are made, also while another thread records: a rollout goes on while a model is loaded."""
    token = _real.set(True)
    try:
        yield
    finally:
        _real.reset(token)


def current_recording() -> Recorded | None:
    """Where this thread's launches go instead of the GPU, or None: they are made."""
    return None if _recorded is None or _real.get() else _recorded


_chained: ContextVar[bool] = ContextVar("chained", default=False)


@contextmanager
def chained() -> Iterator[None]:
    """Let each kernel that can, in this thread, begin before the one launched before it has ended.

    Such a kernel waits until that one has ended and its writes are seen, before it writes anything and before it lets
    the next begin. So one that begins early may itself read, before it waits, what was whole two kernels before it: a
    norm its weight and the residual, ``x A^T`` the adapters, a product behind that its weights and x but for the last
    columns, a decode step's attention lengths, tables and earlier tokens.

    Inside :func:`before_a_start` a kernel that can lets the next begin before it waits itself.
    """
    token = _chained.set(True)
    try:
        yield
    finally:
        _chained.reset(token)


_start_follows: ContextVar[bool] = ContextVar("start_follows", default=False)


@contextmanager
def before_a_start(follows: bool = True) -> Iterator[None]:
    """Inside, where ``follows``, the next launch is a product that makes a start of its own (``makes_a_start``): until
    it has waited it reads nothing that a kernel of the chain writes, and it lets no other begin before. So those
    kernels here that can let it begin at once; what they write it reads when they have ended, as always.
    """
    token = _start_follows.set(follows)
    try:
        yield
    finally:
        _start_follows.reset(token)


def chain_of(tensor: torch.Tensor) -> int:
    """How a kernel that reads ``tensor`` is launched, and lets the next begin: 0 as usual; 1 early, and the next behind
    its wait; 2 early, and the next at once.
    """
    return int(begins_early(tensor)) and 1 + _start_follows.get()


def begins_early(tensor: torch.Tensor) -> bool:
    """Whether a kernel that reads ``tensor`` and can do so begins before the one launched before it has ended."""
    return _chained.get() and _can_chain(tensor.get_device())


@cache
def _can_chain(index: int) -> bool:
    return index >= 0 and torch.cuda.get_device_capability(index) >= (9, 0)


def has_copy_engine(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is on a Hopper GPU, whose copy engine brings blocks of tensors by their descriptors, and whose
    shared memory our tiles for it fill.
    """
    return tensor.is_cuda and not torch.version.hip and torch.cuda.get_device_capability(tensor.device) == (9, 0)


class Launcher:
    """``launcher(grid, *args, num_warps=...)`` launches ``kernel[grid](*args, num_warps=...)``.

    Args:
        kernel: a ``@triton.jit`` function; in Triton's interpreter every call goes Triton's way.
        chains: its last parameter, which callers leave out, is the constant ``CHAIN``: whether it was launched to begin
            early, as :func:`chained` says, and has to wait.
        hurries: that is 2 where it is to let the next begin before (:func:`before_a_start`).
    """

    def __init__(self, kernel: Any, chains: bool = False, hurries: bool = False) -> None:
        self.kernel, self.chains, self.hurries = kernel, chains, hurries
        self.constants = [p.is_constexpr for p in getattr(kernel, "params", [])]
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(self, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Launch; ``args`` are all of the kernel's parameters in order, its constants included."""
        if self.chains:
            args = self.in_chain(args, options)
        key = self._key(args, options)
        if (recorded := current_recording()) is not None:
            recorded.launch(self.kernel, key, args, options)
            return
        compiled = self.compiled.get(key)
        if compiled is None:
            compiled = self.kernel[grid](*args, **options)
            if compiled is not None and hasattr(compiled, "packed_metadata"):
                self.compiled[key] = compiled
            return
        compiled[(*grid, 1, 1)[:3]](*addresses(args))

    def in_chain(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        """``args`` with whether the kernel begins early here, which ``options`` then say as well."""
        early = _chained.get() and _can_chain(_device_of(args))
        if early:
            options["launch_pdl"] = True
        return (*args, 1 + _start_follows.get() if early and self.hurries else early)

    def bind(self, grid: tuple[int, ...], args: list[Any], free: tuple[int, ...], **options: Any) -> Bound:
        """This launch, to be made again and again with other tensors at the places ``free`` among ``args``."""
        return Bound(self, grid, args, free, options)

    def _key(self, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
        key: list[Any] = [_device_of(args), *options.items()]
        for value, constant in zip(args, self.constants):
            if isinstance(value, torch.Tensor):
                # On the CPU or not, too: Triton refuses what a GPU cannot read, and sees it where a key is new.
                key.append((value.dtype, value.data_ptr() % 16 == 0, value.is_cuda))
            elif _is_descriptor(value):
                key.append((value.base.dtype, *value.block_shape))
            elif constant or not isinstance(value, int) or isinstance(value, bool):
                key.append(value if constant else type(value))
            else:
                key.append((value % 16 == 0, value == 1, -(1 << 31) <= value < 1 << 31))
        return tuple(key)


def addresses(args: Iterable[Any]) -> list[Any]:
    """Arguments with tensors as their addresses: Triton would ask the driver about each tensor at every launch."""
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in args]


def _device_of(args: tuple[Any, ...]) -> int:
    return next(a.get_device() for a in args if isinstance(a, torch.Tensor))


class Bound:
    """A launch that was decided on but for a few tensors: ``bound(*tensors)`` puts them in their places and launches.

    What Triton would specialize on is the same each time, if these tensors' dtype is and they are aligned to 16 bytes:
    then the compiled kernel is called without another look at the arguments.
    """

    def __init__(
        self, launcher: Launcher, grid: tuple[int, ...], args: list[Any], free: tuple[int, ...], options: dict[str, Any]
    ) -> None:
        self.launcher, self.grid, self.args, self.free, self.options = launcher, grid, args, free, options
        self._run: Any = None

    def __call__(self, *tensors: torch.Tensor) -> None:
        args = self.args.copy()
        aligned = True
        for place, tensor in zip(self.free, tensors):
            args[place] = tensor
            aligned = aligned and tensor.data_ptr() % 16 == 0
        recorded = current_recording()
        if aligned and self._run is not None and recorded is None:
            self._run(*addresses(args))
            return
        self.launcher(self.grid, *args, **self.options)
        if aligned and recorded is None:
            compiled = self.launcher.compiled.get(self.launcher._key(tuple(args), self.options))
            if compiled is not None:
                self._run = compiled[(*self.grid, 1, 1)[:3]]

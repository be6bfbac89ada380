"""CUDA C++ compiled at run time by the NVRTC that comes with torch: no toolkit, no headers, one second a kernel.

Triton chooses which thread holds which element; where that is the point of a kernel, the kernel is CUDA C++. The
compiled code is kept under ``~/.cache/pronghorn`` (``XDG_CACHE_HOME`` as usual), named by everything that made it.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES


SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
"""KiB of shared memory that a block can have, by compute capability; 99 on the others from 8.0 on."""


class CompileError(RuntimeError):
    """NVRTC refused a source, or the driver what it made of it; the text is theirs."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute: which one, and 64 bytes of value."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_OVERLAP = ctypes.pointer(_Attribute(6, 0, (ctypes.c_int * 16)(1)))  # programmatic stream serialization, allowed


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    """NVRTC of torch's own CUDA version."""
    name = f"libnvrtc.so.{str(torch.version.cuda).split('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError as error:
        for folder in map(Path, sys.path):
            for found in sorted(folder.glob(f"nvidia/*/lib/{name}")):
                return ctypes.CDLL(str(found))
        raise CompileError(
            f"{name} is not to be found ({error}); reinstall torch with its CUDA packages, or run `pronghorn doctor`"
        ) from error


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check_driver(code: int, what: str) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise CompileError(f"{what}: CUDA error {code} ({(text.value or b'unknown').decode()})")


def compile_cubin(source: str, defines: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Machine code for GPUs of ``capability``.

    Raises:
        CompileError: with the compiler's own messages.
    """
    rtc = _nvrtc()
    program = ctypes.c_void_p()
    made = rtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"pronghorn.cu", 0, None, None)
    if made:
        raise CompileError(f"NVRTC could not begin: error {made}")
    own = "a" if "MULTIPLIES_WIDE" in defines else ""  # with instructions that no later GPU has
    options = [f"-arch=sm_{capability[0]}{capability[1]}{own}", "-std=c++17", "-default-device", "-fmad=false"]
    options += [f"-D{name}={value}" for name, value in defines.items()]
    given = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
    code = rtc.nvrtcCompileProgram(program, len(options), given)
    size = ctypes.c_size_t()
    if code:
        rtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        rtc.nvrtcGetProgramLog(program, log)
        raise CompileError(f"NVRTC error {code} with {' '.join(options)}:\n{log.value.decode(errors='replace')}")
    rtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    rtc.nvrtcGetCUBIN(program, cubin)
    rtc.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw


_compiling: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
"""A lock for each file of the cache."""


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pronghorn"


def cached_cubin(source: str, defines: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """As :func:`compile_cubin`, from the cache where it is there, and into it where it is not.

    Two threads that ask for the same compile it once.
    """
    made_of = repr((source, sorted(defines.items()), capability, torch.version.cuda))
    path = _cache_folder() / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.cubin"
    with _compiling[path.name]:
        if path.is_file():
            return path.read_bytes()
        cubin = compile_cubin(source, defines, capability)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, path)  # whole, or not there: another process may be writing the same
        return cubin


class CudaKernel:
    """One kernel of a compiled source on one GPU; launches go to torch's current stream, CUDA graphs included.

    Args:
        source: CUDA C++ with the kernel as ``extern "C"``.
        name: the kernel.
        defines: macros.
        device: the GPU.
        shared_bytes: dynamic shared memory of a block.
    """

    def __init__(
        self, source: str, name: str, defines: Mapping[str, int], device: torch.device, shared_bytes: int
    ) -> None:
        self.device, self.shared_bytes = device, shared_bytes
        cubin = cached_cubin(source, defines, torch.cuda.get_device_capability(device))
        driver = _driver()
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream()  # torch's context is the current one from here on
            _check_driver(driver.cuModuleLoadData(ctypes.byref(self._module), cubin), f"loading {name}")
            found = driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode())
            _check_driver(found, f"finding {name}")
            allowed = driver.cuFuncSetAttribute(self._function, _SHARED_BYTES, shared_bytes)
            _check_driver(allowed, f"{shared_bytes} bytes of shared memory for {name}")

    def __call__(
        self, grid: tuple[int, int, int], threads: int, argument: ctypes.Structure, overlap: bool = False
    ) -> None:
        """Launch with one parameter, a structure passed by value.

        ``overlap``: begin once every block of the kernel before has said that it may, or has ended;
        ``griddepcontrol.wait`` then waits for that kernel's results (compute capability 9.0 and up).
        """
        pointers = (ctypes.c_void_p * 1)(ctypes.cast(ctypes.byref(argument), ctypes.c_void_p))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        with torch.cuda.device(self.device):
            config = _Config(
                *grid, threads, 1, 1, self.shared_bytes, stream, _OVERLAP if overlap else None, int(overlap)
            )
            code = _driver().cuLaunchKernelEx(ctypes.byref(config), self._function, pointers, None)
        _check_driver(code, f"launching a grid of {grid} blocks of {threads}")


class Map(ctypes.Structure):
    """CUDA's ``CUtensorMap``: how Hopper's copy engine finds blocks of a tensor. Part of a kernel's parameter."""

    _fields_ = [("opaque", ctypes.c_uint64 * 16)]


_WORDS = 2  # CU_TENSOR_MAP_DATA_TYPE_UINT32
_MAP_TYPES = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLE_128, _PROMOTE_256 = 3, 3


def _map(
    of: str,
    kind: int,
    address: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    block: tuple[int, ...],
    swizzle: int,
) -> Map:
    """Dimensions of ``shape`` and ``block``, the last one dense; ``strides`` are the others' bytes. Outside is zero."""
    room, n = (ctypes.c_char * 192)(), len(shape)  # it has to begin at a multiple of 64 bytes
    at = (ctypes.addressof(room) + 63) // 64 * 64
    u64, u32 = ctypes.c_uint64, ctypes.c_uint32
    code = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(at), kind, n, ctypes.c_void_p(address), (u64 * n)(*shape[::-1]),
        (u64 * (n - 1))(*strides[::-1]), (u32 * n)(*block[::-1]), (u32 * n)(*[1] * n), 0, swizzle, _PROMOTE_256, 0,
    )  # fmt: skip
    _check_driver(code, f"a map of {' x '.join(map(str, shape))} {of} with strides of {strides} bytes")
    return Map.from_buffer_copy((ctypes.c_char * 128).from_address(at))


def map_of(tensor_RC: torch.Tensor, rows: int) -> Map:
    """For blocks of so many ``rows`` and 64 columns of 16 bits, whose 16-byte pieces change places as Hopper's wide
    product reads them (``described`` in ``instructions.cu``). Outside the tensor is zero. It holds an address: the
    tensor has to live. Made once for tensors at one place, as launches ask for it again and again.

    Args:
        tensor_RC: ``[R, C]``, bfloat16 or float16, rows contiguous, beginning at multiples of 16 bytes.
    """
    (R, C), dtype = tensor_RC.shape, tensor_RC.dtype
    return _map_of(tensor_RC.data_ptr(), dtype, R, C, tensor_RC.stride(0) * dtype.itemsize, rows)


@lru_cache(maxsize=4096)
def _map_of(address: int, dtype: torch.dtype, R: int, C: int, stride: int, rows: int) -> Map:
    return _map(str(dtype), _MAP_TYPES[dtype], address, (R, C), (stride,), (rows, 64), _SWIZZLE_128)


@lru_cache(maxsize=4096)
def _map_of_groups(address: int, dtype: torch.dtype, R: int, C: int, stride: int, rows: int, groups: int) -> Map:
    shape, strides = (C // 64, R, 64), (128, stride)
    return _map(str(dtype), _MAP_TYPES[dtype], address, shape, strides, (groups, rows, 64), _SWIZZLE_128)


def map_of_groups(tensor_RC: torch.Tensor, rows: int, groups: int) -> Map:
    """As :func:`map_of`, for blocks of so many ``rows`` and ``groups`` of 64 columns, which come one group after
    another. C is a multiple of 64.
    """
    R, C = tensor_RC.shape
    stride = tensor_RC.stride(0) * tensor_RC.element_size()
    return _map_of_groups(tensor_RC.data_ptr(), tensor_RC.dtype, R, C, stride, rows, groups)


@lru_cache(maxsize=4096)
def map_of_words(address: int, rows: int, columns: int, block: tuple[int, int]) -> Map:
    """For blocks of so many rows and columns (at most 256 of each) of 32-bit words, rows side by side, as they lie."""
    return _map("words", _WORDS, address, (rows, columns), (columns * 4,), block, 0)


@lru_cache(maxsize=8)
def processors_of(device: torch.device) -> int:
    """Multiprocessors of ``device``."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@lru_cache(maxsize=8)
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block can have on ``device``, by the CUDA programming guide's table."""
    return SHARED.get(torch.cuda.get_device_capability(device), 99) * 1024


def source(*names: str) -> str:
    """A kernel's source, files in this folder, behind the instructions that all of them share."""
    folder = files("pronghorn.kernels")
    return "\n".join(folder.joinpath(part).read_text() for part in ("instructions.cu", *names))


def pointer(tensor: Any) -> int:
    """A tensor's address, 0 for None."""
    return 0 if tensor is None else int(tensor.data_ptr())

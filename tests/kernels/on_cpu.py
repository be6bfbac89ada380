"""CUDA C++ compiled for a CPU, to see which element goes where and who waits for whom: see ``cuda_on_cpu.h``."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch

from pronghorn.kernels.cuda_source import Map

HERE = Path(__file__).parent

COMPILE = ("g++", "-std=c++20", "-O1", "-w", "-ffp-contract=off", "-fPIC", "-pthread")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")


@cache
def _standard() -> TemporaryDirectory[str]:
    """A folder with ``standard.h``, compiled by the options that kernels are."""
    folder = TemporaryDirectory(prefix="standard-")
    header = Path(folder.name) / "standard.h"
    shutil.copy(HERE / "standard.h", header)
    subprocess.run([*COMPILE, "-x", "c++-header", header, "-o", f"{header}.gch"], check=True)
    return folder


def compiled(
    source: str,
    kernel: str,
    defines: Mapping[str, int],
    folder: Path,
    changed: tuple[str, str] = ("", ""),
    parameter: str = "Args",
) -> ctypes.CDLL:
    """``source`` as a library with ``run(args, grid_x, grid_y, grid_z)``; ``changed``: one text in it for another."""
    assert changed[0] in source
    library = folder / "kernel.so"
    macros = {"KERNEL": kernel, "ARGS": parameter, **defines}  # behind what is compiled already, which takes no others
    text = [
        f'#include "{Path(_standard().name) / "standard.h"}"',
        *(f"#define {name} {value}" for name, value in macros.items()),
        f'#include "{HERE / "cuda_on_cpu.h"}"',
        source.replace(*changed) if changed[0] else source,
        f'#include "{HERE / "cuda_on_cpu_run.h"}"\n',
    ]
    command = [*COMPILE, "-shared", "-x", "c++", "-", "-o", library]
    subprocess.run(command, input="\n".join(text), text=True, check=True)
    return ctypes.CDLL(str(library))


def run(library: ctypes.CDLL, args: ctypes.Structure, blocks: int, early: ctypes.Structure | None) -> None:
    """Launch so many blocks, begun while the kernel before runs where ``early`` says what that makes.

    Raises:
        AssertionError: a wait did not end.
    """
    if early is None:
        stuck = library.run(ctypes.byref(args), blocks, 1, 1)
    else:
        stuck = library.run_early(ctypes.byref(args), blocks, 1, ctypes.byref(early))
    assert not stuck, "a wait did not end"


def map_of(tensor: torch.Tensor | None, rows: int) -> Map:
    """What ``cuda_on_cpu.h`` reads blocks of 64 columns by."""
    if tensor is None:
        return Map()
    of = (tensor.data_ptr(), tensor.stride(0), *tensor.shape, rows)
    return Map((ctypes.c_uint64 * 16)(*of))


def map_of_groups(tensor: torch.Tensor, rows: int, groups: int) -> Map:
    """The same, of so many times 64 columns, each by itself."""
    of = (tensor.data_ptr(), tensor.stride(0), *tensor.shape, rows, 0, groups)
    return Map((ctypes.c_uint64 * 16)(*of))


def map_of_words(address: int, rows: int, columns: int, block: tuple[int, int]) -> Map:
    """Of 32-bit words, as they lie."""
    return Map((ctypes.c_uint64 * 16)(address, columns, rows, columns, block[0], block[1]))

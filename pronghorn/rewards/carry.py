"""Reward functions as bytes for a worker: by name where a module has them, by value where none does.

Pickle sends functions and classes by name, which leaves out what is defined in a script, in a notebook or inside
another function. Those go by value here: code (`marshal`: the worker runs the same Python), defaults, what the closure
holds, and the globals that the code names, as they are at this moment. A worker never imports the script itself.
"""

from __future__ import annotations

import dis
import importlib
import io
import marshal
import pickle
import sys
import types
from typing import Any

from ..config.errors import ConfigError

_EMPTY = "pronghorn.rewards.carry: an empty cell"
_CLASS_OWN = ("__dict__", "__weakref__", "__module__", "__qualname__", "__firstlineno__", "__static_attributes__")
_namespaces: dict[str, dict[str, Any]] = {}


def pack(func: Any, name: str) -> bytes:
    """`func` as bytes that `unpack` reads in another process.

    Raises:
        ConfigError: it cannot travel (an open file, a lock, a CUDA tensor, a class of a special kind); says what, and
            the remedy.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(func)
    except Exception as error:  # whatever a value's own __reduce__ raises
        raise ConfigError(
            f"reward function {name!r} cannot be sent to a worker process: {error}. Move it, and what it reads, into a "
            "module that it imports; or make what cannot travel inside the function; or leave it in the process "
            "(reward_workers=0, no isolated())"
        ) from error
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """What `pack` packed. Imports the modules that it names."""
    return pickle.loads(data)


class _Pickler(pickle.Pickler):
    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, types.FunctionType) and not _has_a_module(obj):
            return _reduce_function(obj)
        if isinstance(obj, type) and not _has_a_module(obj):
            return _reduce_class(obj)
        if isinstance(obj, types.ModuleType):
            return importlib.import_module, (obj.__name__,)
        if isinstance(obj, (staticmethod, classmethod)):
            return type(obj), (obj.__func__,)
        if isinstance(obj, property):
            return property, (obj.fget, obj.fset, obj.fdel, obj.__doc__)
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(obj, torch.Tensor) and obj.is_cuda:
            raise ValueError("it holds a CUDA tensor, and workers never touch the GPU")
        return NotImplemented


def _has_a_module(obj: Any) -> bool:
    """Whether another process finds `obj` under its module and name."""
    module = getattr(obj, "__module__", None)
    if module == "builtins":
        return True
    if module is None or module == "__main__":
        return False
    found: Any = sys.modules.get(module)
    for part in obj.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is obj


def _reduce_function(func: types.FunctionType) -> tuple[Any, ...]:
    named = _globals_named(func.__code__)
    state = {
        "defaults": func.__defaults__,
        "kwdefaults": func.__kwdefaults__,
        "qualname": func.__qualname__,
        "attributes": func.__dict__,
        "cells": [_content(cell) for cell in func.__closure__ or ()],
        "globals": {name: func.__globals__[name] for name in sorted(named) if name in func.__globals__},
    }
    made_of = (marshal.dumps(func.__code__), func.__name__, func.__module__ or "__main__")
    # State is set after the function exists, so that a function may hold itself.
    return _make_function, made_of, state, None, None, _fill_function


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet assigned, say a name that a later line of the outer function binds
        return _EMPTY


def _globals_named(code: types.CodeType) -> set[str]:
    """The global names that the code, and code inside it, loads or stores."""
    named = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "STORE_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            named |= _globals_named(constant)
    return named


def _make_function(code: bytes, name: str, module: str) -> types.FunctionType:
    # All functions of a module share one namespace, so that a global which one of them sets is seen by the others.
    namespace = _namespaces.setdefault(module, {"__name__": module, "__builtins__": __builtins__})
    body = marshal.loads(code)
    return types.FunctionType(body, namespace, name, None, tuple(types.CellType() for _ in body.co_freevars))


def _fill_function(func: types.FunctionType, state: dict[str, Any]) -> None:
    func.__defaults__, func.__kwdefaults__ = state["defaults"], state["kwdefaults"]
    func.__qualname__ = state["qualname"]
    func.__dict__.update(state["attributes"])
    func.__globals__.update(state["globals"])
    for cell, content in zip(func.__closure__ or (), state["cells"]):
        if not (isinstance(content, str) and content == _EMPTY):
            cell.cell_contents = content


def _reduce_class(cls: type) -> tuple[Any, ...]:
    if type(cls) is not type or "__slots__" in cls.__dict__:
        kind = "with __slots__" if "__slots__" in cls.__dict__ else f"of metaclass {type(cls).__name__}"
        raise ValueError(f"it needs class {cls.__qualname__!r} {kind}, which no module has")
    state = {name: value for name, value in cls.__dict__.items() if name not in _CLASS_OWN}
    made_of = (cls.__name__, cls.__bases__, cls.__module__, cls.__qualname__)
    return _make_class, made_of, state, None, None, _fill_class


def _make_class(name: str, bases: tuple[type, ...], module: str, qualname: str) -> type:
    return type(name, bases, {"__module__": module, "__qualname__": qualname})


def _fill_class(cls: type, state: dict[str, Any]) -> None:
    for name, value in state.items():
        setattr(cls, name, value)

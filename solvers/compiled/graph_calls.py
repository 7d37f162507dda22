"""Compiled graphs as C++ calls them: what ``graphs.h`` takes."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pnode.solvers.compiled.inductor import CompilationFailed, CompiledGraph, open_graph

__all__ = ["Graph", "described", "dtype_code", "lend_torch", "opened"]

_TORCH = (
    "create_tensor_from_blob", "empty_strided", "new_tensor_handle", "delete_tensor_object",
    "get_data_ptr", "get_dim", "get_sizes", "get_strides",
)  # fmt: skip


class Graph(ctypes.Structure):
    """One graph, to be called."""

    _fields_ = [("run", ctypes.c_void_p), ("container", ctypes.c_void_p)]


@cache
def _container(path: Path) -> tuple[ctypes.CDLL, int]:
    """Return the library of a graph and a handle of the graph, for the rest of the process."""
    library, handle = open_graph(path), ctypes.c_void_p()
    create = library.AOTInductorModelContainerCreateWithDevice
    if create(ctypes.byref(handle), ctypes.c_size_t(1), b"cpu", None) or not handle.value:
        raise CompilationFailed("the graph could not be set up")
    return library, handle.value


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value


def opened(graph: Any) -> tuple[ctypes.CDLL, Graph]:
    """Return the library of a graph, and the graph.

    Raises
    ------
    CompilationFailed
        If it needs Python's or torch's help.
    """
    if not isinstance(graph, CompiledGraph):
        raise CompilationFailed("a graph is not machine code")
    library, handle = _container(graph.path)
    return library, Graph(_address(library.AOTInductorModelContainerRun), handle)


def lend_torch(library: ctypes.CDLL, caller: ctypes.CDLL) -> None:
    """Give a caller of graphs torch's functions, as the library of a graph has them."""
    functions = [_address(getattr(library, f"aoti_torch_{name}")) for name in _TORCH]
    caller.pnode_torch((ctypes.c_void_p * len(functions))(*functions))


def described(library: ctypes.CDLL, *groups: Sequence[torch.Tensor]) -> Any:
    """Return the forms of groups of tensors as numbers."""
    text: list[int] = []
    for tensors in groups:
        text.append(len(tensors))
        for x in tensors:
            if x.device.type != "cpu" or x.layout is not torch.strided:
                raise CompilationFailed(f"f reads a tensor on {x.device}, {x.layout}")
            text += [dtype_code(library, x.dtype), x.dim(), *x.shape, *x.stride()]
    return (ctypes.c_int64 * len(text))(*text)


def dtype_code(library: ctypes.CDLL, dtype: torch.dtype) -> int:
    """Return torch's number for a dtype."""
    name = f"aoti_torch_dtype_{str(dtype).removeprefix('torch.')}"
    try:
        return int(getattr(library, name)())
    except AttributeError as error:
        raise CompilationFailed(f"f reads a tensor of {dtype}") from error

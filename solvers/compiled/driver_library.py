"""The driver's library, which is compiled when it is first needed, and its functions."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch

from pnode.solvers.compiled.inductor import compile_source

__all__ = ["at", "library", "source"]

# No contraction: the controller's numbers are those of Python.
_FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-fPIC", "-shared", "-pthread", "-fopenmp-simd")


def source(*names: str) -> str:
    """Return parts of a program in C++, from the files of this folder."""
    folder = Path(__file__).parent
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def at(tensor: torch.Tensor) -> Any:
    """Return a tensor's address."""
    return ctypes.c_void_p(tensor.data_ptr())


@cache
def library() -> ctypes.CDLL:
    """Return the driver.

    Raises
    ------
    CompilationFailed
        If it cannot be compiled.
    """
    text = source(
        "kernel.h", "interpolants.h", "checkpoints.h", "ranks.h", "clock.h", "fixed_steps.h",
        "error_memory.h", "suspects.h", "sweeps.cpp", "sweep_derivatives.cpp", "shown_steps.cpp",
        "sweep_calls.cpp", "partial_steps.cpp", "rows.cpp", "graphs.h", "graph_steps.cpp",
        "exchange.h", "staged_steps.cpp",
    )  # fmt: skip
    made = compile_source(text, _FLAGS, "driver-")
    pointer, number, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double
    rest = [number, real, pointer]
    functions: dict[str, tuple[Any, list[Any]]] = {
        "plan": (pointer, [pointer, pointer]),
        "plan_tangents": (None, [pointer, number, pointer, number]),
        "graph_steps": (pointer, [pointer] * 5),
        "staged_plan": (pointer, [pointer] * 4),
        "staged_steps": (pointer, [pointer] * 4),
        "sweep": (pointer, [pointer, pointer, pointer, pointer, number]),
        "prescribe": (None, [pointer, pointer, number]),
        "share": (None, [pointer, pointer]),
        "leave": (number, [pointer]),
        "forward": (number, [pointer, pointer, pointer, real, pointer]),
        "limit": (None, [pointer, number]),
        "schedule": (number, [pointer, pointer, number]),
        "watch": (None, [pointer, pointer]),
        "sift": (number, [pointer, pointer]),
        "shown": (None, [pointer] * 4),
        "part": (number, [pointer, pointer, real, pointer]),
        "cut": (None, [pointer, real]),
        "partial": (pointer, [pointer]),
        "partial_take": (number, [pointer] * 2 + [real, pointer, number, number, pointer, pointer]),
        "partial_adjoint": (number, [pointer, pointer, real] + [pointer] * 3),
        "partial_counts": (None, [pointer, pointer]),
        "ends": (None, [pointer, pointer]),
        "interpolate": (number, [pointer, pointer]),
        "inside": (number, [pointer] * 3),
        "take_inside": (None, [pointer, pointer]),
        "nodes": (number, [pointer, pointer, number]),
        "reverse": (number, [pointer, pointer, pointer, pointer, real]),
        "finish": (number, [pointer, pointer, pointer, pointer]),
        "tangents": (number, [pointer, pointer, number] + [pointer] * 3 + [real, pointer]),
        "recorded": (number, [pointer, pointer, pointer, pointer]),
        "whole": (number, [pointer]),
        "left": (number, [pointer]),
        "owned": (number, []),
        "rows": (pointer, [pointer] * 5 + [number] * 2 + [pointer, number, number]),
        "row": (pointer, [pointer, number]),
        "rows_forward": (None, [pointer] * 3 + rest),
        "rows_reverse": (None, [pointer] * 3 + [number] * 2 + [pointer] * 2 + rest),
        "rows_counts": (None, [pointer, number, pointer]),
    }
    with_handle = (
        "torch free_plan free_staged_plan free_sweep free_partial keep_ends stop fail repeat "
        "restart rows_restart free_rows"
    )
    functions |= dict.fromkeys(with_handle.split(), (None, [pointer]))
    for name, (result, arguments) in functions.items():
        function = getattr(made, f"pnode_{name}")
        function.restype, function.argtypes = result, arguments
    return made

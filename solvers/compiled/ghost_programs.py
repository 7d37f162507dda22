"""Implicit steps in C++ on states with ghost cells, whose systems are solved by products alone.

The graphs are those of :class:`~pnode.solvers.compiled.fields.FieldCode`, called as
``ghost_field.cpp`` does, between exchanges of ghost cells.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch

from pnode.base.vectors import REAL
from pnode.solvers.compiled.driver_library import source
from pnode.solvers.compiled.exchanges import exchange
from pnode.solvers.compiled.fields import FieldCode
from pnode.solvers.compiled.graph_calls import Graph, described, lend_torch, opened
from pnode.solvers.compiled.graph_programs import FLAGS, reads_time
from pnode.solvers.compiled.programs import ImplicitProgram
from pnode.solvers.compiled.trace import FieldGraph

__all__ = ["GhostProgram"]


class _GhostGraphs(ctypes.Structure):
    _fields_ = [
        ("saved", ctypes.c_int64), ("parameters", ctypes.c_int64),
        ("value", Graph), ("derivative", Graph), ("transpose", Graph), ("product", Graph),
    ]  # fmt: skip


class GhostProgram(ImplicitProgram):
    """The machine code for one field of a rank's cells with ghost cells around them.

    Parameters
    ----------
    code : FieldCode
        The field, from what f gets to what it returns.
    steps : {"dirk", "bdf", "explicit"}
        The methods.

    Raises
    ------
    CompilationFailed
        If a graph or the steps could not be compiled, or a graph needs torch's help.
    """

    collective = True

    def __init__(self, code: FieldCode, steps: str) -> None:
        self._code, traced = code, code.traced
        self._forest: list[Any] = []  # once it is known, of all that are bound
        size, seen = math.prod(traced.returned), math.prod(traced.shape)
        graphs = [code.value, code.product, code.product, code.product]
        if steps != "explicit":  # with which there is no system
            graphs[1:3] = code.derivative, code.state_product
        (library, *_), calls = zip(*map(opened, graphs), strict=True)
        field = (
            f"constexpr int N = {size}, WIDTH = {size}, SEEN = {seen};",
            f"constexpr bool AUTONOMOUS = {str(not reads_time(traced)).lower()};",
            source("graphs.h", "exchange.h", "ghost_field.cpp"),
        )
        super().__init__(traced, "\n".join(field), steps, FLAGS, ("krylov_systems.h",))
        lend_torch(library, self.library)
        settings = _GhostGraphs(traced.saved, len(traced.parameters), *calls)
        forms = [torch.zeros(shape, dtype=REAL) for shape in (traced.shape, traced.returned)]
        self.library.pnode_field(ctypes.byref(settings), described(library, forms, traced.inputs()))

    def bound(self, graph: FieldGraph) -> GhostProgram:
        """Return it for a graph that differs in the tensors that it reads alone."""
        made = super().bound(graph)
        if made is not self:
            made._code = self._code.bound(graph)
        return made

    def takes_tangents(self, number: int, of_parameters: bool, steps: int) -> bool:
        """Whether there is code for tangents: the steps are taken again."""
        return False

    def at(self, t: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        """Return f(t, y), flat, and what is saved of it; y has ghost cells."""
        return self._code.at(t, y)

    def exchange_by(self, forest: Any) -> None:
        """Exchange ghost cells by a star forest, that of the only layout which it is for."""
        if not self._forest:
            self._forest.append(forest)
            self.library.pnode_exchange(ctypes.byref(exchange(forest)))

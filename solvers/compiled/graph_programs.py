"""Implicit steps in C++ on a field that is compiled graphs: of more than some thousand operations.

The graphs are those of :class:`~pnode.solvers.compiled.fields.FieldCode`, called as
``graph_field.cpp`` does; larger matrices are factored by the LAPACK that SciPy brings.
"""

from __future__ import annotations

import ctypes
import math
from functools import cache
from typing import Any

import torch

from pnode.base.vectors import REAL
from pnode.solvers.compiled.colored import Colored
from pnode.solvers.compiled.driver import at, source
from pnode.solvers.compiled.fields import FieldCode
from pnode.solvers.compiled.graph_calls import Graph, described, lend_torch, opened
from pnode.solvers.compiled.inductor import CompilationFailed
from pnode.solvers.compiled.programs import MOST_STAGES, ImplicitProgram
from pnode.solvers.compiled.second_graphs import SecondGraphs
from pnode.solvers.compiled.trace import FieldGraph, dependent

__all__ = ["FLAGS", "GraphProgram", "is_linear", "reads_time"]

_DENSE, _SPARSE = ("dense_systems.h",), ("sparse_systems.h", "kept_solves.h")
#: Options of the compiler, of steps on graphs.
FLAGS = ("-O3", "-fopenmp-simd")
# Of a stage, which take less time than to take the step again from Python.
_MOST_PRODUCTS = 128


class _FieldGraphs(ctypes.Structure):
    _fields_ = [
        ("saved", ctypes.c_int64), ("parameters", ctypes.c_int64),
        ("value", Graph), ("rows", Graph), ("product", Graph), ("rate", Graph), ("second", Graph),
    ]  # fmt: skip


class GraphProgram(ImplicitProgram):
    """The machine code for one field and one kind of methods.

    Parameters
    ----------
    code : FieldCode
        The field.
    steps : {"dirk", "bdf", "coupled", "rosenbrock", "explicit"}
        The methods.
    t, y0 : Tensor
        Where a solve begins, near which a batch of products is compared with single ones.
    second : SecondGraphs or None
        What Rosenbrock methods want besides.
    colored : Colored or None
        Of a sparse Jacobian.

    Raises
    ------
    CompilationFailed
        If a graph or the steps could not be compiled, or a graph needs torch's help.
    """

    keeps_jacobian = True

    def __init__(
        self, code: FieldCode, steps: str, t: torch.Tensor, y0: torch.Tensor,
        second: SecondGraphs | None = None, colored: Colored | None = None,
    ) -> None:  # fmt: skip
        self._code, self._second, traced = code, second, code.traced
        size, width = math.prod(traced.returned), math.prod(traced.shape)
        explicit = steps == "explicit"  # nobody asks for the Jacobian of an explicit part
        seeds = torch.eye(1 if explicit else size, size, dtype=REAL)
        if colored is not None:
            seeds = colored.seeds
        rows = code.product if explicit else code.rows(len(seeds), t, y0, at_once=True)
        if rows is None:
            raise CompilationFailed(
                "torch gives other products in a batch than one by one, or none"
            )
        graphs = [code.value, rows, code.product]
        graphs += [] if second is None else [second.rate, second.second]
        (library, *_), calls = zip(*map(opened, graphs), strict=True)
        self._units = seeds.view(len(seeds), *traced.returned)
        self._point = torch.zeros(traced.shape, dtype=REAL)
        facts = {"AUTONOMOUS": not reads_time(traced), "CONSTANT": is_linear(traced)}
        field = (
            f"constexpr int N = {size}, WIDTH = {width};",
            *(f"constexpr bool {name} = {str(fact).lower()};" for name, fact in facts.items()),
            f"constexpr int POINTS = {1 if second is None else MOST_STAGES};",
            *_entries(colored),
            source("graphs.h", "graph_field.cpp"),
        )
        systems = _DENSE if colored is None else _SPARSE
        super().__init__(traced, "\n".join(field), steps, FLAGS, systems)
        lend_torch(library, self.library)
        self.library.pnode_lapack(_lapack())
        places: list[Any] = [None] * 3
        if colored is not None:
            places = [at(x) for x in (colored.rows, colored.columns, colored.colors)]
            self.library.pnode_structure(*places[:2], at(colored.order))
        settings = _FieldGraphs(traced.saved, len(traced.parameters), *calls)
        text = described(library, self._read(), self._read_twice())
        self.library.pnode_field(ctypes.byref(settings), text, *places)

    def bound(self, graph: FieldGraph) -> GraphProgram:
        """Return it for a graph that differs in the tensors that it reads alone."""
        made = super().bound(graph)
        if made is not self:
            made._code = self._code.bound(graph)
            if self._second is not None:
                made._second = self._second.bound(self.traced, graph)
        return made

    def takes_tangents(self, number: int, of_parameters: bool, steps: int) -> bool:
        """Whether there is code for tangents: those of parameters take a product for each entry."""
        return not of_parameters or self.size <= _MOST_PRODUCTS

    def inputs(self) -> list[torch.Tensor]:
        """Return what f reads as the program takes it."""
        return [*self._read(), *self._read_twice()]

    def _read(self) -> list[torch.Tensor]:
        return [self._units, self._units[0], self._point, *self.traced.inputs()]

    def _read_twice(self) -> list[torch.Tensor]:
        return [] if self._second is None else self._second.inputs()

    def at(self, t: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
        """Return f(t, y), flat, and what is saved of it."""
        return self._code.at(t, y)


def _entries(colored: Colored | None) -> list[str]:
    """Return what graph_field.cpp is told of a sparse Jacobian; a library is for one pattern."""
    if colored is None:
        return ["constexpr int COLORS = 0, ENTRIES = N * WIDTH;"]
    colors, entries = len(colored.seeds) - 1, len(colored.rows)
    return [
        f"constexpr int COLORS = {colors}, ENTRIES = {entries};  // {colored.name}",
    ]


def reads_time(traced: FieldGraph) -> bool:
    """Whether f or its products depend on t."""
    for graph, place in ((traced.value, 0), (traced.product, 1)):
        given = [node for node in graph.graph.nodes if node.op == "placeholder"]
        if given[place].users:
            return True
    return False


def is_linear(traced: FieldGraph) -> bool:
    """Whether w^T df/dy depends on w alone."""
    nodes = list(traced.product.graph.nodes)
    _, t, y, *rest = (node for node in nodes if node.op == "placeholder")
    output: Any = traced.product.graph.output_node()
    given = (t, y, *rest[len(rest) - traced.saved :])
    return not any(output.args[0][0] in dependent(nodes, node) for node in given)


@cache
def _lapack() -> Any:
    """Return the addresses of LAPACK's functions, in the order of ``lu.h``."""
    from scipy.linalg import cython_blas, cython_lapack  # takes a tenth of a second

    get = ctypes.pythonapi.PyCapsule_GetPointer
    name = ctypes.pythonapi.PyCapsule_GetName
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    names = ("dgetrf", "zgetrf", "dgetrs", "zgetrs")
    found = [cython_lapack.__pyx_capi__[each] for each in names]
    found += [cython_blas.__pyx_capi__[each] for each in ("dtrsm", "dgemm")]
    return (ctypes.c_void_p * len(found))(*(get(each, name(each)) for each in found))

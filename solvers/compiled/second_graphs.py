"""Graphs of what Rosenbrock methods differentiate besides: f by time, products once more."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch

from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.field.vectorfield import VectorField
from pnode.solvers.compiled import inductor
from pnode.solvers.compiled.compiler import bare
from pnode.solvers.compiled.evaluations import agree
from pnode.solvers.compiled.inductor import Compiled, fingerprint
from pnode.solvers.compiled.trace import FieldGraph, Untraceable, compose, lifted

__all__ = ["SecondGraphs"]


class SecondGraphs:
    """df/dt, and the derivatives of w^T (df/dy v + tau df/dt), as compiled graphs.

    They are traced from f as :meth:`Linearization.second_vjp` differentiates it, which the trace of
    its products does not tell: torch detaches what a product reads of a value.

    Parameters
    ----------
    part : VectorField
        The field.
    traced : FieldGraph
        Its trace, which has the parameters that it uses.
    y0 : Tensor
        Near this the graphs are compared with the field.

    Attributes
    ----------
    rate, second : Compiled
        ``[w, v, tau, t, y, *inputs] -> [f_t]`` and ``-> [state, *parameters]``.

    Raises
    ------
    Untraceable, CompilationFailed
        If there are none.
    """

    def __init__(self, part: VectorField, traced: FieldGraph, y0: torch.Tensor) -> None:
        self._field, self._shape = bare(part), traced.shape
        self._indices = [part.index for part in traced.parameters]
        state, like = torch.zeros(traced.shape, dtype=REAL), torch.zeros((), dtype=REAL)
        examples = [state, state.clone(), like, like.clone(), state.clone()]
        try:
            graph = compose(partial(self._derivatives), examples)  # which looks at functions
            graph.graph.eliminate_dead_code()
            graph, self._captured = lifted(graph)
        except RuntimeError as error:
            text = " ".join(str(error).split())
            raise Untraceable(f"torch cannot differentiate it twice ({text[:200]})") from error
        self._layouts = [(x.shape, x.stride(), x.dtype) for x in self._captured]
        self._compare(graph, y0)
        first, rest = _results(graph, slice(0, 1)), _results(graph, slice(1, None))
        given = [*examples, *self.inputs()]
        self.rate, self.second = (_compile(one, given) for one in (first, rest))

    def inputs(self) -> list[torch.Tensor]:
        """Return what the graphs read besides, with the strides that they had."""
        return [
            x.detach()
            if x.stride() == stride and not x.is_neg()
            else torch.empty_strided(shape, stride, dtype=dtype).copy_(x.detach())
            for x, (shape, stride, dtype) in zip(self._captured, self._layouts, strict=True)
        ]

    def bound(self, traced: FieldGraph, other: FieldGraph) -> SecondGraphs:
        """Return them for another trace that differs in the tensors that it reads alone."""
        new = dict(zip(map(id, traced.captured), other.captured, strict=True))
        made = copy.copy(self)
        made._captured = tuple(new.get(id(x), x) for x in self._captured)
        return made

    def _derivatives(
        self, w: torch.Tensor, v: torch.Tensor, tau: torch.Tensor, t: torch.Tensor, y: torch.Tensor
    ) -> list[torch.Tensor]:
        field, window = self._field, self._field.problem.window
        # By the time that f gets, as its own derivatives are where that is not t.
        time = (t if window is None else window.recorded(t)).detach().requires_grad_(True)
        leaf, value = field.recorded(time, y)
        here = Linearization(field.shared, (leaf,), value, 1.0, time)
        found = here.second_vjp(w.reshape(1, -1), v.reshape(1, -1), tau.reshape(1))
        parts = [(field.parameters[k], found.parameters[k]) for k in self._indices]
        parameters = [torch.zeros_like(p) if slope is None else slope for p, slope in parts]
        rate = here.time_derivative().view(self._shape)
        return [rate, found.state.view(self._shape), *parameters]

    def _compare(self, graph: torch.fx.GraphModule, y0: torch.Tensor) -> None:
        """Compare the graph with the field itself, near y0."""
        generator = torch.Generator().manual_seed(2)
        noise, w, v = torch.randn(3, len(y0), generator=generator, dtype=REAL)
        point = y0.detach() + 1e-2 * noise * (1.0 + y0.detach().abs())
        t = torch.scalar_tensor(self._field.problem.times[0] + 0.1, dtype=REAL)
        given = [*(x.view(self._shape) for x in (w, v)), t.cos(), t, point.view(self._shape)]
        with torch.no_grad():
            found = graph(*given, *self.inputs())
        for a, b in zip(found, self._derivatives(*given), strict=True):
            if not agree(a.reshape(-1), b.reshape(-1)):
                raise Untraceable("its second derivatives are not those of its graph")


def _results(graph: torch.fx.GraphModule, chosen: slice) -> torch.fx.GraphModule:
    """Return a graph with some of its results; it takes all inputs."""
    part = copy.deepcopy(graph.graph)
    output: Any = part.output_node()
    output.args = (tuple(output.args[0][chosen]),)
    part.eliminate_dead_code()
    return torch.fx.GraphModule(graph, part)


def _compile(graph: torch.fx.GraphModule, examples: list[torch.Tensor]) -> Compiled:
    shapes = [(tuple(x.shape), x.stride(), x.dtype) for x in examples]
    name = fingerprint("second", graph.code, repr(shapes))
    return inductor.compile_graph(f"second-{name}", graph, examples)

"""Tangents of a step of an explicit Runge-Kutta method, several at once, as one graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from pnode.base.vectors import REAL
from pnode.field.products import transposed
from pnode.solvers.compiled.inductor import CompilationFailed, Compiled
from pnode.solvers.compiled.products import packet
from pnode.solvers.compiled.steps import StepGraphs, combined
from pnode.solvers.compiled.trace import FieldGraph

__all__ = ["StepTangents"]

_SOURCE = "".join(
    Path(file).read_text(encoding="utf-8") for file in (__file__, transposed.__code__.co_filename)
)


class StepTangents:
    """The graphs of the tangents of one kind of compiled step.

    With the stages U_i of a step, dk_i = f_y(U_i) dU_i + f_p(U_i) v, dU_i = du + h sum_j a_ij dk_j
    and du' = du + h sum_i b_i dk_i: the transpose of the step's adjoint.

    Parameters
    ----------
    steps : StepGraphs
        The steps.
    t, y : float, Tensor
        Near there the field's derivatives are compared with their transpose.

    Raises
    ------
    CompilationFailed
        If torch cannot transpose the field's vector-Jacobian products.
    """

    def __init__(self, steps: StepGraphs, t: float, y: torch.Tensor) -> None:
        self._steps = steps
        self._product = _undetached(steps.traced.product)
        self._check(t, y)

    @cached_property
    def entries(self) -> int:
        """How many entries the parameters have that f uses."""
        return sum(math.prod(part.shape) for part in self._steps.traced.parameters)

    def compiled(self, number: int, of_parameters: bool) -> Compiled:
        """Return ``[t, h, du, (v,) *checkpoint, *inputs] -> [du']`` for so many tangents.

        ``du`` has them one after the other, ``v`` those of all parameters as rows.
        """
        first = [torch.zeros(number * self._steps.size, dtype=REAL)]
        if of_parameters:
            first.append(torch.zeros(number, self.entries, dtype=REAL))

        def tangent(*inputs: torch.Tensor) -> tuple[torch.Tensor]:
            return (self._tangent(number, of_parameters, *inputs),)

        return self._steps.compile("tangent", tangent, first, (), number, of_parameters, _SOURCE)

    def _tangent(self, number: int, of_parameters: bool, *inputs: torch.Tensor) -> torch.Tensor:
        t, h, du, *rest = inputs
        steps, scheme, traced = self._steps, self._steps.scheme, self._steps.traced
        directions = _parted(rest.pop(0), traced) if of_parameters else []
        points, kept = steps.stages_of(rest)
        du = du.view(number, *traced.shape)
        live, slopes = scheme.live_stages(), list[Any]()
        for i, point in enumerate(points):
            if i not in live:
                slopes.append(None)  # of weight zero
                continue
            time = (t + scheme.c[i] * h).to(steps.dtype)
            saved = kept[i] if steps.keeps_saved else traced.value(time, point, *rest)[1:]
            given = combined(du, h, scheme.A[i], slopes).to(steps.dtype)
            slopes.append(self._along(given, directions, (time, point, *rest, *saved)).to(REAL))
        return combined(du, h, scheme.b, slopes).reshape(-1)

    def _along(
        self, states: torch.Tensor, directions: Sequence[torch.Tensor], here: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return f_y Z_k + f_p v_k for rows Z_k and v_k.

        The products w -> (w^T f_y, w^T f_p) are linear in w: it is their transpose.
        """

        def products(w: torch.Tensor) -> tuple[torch.Tensor, ...]:
            state, *parts = self._product(w, *here)
            return (state, *(_gradients(parts, self._steps.traced) if directions else ()))

        if len(states) == 1:
            return transposed(products, states[0], *(rows[0] for rows in directions))[None]
        result: torch.Tensor = torch.vmap(partial(transposed, products))(states, *directions)
        return result

    def _check(self, t: float, y: torch.Tensor) -> None:
        """Compare the transpose with the products themselves, near (t, y)."""
        traced, dtype = self._steps.traced, self._steps.dtype
        generator = torch.Generator().manual_seed(3)

        def noise(*lead: int) -> torch.Tensor:
            rows = torch.randn(*lead, y.numel(), generator=generator, dtype=REAL).to(dtype)
            return rows.view(*lead, *traced.shape)

        point = y.detach().view(traced.shape)
        point = (point + 1e-2 * noise() * (1.0 + point.abs())).to(dtype)
        time, w, states = torch.scalar_tensor(t, dtype=dtype), noise(), noise(2)
        given = torch.randn(2, self.entries, generator=generator, dtype=REAL)
        directions, read = _parted(given, traced), traced.inputs()
        with torch.no_grad():
            here = (time, point, *read, *traced.value(time, point, *read)[1:])
            try:
                found = self._along(states, directions, here)
            except (RuntimeError, NotImplementedError) as error:
                text = " ".join(str(error).split())
                raise CompilationFailed(f"torch cannot transpose {text[:200]}") from error
            state, *parts = traced.product(w, *here)
        pairs = [(state, states), *zip(_gradients(parts, traced), directions, strict=True)]
        terms = [(a * b).reshape(2, a.numel()).double() for a, b in pairs]
        products = (found * w).reshape(2, y.numel()).double()
        scale = sum(float(x.abs().sum()) for x in (*terms, products))
        rest = products.sum(1) - sum(x.sum(1) for x in terms)
        if not float(rest.abs().max()) <= (1e-9 if dtype is REAL else 1e-4) * scale < math.inf:
            raise CompilationFailed("the transpose of f's derivatives is another map than they")


def _undetached(graph: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Return a graph without what keeps torch from differentiating it."""
    nodes = copy.deepcopy(graph.graph)
    for node in list(nodes.nodes):
        if packet(node) is torch.ops.aten.detach:
            node.replace_all_uses_with(node.args[0])
            nodes.erase_node(node)
    return torch.fx.GraphModule(graph, nodes)


def _gradients(parts: Sequence[torch.Tensor], traced: FieldGraph) -> list[torch.Tensor]:
    """Return the products with f_p, one per parameter."""
    return [part.gradient(parts) for part in traced.parameters]


def _parted(rows: torch.Tensor, traced: FieldGraph) -> list[torch.Tensor]:
    """Return tangents of each parameter, from rows that have those of all."""
    sizes = [math.prod(part.shape) for part in traced.parameters]
    return [
        columns.reshape(len(rows), *part.shape)
        for part, columns in zip(traced.parameters, rows.split(sizes, 1), strict=True)
    ]

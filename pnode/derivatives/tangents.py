"""Tangents of a solve, and with them derivatives of every order.

A tangent Z of a state y obeys Z' = f_y Z + f_p v, driven by y and never feeding back into it. Every
method commutes with differentiation: on the steps that y took, the pair x = (y, Z) is an ordinary
problem, and the Z-part of its solution is the derivative of the discrete solution in the direction
(Z(t_0), v). With cotangents c_i of the outputs, the derivative of

    S = sum_i <c_i, Z(t_i)>

with respect to y0 and p is that of the solve's own gradient in that direction, by the symmetry of
second derivatives. So the gradient's VJP is one solve of the pair and the discrete adjoint of that;
as this is a solve like others, it can be differentiated in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from pnode.base.errors import BackwardError
from pnode.base.graphs import nodes
from pnode.base.hooks import hooks_of
from pnode.base.transforms import is_wrapped, moves
from pnode.derivatives.plain_norms import PlainNorms
from pnode.field.products import derivatives
from pnode.field.rebinding import rebound
from pnode.layout.ghost_cells import DrivenCells
from pnode.layout.pair_layout import PairLayout, RowPairs
from pnode.problems.problem import InitialValueProblem, StateLayout
from pnode.problems.tolerances import EntrywiseTolerance, Resolved
from pnode.solvers.linear.jacobians import JacobianOptions
from pnode.solvers.pairs import PairOptions
from pnode.solvers.petsc.settings import IntegratorSettings, without_structure

__all__ = ["PairFunction", "pair_problem", "pair_settings", "unique"]


#: Nodes of operations whose third derivatives torch has wrong, and remedies.
_WRONG = {
    "NativeLayerNormBackward0": "layer_norm: write (x - mean) / (var + eps).sqrt() out",
    "NativeBatchNormBackward0": "batch_norm: write (x - mean) / (var + eps).sqrt() out",
}


class PairFunction:
    """(f, f_y Z + f_p v) at (y, Z): a function as users give them, of one flat tensor.

    Parameters
    ----------
    function : callable
        The user's ``f(t, y)``, or ``F(t, y, y')``.
    layout : StateLayout
        Of y.
    pair : PairLayout
        Of (y, Z).
    parameters : sequence of Tensor
        p.
    directions : sequence of sequence of (Tensor or None)
        v, for each tangent; None being zero.
    cells : DrivenCells or None
        Of (y, Z) with ghost cells, which it gets then; what it returns has none.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        layout: StateLayout,
        pair: PairLayout,
        parameters: Sequence[torch.Tensor],
        directions: Sequence[Sequence[torch.Tensor | None]],
        cells: DrivenCells | None = None,
    ) -> None:
        self._function = function
        self._layout = layout
        self._pair = pair
        self._cells = cells
        self._parameters = tuple(parameters)
        self._directions = directions
        self._moving = [
            i for i in range(len(self._parameters)) if any(one[i] is not None for one in directions)
        ]
        self._hooks = hooks_of(self._parameters)
        self._norms: AbstractContextManager[Any] | None = None  # not looked for yet

    def __call__(self, t: torch.Tensor, x: torch.Tensor, *rate: torch.Tensor) -> torch.Tensor:
        """Return both, in one flat tensor; with their graph if there is to be one."""
        record = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (x, *rate, *self._parameters)
        )
        seen = self._pair if self._cells is None else self._cells.seen
        given = [seen.parts(part) for part in (x, *rate)]
        if any(map(is_wrapped, (x, *self._parameters))):
            return self._pair.join(self._transformed(t, given))
        with torch.enable_grad():
            arguments = [
                part[0] if part[0].requires_grad else part[0].detach().requires_grad_()
                for part in given
            ]
            value = self._evaluated(t, arguments)
            if record:  # f may take another way in each evaluation
                if self._norms is None and _wrong(value) is not None:
                    self._norms = PlainNorms()
                    value = self._evaluated(t, arguments)
                if self._norms is not None:
                    _refuse_wrong(value)
        inputs = (*arguments, *(self._parameters[i] for i in self._moving))
        tangents = [
            (*(part[k] for part in given), *(directions[i] for i in self._moving))
            for k, directions in enumerate(self._directions, start=1)
        ]
        if self._hooks is None:
            found = derivatives(value, inputs, tangents, record)
        else:
            with self._hooks.away():
                found = derivatives(value, inputs, tangents, record)
        return self._pair.join([value if record else value.detach(), *found])

    def _evaluated(self, t: torch.Tensor, arguments: Sequence[torch.Tensor]) -> torch.Tensor:
        with self._norms or nullcontext():
            return self._applied(self._function, t, arguments)

    def _applied(
        self, function: Callable[..., Any], t: torch.Tensor, arguments: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Return what the user's function makes of y, and of y', flat."""
        return self._layout.flatten(function(t, *map(self._state, arguments)))

    def apart(self) -> PairFunction:
        """Return it with parameters that are in no state's graph, for states that have one.

        A state that was computed from the parameters leads to them too, and what is wanted are
        derivatives of f at a fixed state.
        """
        if not self._moving or not torch.is_grad_enabled():
            return self
        new = {id(one): one.view_as(one) for one in self._parameters if one.requires_grad}
        made, found = self.rebound(new)
        if len(found) < len(new):
            raise BackwardError(
                "third derivatives with respect to output times and parameters need a vector field "
                "that is a torch.nn.Module with its parameters: write it as one, or pass t.detach()"
            )
        return made

    def _state(self, flat: torch.Tensor) -> Any:
        """Return y as the user's function gets it."""
        if self._cells is None:
            return self._layout.unflatten(flat)
        return flat.view(self._cells.base.ghosted_shape)

    def _transformed(
        self, t: torch.Tensor, given: Sequence[Sequence[torch.Tensor]]
    ) -> list[torch.Tensor]:
        """Return the parts of the result inside of a transform of torch.func."""

        def evaluate(*inputs: torch.Tensor) -> torch.Tensor:
            arguments, parameters = inputs[: len(given)], inputs[len(given) :]
            new = {id(old): one for old, one in zip(self._parameters, parameters, strict=True)}
            function = rebound(self._function, new)[0]
            return self._applied(function, t, arguments)

        inputs = (*(part[0] for part in given), *self._parameters)
        found: list[torch.Tensor] = []
        for k, directions in enumerate(self._directions, start=1):
            moved = (
                torch.zeros_like(one) if v is None else v
                for one, v in zip(self._parameters, directions, strict=True)
            )
            along = (*(part[k] for part in given), *moved)
            value, derivative = torch.func.jvp(evaluate, inputs, along)[:2]
            found = [value, *found[1:], derivative]
        return found

    def rebound(self, tensors: Mapping[int, torch.Tensor]) -> tuple[Any, set[int]]:
        """Return it with tensors in the place of others; see :mod:`pnode.field.rebinding`."""
        function, found = rebound(self._function, tensors)
        moved = {id(v) for one in self._directions for v in one if v is not None} & set(tensors)

        def new(tensor: Any) -> Any:
            return tensors.get(id(tensor), tensor)

        parameters = [new(parameter) for parameter in self._parameters]
        directions = [[new(v) for v in one] for one in self._directions]
        made = type(self)(function, self._layout, self._pair, parameters, directions, self._cells)
        return made, found | moved


class RowPairFunction(PairFunction):
    """The same of independent samples, of any number of rows ``(k, n)``."""

    def _applied(
        self, function: Callable[..., Any], t: torch.Tensor, arguments: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        shape, pairs = self._layout.shapes[0], self._layout.pairs
        t = t.reshape(-1, *[1] * (len(shape) - 1 - any(pairs)))
        found = function(t, *(part.reshape(len(part), *shape[1:]) for part in arguments))
        return found.reshape(len(found), -1)


def _refuse_wrong(value: torch.Tensor) -> None:
    """Refuse to differentiate tangents of what torch does not differentiate that often.

    Raises
    ------
    BackwardError
        Naming the operation.
    """
    wrong = _wrong(value)
    if wrong is not None:
        raise BackwardError(
            "second derivatives of a solve take third ones of the vector field's operations, "
            f"and torch's are wrong for {wrong}"
        )


def _wrong(value: torch.Tensor) -> str | None:
    """Return what torch does not differentiate that often in a graph, and the remedy."""
    return next((_WRONG[node.name()] for node in nodes(value) if node.name() in _WRONG), None)


def pair_problem(
    problem: InitialValueProblem,
    pair: PairLayout,
    directions: Sequence[Sequence[torch.Tensor | None]],
) -> InitialValueProblem:
    """Return the problem of a state and its tangents.

    Parameters
    ----------
    problem : InitialValueProblem
        Of the state.
    pair : PairLayout
        Of both.
    directions : sequence of sequence of (Tensor or None)
        For each tangent, that of each parameter; None being zero.
    """
    layout = problem.layout
    number = pair.tangents + 1
    shape = (pair.rows, pair.total) if isinstance(pair, RowPairs) else (layout.size * number,)
    both = StateLayout((torch.Size(shape),), False, layout.dtype, layout.device)

    exchange = problem.exchange
    cells = None if exchange is None else DrivenCells(exchange, pair.tangents)

    def of(function: Any) -> PairFunction:
        if isinstance(pair, RowPairs):
            own = layout, pair.of_row, problem.parameters, directions
            return RowPairFunction(function, *own)
        return PairFunction(function, layout, pair, problem.parameters, directions, cells)

    moving = unique([v for one in directions for v in one])
    mass = problem.mass
    return replace(
        problem, function=of(problem.function), layout=both,
        explicit=None if problem.explicit is None else of(problem.explicit),
        parameters=(*problem.parameters, *filter(moves, moving)),
        mass=None if mass is None else mass.repeated(number, both),
        check_undeclared=False, largest=problem.largest * number,
        base=replace(problem, check_undeclared=False), integrals=0, exchange=cells,
    )  # fmt: skip


def unique(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """Return the tensors among them, each once."""
    return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


def pair_settings(
    settings: IntegratorSettings, pair: PairLayout, linear_solver: dict[str, Any]
) -> IntegratorSettings:
    """Return the settings of an integrator of a state and its tangents, on steps that are given.

    ``linear_solver`` is PETSc's options of the state's own systems.
    """
    settings = without_structure(settings)
    options = JacobianOptions(
        settings.jacobian_options.reuse, pair=PairOptions.of(pair, settings, linear_solver)
    )
    number = pair.tangents + 1
    return replace(
        settings, size=settings.size * number, split=settings.split * number, adaptive=False,
        rtol=_repeated(settings.rtol, number), atol=_repeated(settings.atol, number), graphs=None,
        jacobian="pair", jacobian_options=options,
    )  # fmt: skip


def _repeated(tolerance: Resolved, number: int) -> Resolved:
    if isinstance(tolerance, EntrywiseTolerance):
        return EntrywiseTolerance(tolerance.data * number)
    return tolerance

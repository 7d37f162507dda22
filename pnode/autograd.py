"""The solve as one node of the graph that torch's reverse mode walks."""

from __future__ import annotations

from typing import Any

import torch

from pnode import sweeps
from pnode.adjoint.gradients import CostGradients
from pnode.devices import HOST, ordered, place_of
from pnode.engine import Engine
from pnode.errors import BackwardError
from pnode.evidence import differs
from pnode.problem import InitialValueProblem
from pnode.run import Requests, Run
from pnode.transforms import outside_compiler, refuse_batched
from pnode.vectorfield import VectorField

__all__ = ["SolveFunction", "solve"]


def solve(
    engine: Engine,
    problem: InitialValueProblem,
    requests: Requests,
    y0: torch.Tensor,
    t: torch.Tensor,
    trainable: bool,
) -> tuple[torch.Tensor, Run]:
    """Run a forward sweep, as a node of the graph if its result may be differentiated. Collective.

    Parameters
    ----------
    engine : Engine
        Does it.
    problem : InitialValueProblem
        What to solve.
    requests : Requests
        What else to do.
    y0, t : Tensor
        Flat initial state, and output times.
    trainable : bool
        Whether anything requires grad.
    """
    if trainable:
        holder: list[Run] = []
        ys = SolveFunction.apply(engine, problem, requests, holder, y0, t, *problem.parameters)
        return ys, holder.pop()
    own = ordered(place_of(problem.layout.device))
    with torch.inference_mode(False), torch.no_grad(), own as leave:
        state = y0.detach().clone()
        ys, run = sweeps.forward(engine, problem, state, keep=False, requests=requests)
        leave(ys)
    return ys, run


class SolveFunction(torch.autograd.Function):
    """The solve as one node of the graph: (y0, t, *parameters) -> ys."""

    @staticmethod
    def forward(
        ctx: Any,
        engine: Engine,
        problem: InitialValueProblem,
        requests: Requests,
        holder: list[Run],
        y0: torch.Tensor,
        t: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """Solve; the sweep is left in ``holder``."""
        with ordered(place_of(problem.layout.device)) as leave:
            ys, run = sweeps.forward(engine, problem, y0, keep=True, requests=requests)
            leave(ys)
        layout = problem.layout
        if run.event is None and not layout.is_tuple:
            # The result has to be the one that users keep: whoever keeps it and is what f belongs
            # to makes a cycle, which Python sees through as long as no view comes in between. Nor
            # may it be a view itself, into which users could not write.
            shape = layout.unflatten(ys).shape
            whole: Any = ys.new_empty(0)
            if type(ys) is torch.Tensor:
                ys = whole.set_(ys.untyped_storage(), ys.storage_offset(), shape)
            else:  # a subclass, which may keep its numbers elsewhere
                ys = ys.new_empty(shape).copy_(ys.view(shape))
        ctx.engine, ctx.run = engine, run
        # Saved for torch's check that nobody has modified them since, besides their values.
        ctx.save_for_backward(y0, t, ys, *parameters, *problem.frozen)
        holder.append(run)
        return ys

    @staticmethod
    @outside_compiler
    def backward(ctx: Any, *outputs: torch.Tensor) -> tuple[Any, ...]:
        """Take the discrete adjoint of the sweep."""
        (cotangents,) = outputs
        refuse_batched(cotangents)
        y0, t, ys, *_ = ctx.saved_tensors
        engine, run = ctx.engine, ctx.run
        cotangents, ys = cotangents.reshape(len(ys), -1), ys.reshape(len(ys), -1)
        with torch.no_grad(), ordered(place_of(run.problem.layout.device)) as leave:
            found = sweeps.backward(engine, run, y0, cotangents.detach(), ctx.needs_input_grad[5])
            leave(found.state, *found.parameters)
            time = None
            if ctx.needs_input_grad[5]:
                ranks, surroundings = run.problem.ranks, run.surroundings
                assert surroundings is not None
                with ranks.together(), surroundings.restored():
                    time = _time_gradient(run, ys, cotangents, found, len(t))
                time = ranks.sum(time).to(t)
        gradients = [
            found.state.to(y0.dtype) if ctx.needs_input_grad[4] else None,
            time,
            *(
                _as_parameter(gradient, parameter, used)
                for gradient, parameter, used in zip(
                    found.parameters, run.problem.parameters, run.used, strict=True
                )
            ),
        ]
        if torch.is_grad_enabled():
            anchors = [cotangents, y0, t, *run.problem.parameters]
            gradients = [
                None if gradient is None else _FirstOrderOnly.apply(gradient, *anchors)
                for gradient in gradients
            ]
        return (None, None, None, None, *gradients)


class _FirstOrderOnly(torch.autograd.Function):
    """Identity that ties a gradient to what it depends on, and refuses to be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: torch.Tensor, *anchors: torch.Tensor) -> torch.Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *outputs: torch.Tensor) -> Any:
        raise BackwardError(
            "second derivatives through a solve are not supported: use create_graph=True only "
            "where the graph does not contain the solve's gradient, or differentiate that "
            "gradient by finite differences"
        )


def _as_parameter(
    gradient: torch.Tensor | None, parameter: torch.Tensor, used: bool
) -> torch.Tensor | None:
    """Gradient in the parameter's dtype: zeros if it is used in vain, None if not at all."""
    if gradient is None:
        return torch.zeros_like(parameter) if used else None
    return gradient.to(parameter)


def _time_gradient(
    run: Run,
    ys: torch.Tensor,
    cotangents: torch.Tensor,
    found: CostGradients,
    number: int,
) -> torch.Tensor:
    """Derivatives with respect to the output times: along the exact flow, dy/dt = f.

    Those of interpolated outputs are in ``found`` already, and the time of an event, which ends
    the problem's times, is a constant here.
    """
    field = run.field(run.stats.backward)
    direction = run.problem.direction
    gradient = torch.zeros(number, dtype=torch.float64, device=HOST.device)
    interpolated = () if run.stepped is None else run.stepped.interpolated
    for index in interpolated:
        gradient[index] = direction * found.times[index]
    given = run.problem.times[: -1 if run.event is not None else None]
    for index, s in enumerate(given):
        if index in interpolated:
            continue
        cotangent = -found.initial if index == 0 else cotangents[index]
        if run.problem.ranks.parallel or bool(cotangent.ne(0).any()):
            slope = field.slope(s, ys[index].detach().clone())
            _verify_slope(run, field, index, slope)
            gradient[index] = direction * torch.dot(cotangent.double(), slope.double())
    return gradient


def _verify_slope(run: Run, field: VectorField, index: int, slope: torch.Tensor) -> None:
    """Compare f at an output with the first stage of the step that begins there, if one does."""
    scheme = run.settings.method.scheme
    if run.stepped is not None and scheme is not None and scheme.explicit:
        noted = run.stepped.noted(index)
        by = differs(slope, noted[0]) if noted else 0.0
        if by:
            run.problem.ranks.refuse(field.changed(run.problem.times[index], by))

"""The solve as a node of torch's graphs, its backward sweep as another, and tangents of both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from pnode.base.devices import ordered, place_of
from pnode.base.errors import BackwardError
from pnode.base.graphs import no_graph
from pnode.base.transforms import (
    applied,
    differentiable,
    in_forward_mode,
    is_legacy_batch,
    legacy_batch,
    moves,
    no_tangents,
    outside,
    outside_compiler,
    outside_inference,
    plain,
    refuse_traced,
    signed,
    unmoved,
)
from pnode.derivatives import continuous, sensitivity_control, tangent_solves
from pnode.derivatives.batches import (
    AdjointsFunction,
    Runs,
    Times,
    as_parameter,
    each_run,
    one_by_one,
    takes_batches,
)
from pnode.derivatives.second_sweeps import due, may_wait, solved_for, taken_with, wait
from pnode.derivatives.stage_tangents import later
from pnode.derivatives.tangent_solves import batched, may_merge, tangent, tangents_of
from pnode.derivatives.tangents import unique
from pnode.field.rebinding import bound
from pnode.problems.problem import InitialValueProblem
from pnode.sweeping import sweeps
from pnode.sweeping.engine import Engine
from pnode.sweeping.output_times import moved_by_times, start_moved_by_time, time_gradient
from pnode.sweeping.run import Requests, Run

__all__ = ["AdjointFunction", "SolveFunction", "solve"]


def solve(
    engine: Engine, problem: InitialValueProblem, requests: Requests, y0: torch.Tensor,
    t: torch.Tensor, trainable: bool, parameters: Sequence[torch.Tensor] | None = None,
) -> tuple[torch.Tensor, Run]:  # fmt: skip
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
    parameters : sequence of Tensor, optional
        The problem's, as inputs of the node.
    """
    if trainable and requests.continuous:
        return continuous.solve(engine, problem, requests, y0, t)
    if trainable:
        runs = Runs()
        inputs = problem.parameters if parameters is None else parameters
        ys = applied(SolveFunction, engine, problem, requests, runs, y0, t, None, *inputs)
        return ys, runs[0]
    own = ordered(place_of(problem.layout.device))
    with outside(), outside_inference(False), torch.no_grad(), own as leave:
        state = plain(y0).clone()
        ys, run = sensitivity_control.forward(engine, problem, state, False, requests)
        leave(ys)
    return ys, run


class SolveFunction(torch.autograd.Function):
    """The solve as one node of the graph: (y0, t, start, *parameters) -> ys.

    ``start`` has the tangents at the start of a pair as rows, None elsewhere.
    """

    @staticmethod
    @signed
    def forward(
        engine: Engine,
        problem: InitialValueProblem,
        requests: Requests,
        runs: Runs,
        y0: torch.Tensor,
        t: torch.Tensor,
        start: torch.Tensor | None,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """Solve; the sweep is left in ``runs``."""
        if start is not None:
            y0 = tangent_solves.joined(requests, y0, start)
        own, problem = problem, bound(problem, parameters)
        if own is not problem and not engine.method.implicit:  # tangents take such steps again
            requests = replace(requests, plain=True)
        if requests.known is None:
            with ordered(place_of(problem.layout.device)) as leave:
                ys, run = sensitivity_control.forward(engine, problem, y0, True, requests)
                leave(ys)
        else:
            ys, run = later(engine, problem, requests)
        if not run.roots:
            ys = problem.layout.whole(ys)
        run.let_go()
        runs.append(run)
        return ys

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keep what derivatives need."""
        engine, problem, requests, runs, y0, t, start, *parameters = inputs
        ctx.engine, ctx.requests, ctx.runs, ctx.shape = engine, requests, runs, output.shape
        ctx.set_materialize_grads(False)
        # Saved for torch's check that nobody has modified them since, besides their values.
        ctx.save_for_backward(y0, t, start, output, *parameters, *problem.frozen)
        if in_forward_mode():
            ctx.save_for_forward(y0, t, start, *parameters)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        """Solve for the tangents of several directions, all at once if these may be."""
        if may_merge(in_dims, inputs):
            return _merged(info.batch_size, in_dims, inputs), 0
        return one_by_one(SolveFunction, info, in_dims, inputs)

    @staticmethod
    @outside_compiler
    def backward(ctx: Any, *outputs: torch.Tensor | None) -> tuple[Any, ...]:
        """Take the discrete adjoint of the sweep."""
        cotangents: Any = outputs[0]
        waiting = due(ctx.runs.waiting)
        if waiting:
            each = partial(SolveFunction.backward, ctx)
            return taken_with(waiting, ctx, cotangents, each, AdjointFunction.forward)
        if cotangents is None:  # all ranks take part, also those to which nothing comes
            cotangents = torch.zeros_like(ctx.saved_tensors[3])
        refuse_traced(cotangents)
        if is_legacy_batch(cotangents):
            each = partial(SolveFunction.backward, ctx)
            return legacy_batch(each, cotangents, together=takes_batches(ctx.runs))
        y0, t, start, ys, *others = ctx.saved_tensors
        output = ys
        if start is not None:
            y0 = tangent_solves.joined(ctx.requests, y0, start)
        engine, runs, problem = ctx.engine, ctx.runs, ctx.runs[0].problem
        parameters = others[: len(problem.parameters)]
        wants_times = ctx.needs_input_grad[5]
        rows = ys.shape[0]
        if ys.dim() != 2:
            cotangents, ys = cotangents.reshape(rows, -1), ys.reshape(rows, -1)
        again = differentiable()
        times = Times()
        adjoint: Any = AdjointFunction.apply if again else AdjointFunction.forward
        last: tuple[torch.Tensor, ...] = ()
        if again and start is None and may_wait(runs, wants_times):
            adjoint, last = GradientFunction.apply, (output,)
        state, initial, *gradients = adjoint(
            engine, runs, wants_times, times, y0, t, cotangents, *parameters, *last
        )
        time = None
        if wants_times:
            with ordered(place_of(problem.layout.device)):
                time = time_gradient(
                    runs[0], y0, ys, cotangents, initial, times, t, parameters, again
                )
        begun = None
        if start is not None and state is not None:
            state, *rest = tangents_of(ctx.requests).pair.parts(state)
            begun = torch.stack(rest)
        return (
            None, None, None, None,
            state if ctx.needs_input_grad[4] else None,
            time,
            begun if ctx.needs_input_grad[6] else None,
            *gradients,
        )  # fmt: skip

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> torch.Tensor:
        """Solve for the tangent."""
        if any(one is not None and is_legacy_batch(one) for one in tangents[4:]):
            each = partial(tangent_solves.in_tuple, SolveFunction.jvp, ctx)
            return legacy_batch(each, *tangents)[0]
        if len(ctx.runs.all()) > 1:
            batch: torch.Tensor = each_run(SolveFunction.jvp, ctx, tangents)
            return batch
        along_y0, along_t, along_start, *directions = tangents[4:]
        with no_tangents():
            y0, t, start, *parameters = map(unmoved, ctx.saved_tensors)
            y0, t = y0.clone(), t.clone()  # views of these would have the tangents again
            if start is not None:
                start = start.clone()
                along_y0 = tangent_solves.joined(
                    ctx.requests, *tangent_solves.zeros_for_none(y0, along_y0, start, along_start)
                )
                y0 = tangent_solves.joined(ctx.requests, y0, start)
            run = ctx.runs.only()
            start = torch.zeros_like(y0) if along_y0 is None else along_y0
            if along_t is not None:
                start = start_moved_by_time(run, t, along_t, y0, start, parameters)
            pair, _, xs, _ = tangent(
                SolveFunction, ctx.engine, run, y0, t, parameters, start[None], [directions],
                reverse=False, own=True,
            )  # fmt: skip
            ys, Z = pair.parts(xs)
            if along_t is not None:
                first = torch.zeros_like(y0) if along_y0 is None else along_y0
                Z = moved_by_times(run, t, along_t, ys, [first, *Z[1:]], parameters)
            return Z.reshape(ctx.shape)


def _merged(number: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> torch.Tensor:
    """Solve once for a batch of tangents, and return the pairs one after the other."""
    engine, _, requests, _, y0, t, start, *parameters = inputs
    one = tangents_of(requests)
    own = len(one.run.problem.parameters)
    starts, directions = batched(number, one, in_dims[6:], (start, *parameters))
    pair, _, xs, _ = tangent(
        SolveFunction, engine, one.run, y0, t, parameters[:own], starts, directions, False
    )
    ys, *Z = pair.parts(xs)
    m = one.pair.tangents
    return torch.stack([one.pair.join([ys, *Z[k * m : (k + 1) * m]]) for k in range(number)])


class AdjointFunction(torch.autograd.Function):
    """A backward sweep as one node: (y0, t, cotangents, *parameters) -> (lambda, mu).

    Its own derivatives are those of a tangent's solve: see :mod:`pnode.derivatives.tangents`.
    """

    @staticmethod
    @signed
    def forward(
        engine: Engine,
        runs: Runs,
        wants_times: bool,
        times: Times,
        y0: torch.Tensor,
        t: torch.Tensor,
        cotangents: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor | None, ...]:
        """Take the discrete adjoint.

        Returns
        -------
        state, initial : Tensor
            The derivative with respect to y0, and the part of it that came through the flow.
        *parameters : Tensor or None
            With respect to each parameter; zeros if it is used in vain, None if not at all.

        ``times`` gets the derivatives with respect to the times of interpolated outputs.
        """
        run = runs[0]
        with no_graph(), ordered(place_of(run.problem.layout.device)) as leave:
            found = sweeps.backward(engine, run, y0, cotangents.detach(), wants_times)
            leave(found.state, *found.parameters)
        times.update(found.times)
        return (
            found.state.to(y0.dtype),
            found.initial.to(y0.dtype),
            *map(as_parameter, found.parameters, parameters, run.used),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what derivatives need."""
        ctx.engine, ctx.runs, _, _, *tensors = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, Any]:
        """Take one sweep for all if they are of one solve, otherwise one for each."""
        _, runs, _, _, y0, t, cotangents, *parameters = inputs
        engine, dims = inputs[0], in_dims[4:]
        if takes_batches(runs) and {*dims[:2], *dims[3:]} <= {None}:
            rows = cotangents.movedim(dims[2], 0)
            found = AdjointsFunction.apply(AdjointFunction, engine, runs, y0, t, rows, *parameters)
            return found, tuple(None if one is None else 0 for one in found)
        return one_by_one(AdjointFunction, info, in_dims, inputs)

    @staticmethod
    @outside_compiler
    def backward(ctx: Any, *outputs: torch.Tensor | None) -> tuple[Any, ...]:
        """Solve for the tangent along the outputs' cotangents, and take its gradient."""
        for tensor in outputs:
            if tensor is not None:
                refuse_traced(tensor)
        if any(one is not None and is_legacy_batch(one) for one in outputs):
            return legacy_batch(partial(AdjointFunction.backward, ctx), *outputs)
        again = differentiable()
        wants_y0, wants_t, wants_cotangents, *wants = ctx.needs_input_grad[4:]
        gradient = wants_y0 or wants_t or any(wants)
        second, xs, along = solved_for(SolveFunction, ctx, outputs, gradient or again)
        found: list[torch.Tensor | None] = [None] * (3 + len(wants))
        found[2] = along if wants_cotangents else None
        if gradient:
            times = Times()
            adjoint: Any = AdjointFunction.apply if again else AdjointFunction.forward
            seeds, both, beginning, gradients = second.take(adjoint, wants_t, times)
            found[0] = second.pair.parts(both)[0] if wants_y0 else None
            found[3:] = gradients[: len(wants)]
            if wants_t:
                found[1] = time_gradient(
                    second.runs[0], second.x0, xs, seeds, beginning, times, second.t,
                    second.parameters, again,
                )  # fmt: skip
        return (None, None, None, None, *found)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[torch.Tensor | None, ...]:
        """Take the gradient of the tangent's solve: second derivatives are symmetric."""
        if any(one is not None and is_legacy_batch(one) for one in tangents[4:]):
            return legacy_batch(partial(AdjointFunction.jvp, ctx), *tangents)
        along_y0, along_t, along_cotangents, *directions = tangents[4:]
        if along_t is not None:
            raise BackwardError(
                "forward mode over reverse mode cannot carry a tangent of t through a solve: "
                "differentiate by t in reverse mode"
            )
        with no_tangents():
            y0, t, cotangents, *parameters = map(unmoved, ctx.saved_tensors)
            y0, t, cotangents = y0.clone(), t.clone(), cotangents.clone()
            run = ctx.runs.only()
            start = torch.zeros_like(y0) if along_y0 is None else along_y0
            pair, x0, _, runs = tangent(
                SolveFunction, ctx.engine, run, y0, t, parameters, start[None], [directions], True
            )
            zero = torch.zeros_like(cotangents)
            moved = zero if along_cotangents is None else along_cotangents
            seeds = tangent_solves.after_first(pair.join([moved, cotangents]))
            both, _, *gradients = AdjointFunction.apply(
                ctx.engine, runs, False, Times(), x0, t, seeds, *parameters,
                *filter(moves, unique(directions)),
            )  # fmt: skip
            initial = pair.parts(both)[0]
            return (initial + moved[0], initial, *gradients[: len(parameters)])


class GradientFunction(torch.autograd.Function):
    """AdjointFunction of a solve whose outputs are the last input.

    Its solve's backward pass then comes after this one's, and takes the adjoint of both at once.
    """

    @staticmethod
    @signed
    def forward(*inputs: Any) -> tuple[torch.Tensor | None, ...]:
        """Take the discrete adjoint; see :class:`AdjointFunction`."""
        return AdjointFunction.forward(*inputs[:-1])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Keep what derivatives need."""
        AdjointFunction.setup_context(ctx, inputs[:-1], output)
        ctx.shape = inputs[-1].shape

    @staticmethod
    @outside_compiler
    def backward(ctx: Any, *outputs: torch.Tensor | None) -> tuple[Any, ...]:
        """Solve for the tangent along the outputs' cotangents, and leave its gradient for later."""
        own = SimpleNamespace(
            engine=ctx.engine, runs=ctx.runs, saved_tensors=ctx.saved_tensors,
            needs_input_grad=ctx.needs_input_grad[:-1],
        )  # fmt: skip
        given = [one for one in outputs if one is not None]
        if differentiable() or any(map(is_legacy_batch, given)):
            pull_back = AdjointFunction.backward
            return (*pull_back(own, *outputs), None)
        for tensor in given:
            refuse_traced(tensor)
        second, _, along = solved_for(SolveFunction, own, outputs, True)
        wait(ctx.runs.waiting, second)
        others = [None] * (len(own.needs_input_grad) - 7)
        # The solve's node has the gradients by y0 and the parameters, and is called for zeros.
        nothing = torch.zeros_like(along).reshape(ctx.shape)
        return None, None, None, None, None, None, along, *others, nothing

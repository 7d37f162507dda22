"""Independent samples: every row of y0 is a problem of its own, with its own steps and times."""

from __future__ import annotations

from typing import Any

import torch

from pnode import tolerances
from pnode.adjoint.sample_adjoint import sample_adjoint
from pnode.batches import as_parameter
from pnode.errors import BackwardError, ConfigurationError
from pnode.problem import InitialValueProblem, StateLayout, as_times, collect_parameters
from pnode.solution import Solution, Stats
from pnode.solvers.sample_steps import SampleSweep, live_scheme
from pnode.surroundings import Surroundings
from pnode.transforms import differentiable, is_legacy_batch, refuse_moving, refuse_transforms
from pnode.vectorfield import VectorField, record_all
from pnode.vectors import REAL
from pnode.watching import watched

__all__ = ["solve"]


class RowsField(VectorField):
    """f on all rows, at a time for each: a tensor of shape ``(B,)`` in place of a number."""

    def _time(self, s: Any) -> torch.Tensor:
        shape = self._layout.shapes[0]
        return s.to(self._layout.dtype).view(-1, *[1] * (len(shape) - 1))

    def rate(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return f at times ``(B,)`` and states ``(B, n)``, in double precision."""
        own = u.to(self.dtype, copy=True).reshape(-1)
        return self.rhs(t, own).to(REAL).view_as(u)  # type: ignore[arg-type]


def solve(solver: Any, y0: Any, t: Any, args: Any) -> Solution:
    """Solve each row of y0 by itself; see :meth:`Solver.forward`. Not collective.

    Raises
    ------
    ConfigurationError
        For unusable arguments, and for what independent samples do not go with.
    SolveError
        Naming the row that failed.
    """
    engine = solver._engine
    _refuse_unsupported(solver)
    if args is not None:
        raise ConfigurationError(
            "args= with samples='independent' is not supported: give f its tensors by params=, or "
            "as a Module"
        )
    if isinstance(y0, torch.Tensor) and y0.is_complex():
        raise ConfigurationError(
            "y0 is complex, which samples='independent' does not support: give "
            "torch.view_as_real(y0), and a vector field for that"
        )
    declared = collect_parameters(solver._functions, solver._params)
    named = [("y0", y0), ("t", t), *(("a parameter", one) for one in declared)]
    refuse_transforms(named[:2], declared)
    refuse_moving(named, "and samples='independent' has derivatives in reverse mode alone")
    layout = StateLayout.of(y0)
    if layout.is_tuple or not y0.dim():
        given = "a tuple" if layout.is_tuple else "no dimensions"
        raise ConfigurationError(
            f"y0 has {given}: with samples='independent' give one tensor of shape (B, ...), whose "
            "rows are the samples"
        )
    if y0.device.type != "cpu" and solver._device_state == "host":
        raise ConfigurationError(
            "device_state='host' with samples='independent' is not supported: drop it"
        )
    times, resolution = _times(t, len(y0))
    differentiate = torch.is_grad_enabled()
    wanted = tuple(one for one in declared if differentiate and one.requires_grad)
    problem = InitialValueProblem(
        watched(solver.rhs, declared), layout, (0.0, 1.0), 1.0, wanted,
        tuple(one for one in declared if not one.requires_grad), differentiate,
        resolution=resolution,
    )  # fmt: skip
    stats = Stats()
    ys = _SolveFunction.apply(engine, problem, solver._requests, stats, y0, times, *wanted)
    return Solution(times, ys, stats)


def _refuse_unsupported(solver: Any) -> None:
    engine = solver._engine
    if engine.comm.size > 1:
        raise ConfigurationError(
            f"comm has {engine.comm.size} ranks: with samples='independent' samples share nothing; "
            "give each rank a solver of its own without comm="
        )
    if engine.setup is not None:
        raise ConfigurationError(
            "petsc_setup= with samples='independent' has no effect, its steps are torch's: drop it"
        )
    if engine.compile is True or engine.petsc_options:
        name = (
            "compile=True" if engine.compile is True else f"petsc_options={engine.petsc_options!r}"
        )
        raise ConfigurationError(
            f"{name} with samples='independent' has no effect, its steps are torch's: drop it"
        )
    if tolerances.is_partial(engine.control.atol):
        raise ConfigurationError(
            "atol has infinite entries, which samples='independent' does not support: give finite "
            "ones"
        )


def _times(t: Any, rows: int) -> tuple[torch.Tensor, float]:
    """Return output times, shape ``(T, B)``, and the relative spacing of their numbers."""
    if not isinstance(t, torch.Tensor):
        try:
            t = torch.as_tensor(t, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            t = as_times(t)
    if t.dim() not in (1, 2) or (t.dim() == 2 and len(t) != rows):
        raise ConfigurationError(
            f"t has shape {tuple(t.shape)}: with samples='independent' give output times of shape "
            f"(T,), or (B, T) = ({rows}, T) for times of each row's own"
        )
    as_times(t.reshape(-1))
    resolution = torch.finfo(t.dtype if t.is_floating_point() else torch.float64).eps
    times = t.t() if t.dim() == 2 else t[:, None].expand(-1, rows)
    ahead = times.detach().to(REAL).diff(dim=0)
    wrong = (ahead.sign() != ahead[:1].sign()) | (ahead.abs() < 1e-200) | ~ahead.isfinite()
    if bool(wrong.any()):
        index, row = wrong.nonzero()[0].tolist()
        raise ConfigurationError(
            f"t[{index + 1}] = {float(times[index + 1, row])!r} follows t[{index}] = "
            f"{float(times[index, row])!r} in row {row}: output times must strictly increase or "
            "strictly decrease"
        )
    return times, resolution


class _SolveFunction(torch.autograd.Function):
    """The solve as one node of the graph: (y0, times, *parameters) -> ys."""

    @staticmethod
    def forward(
        ctx: Any, engine: Any, problem: InitialValueProblem, requests: Any, stats: Stats,
        y0: torch.Tensor, times: torch.Tensor, *parameters: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        """Solve."""
        control, layout = engine.control, problem.layout
        keep = problem.check_undeclared and any(ctx.needs_input_grad)
        field = RowsField(problem, stats)
        if keep:
            record_all(field)
            ctx.surroundings = Surroundings([problem.function], layout.device)
        rtol, atol = tolerances.resolve(control.rtol, control.atol, layout)
        flat = y0.detach().to(REAL).reshape(len(y0), -1)
        sweep = SampleSweep(
            engine.method, control, field.rate, times.detach().to(layout.device, REAL),
            problem.resolution,
            _by_rows(rtol, flat), _by_rows(atol, flat),
            layout.dtype, keep, requests.independent == "nan", stats,
        )  # fmt: skip
        ys = sweep.run(flat.clone()).to(layout.dtype).view(len(times), *y0.shape)
        stats.ram_bytes = sum(stage.nbytes for one in sweep.passes for stage in one.stages)
        ctx.field, ctx.passes, ctx.stats = field, sweep.passes, stats
        ctx.scheme = live_scheme(engine.method, control.step_size is None)
        ctx.save_for_backward(y0, times, ys, *parameters, *problem.frozen)
        return ys

    @staticmethod
    def backward(ctx: Any, cotangents: torch.Tensor) -> Any:
        """Take the discrete adjoint of each row's steps."""
        if is_legacy_batch(cotangents):
            raise BackwardError(
                "a batch of cotangents (vectorize=True, is_grads_batched) cannot pass through a "
                "solve with samples='independent': take a loop"
            )
        if differentiable():
            raise BackwardError(
                "second derivatives of a solve with samples='independent' are not supported: take "
                "samples='joint' for them"
            )
        _, times, ys, *_ = ctx.saved_tensors
        own, field = ctx.stats.backward, ctx.field
        field.ledger = own
        number, rows = times.shape
        seeds = cotangents.to(REAL).reshape(number, rows, -1)
        with ctx.surroundings.restored():
            initial, found = sample_adjoint(ctx.scheme, field, ctx.passes, seeds, own)
            by_times = None
            if ctx.needs_input_grad[5]:
                by_times = _by_times(field, times, ys.reshape(number, rows, -1), seeds, initial)
        gradients = [
            as_parameter(one, parameter, used)
            for one, parameter, used in zip(found, field.parameters, field.used, strict=True)
        ]
        state = (initial + seeds[0]).view(ys.shape[1:]).to(ys.dtype)
        return None, None, None, None, state, by_times, *gradients


def _by_rows(tolerance: tolerances.Resolved, flat: torch.Tensor) -> float | torch.Tensor:
    value = tolerances.values(tolerance, flat.device)
    return value if isinstance(value, float) else value.view_as(flat)


def _by_times(
    field: RowsField, times: torch.Tensor, ys: torch.Tensor, seeds: torch.Tensor,
    initial: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Return derivatives by the output times, shape ``(T, B)``: along the exact flow."""
    terms = []
    for index, (when, y) in enumerate(zip(times, ys, strict=True)):
        reached = ~y.isnan().any(dim=1, keepdim=True)
        state = torch.where(reached, y, ys[0])
        slope = field.rate(when.to(y.device, REAL), state.to(REAL))
        seed = -initial if index == 0 else seeds[index]
        terms.append(torch.where(reached, seed * slope, 0.0).sum(dim=1))
    return torch.stack(terms).to(times)

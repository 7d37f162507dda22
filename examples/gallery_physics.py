"""What the gallery's examples of physics share: second-order fits, and gradients of peers."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gallery_common import Training, measure, peer, train
from scipy.optimize import least_squares

import pnode

BUNDLE = 10  # iterations of L-BFGS between two chances to save


def polish(
    model: torch.nn.Module,
    loss: Callable[[], torch.Tensor],
    options: argparse.Namespace,
    iterations: int,
    label: str = "polish",
) -> Training:
    """Minimise a smooth, deterministic loss by L-BFGS, which Adam has led near.

    One entry of the losses is ten iterations.
    """
    return train(
        model, loss, options, iterations=max(iterations // BUNDLE, 1), label=label, constant=True,
        optimizer=lambda parameters: torch.optim.LBFGS(
            parameters, max_iter=BUNDLE, history_size=50, tolerance_grad=1e-10,
            tolerance_change=1e-14, line_search_fn="strong_wolfe",
        ),
    )  # fmt: skip


def fit(
    solver: pnode.Solver,
    names: Sequence[str],
    y0: torch.Tensor,
    times: torch.Tensor,
    residual: Callable[[torch.Tensor], torch.Tensor],
    evaluations: int = 15,
    fit_start: bool = False,
) -> tuple[torch.Tensor, float]:
    """Fit parameters of a solver's field by Levenberg and Marquardt; they end at the best values.

    The Jacobian is that of the solver's numbers, ``pnode.sensitivities``, times that of
    ``residual``.

    Parameters
    ----------
    solver : pnode.Solver
        Its field has the parameters ``names``.
    y0, times : Tensor
        Initial state, which is fitted too with ``fit_start``, and output times.
    residual : callable
        Of ``ys``, shape ``(T, *state)``; returns a vector.
    evaluations : int
        Most trials of values.

    Returns
    -------
    y0 : Tensor
    cost : float
        The sum of squared residuals; infinite if even the first trial could not be solved.
    """
    known = dict(solver.rhs.named_parameters())  # type: ignore[union-attr]
    parameters = [known[name] for name in names]
    sizes = [y0.numel() if fit_start else 0, *(p.numel() for p in parameters)]
    first = [y0.reshape(-1)] if fit_start else [y0.new_zeros(0)]

    def place(values: np.ndarray) -> torch.Tensor:
        start, *rest = torch.as_tensor(values).split(sizes)
        with torch.no_grad():
            for parameter, part in zip(parameters, rest, strict=True):
                parameter.copy_(part.reshape(parameter.shape))
        return start.reshape(y0.shape) if fit_start else y0

    def residuals(values: np.ndarray) -> np.ndarray:
        try:
            with torch.no_grad():
                return residual(solver(place(values), times).ys).numpy()
        except pnode.SolveError:  # far too long a step: least_squares makes it shorter
            return np.full(count, 1e6)

    def jacobian(values: np.ndarray) -> np.ndarray:
        start = place(values)
        wrt = (*(("y0",) if fit_start else ()), *names)
        found = pnode.sensitivities(solver, start, times, wrt=wrt)
        with torch.no_grad():
            ys = solver(start, times).ys
        rows = torch.cat([found[name].reshape(ys.numel(), -1) for name in wrt], dim=1)
        outer = torch.func.jacrev(lambda flat: residual(flat.reshape(ys.shape)))(ys.reshape(-1))
        result: np.ndarray = (outer @ rows).numpy()
        return result

    start = torch.cat([*first, *(p.detach().reshape(-1) for p in parameters)]).numpy()
    try:
        with torch.no_grad():
            count = residual(solver(place(start), times).ys).numel()
    except pnode.SolveError:
        return y0, float("inf")
    found = least_squares(residuals, start, jacobian, method="trf", max_nfev=evaluations)
    return place(found.x), 2.0 * float(found.cost)


def drop_terms(
    values: torch.Tensor, candidates: torch.Tensor, allowed: Sequence[int]
) -> dict[int, list[int]]:
    """Return the sets of 1, 2, ... candidates left when the least needed ones are dropped."""
    columns = candidates / candidates.norm(dim=0)
    active, sets = list(allowed), {}

    def rest(chosen: list[int]) -> float:
        matrix = columns[:, chosen]
        solved = torch.linalg.lstsq(matrix, values[:, None]).solution
        result: float = (matrix @ solved - values[:, None]).norm().item()
        return result

    while len(active) > 1:
        active = min(([i for i in active if i != out] for out in active), key=rest)
        sets[len(active)] = active
    return sets


class Counted(torch.nn.Module):
    """A vector field that counts its evaluations, for solvers that do not."""

    def __init__(self, field: torch.nn.Module) -> None:
        super().__init__()
        self.field, self.calls = field, 0

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Evaluate, and count."""
        self.calls += 1
        result: torch.Tensor = self.field(t, y)
        return result


def compare_gradients(
    field: torch.nn.Module,
    loss: Callable[[Callable[..., torch.Tensor]], torch.Tensor],
    parameters: Sequence[torch.Tensor],
    *,
    method: str,
    step_size: float | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-8,
    exact: Sequence[torch.Tensor] | None = None,
    quick: bool = False,
    compiled: bool = True,
) -> list[dict[str, Any]]:
    """Measure the gradient of a loss by pnode and by torchdiffeq, with the same method.

    Parameters
    ----------
    field : Module
        The vector field.
    loss : callable
        Of ``solve(y0, t)``, which returns the states.
    parameters : sequence of Tensor
        What the gradients are taken of.
    method, step_size, rtol, atol
        The method, of the same name in both packages; with fixed steps, or adaptive.
    exact : sequence of Tensor, optional
        The gradients as they should be; by default those of tolerances near round-off.
    quick : bool
        Measure each once, and nothing compiled.
    compiled : bool
        Whether the field can be compiled.

    Returns
    -------
    list of dict
        A row for each way to the gradient: error, evaluations of the field (backward ones
        included), CPU time, memory, and the ratio of CPU times to the first row's. Adaptive steps
        are those to the outputs and, as torchdiffeq's, those of ``dense=True``. Compiled is what
        pnode's default comes to in a training; the compilation is not in the time. torchdiffeq's
        rows are left out where it is not installed, which a line says.
    """
    counted = Counted(field)
    tight = pnode.Solver(field, method="dopri5", rtol=1e-11, atol=1e-12, compile=False)
    steps: dict[str, Any] = {"step_size": step_size} if step_size else {"rtol": rtol, "atol": atol}
    solvers = {"pnode": pnode.Solver(counted, method=method, compile=False, **steps)}
    if not step_size:
        solvers["pnode, dense=True"] = pnode.Solver(
            counted, method=method, compile=False, dense=True, **steps
        )
    if compiled and not quick:
        solvers["pnode, compiled"] = pnode.Solver(field, method=method, compile=True, **steps)
    ways: dict[str, Callable[..., torch.Tensor]] = {
        name: lambda y0, t, solver=solver: solver(y0, t).ys for name, solver in solvers.items()
    }
    package = peer("torchdiffeq")
    options = {"options": {"step_size": step_size}} if step_size else steps
    for name in ("odeint", "odeint_adjoint") if package is not None else ():
        call = getattr(package, name)
        ways[f"torchdiffeq {name}"] = lambda y0, t, call=call: call(
            counted, y0, t, method=method, **options
        )

    def gradients(solve: Callable[..., torch.Tensor]) -> torch.Tensor:
        found = torch.autograd.grad(loss(solve), list(parameters))
        return torch.cat([part.reshape(-1) for part in found])

    if exact is None:
        wanted = gradients(lambda y0, t: tight(y0, t).ys)
    else:
        wanted = torch.cat([part.reshape(-1) for part in exact])
    rows: list[dict[str, Any]] = []
    for name, solve in ways.items():
        counted.calls = 0
        gradients(solve)  # to warm up; a compiled one calls the field itself
        calls = counted.calls or None
        measured = measure(lambda solve=solve: gradients(solve), 1 if quick else 5)  # type: ignore[misc]
        rows.append({
            "what": f"gradient, {name}",
            "error": ((measured.value - wanted).norm() / wanted.norm()).item(),
            "f": calls, "CPU ms": 1e3 * measured.cpu_seconds,
            "MiB": measured.peak_mib,
        })  # fmt: skip
        rows[-1]["ratio"] = rows[-1]["CPU ms"] / rows[0]["CPU ms"]
    return rows


def diffrax_gradient(
    field: Callable[[Any, Any, Any], Any],
    model: torch.nn.Module,
    starts: torch.Tensor,
    times: torch.Tensor,
    loss: Callable[[Any], Any],
    *,
    rtol: float,
    atol: float | Sequence[float],
) -> Callable[[], torch.Tensor] | None:
    """Return a function that computes a loss's gradient by diffrax; None where it is missing.

    The method is Kvaerno's of order 3, the whole gradient jitted.

    Parameters
    ----------
    field : callable
        The vector field in jax: of jax, the state, and the model's parameters by their names.
    model : Module
        Has the parameters.
    starts, times : Tensor
        Initial states, one solve from each, and output times.
    loss : callable
        Of the states, an array of jax of shape ``(starts, times, state)``.
    rtol, atol
        Tolerances.
    """
    jax, diffrax = peer("jax"), peer("diffrax")
    if jax is None or diffrax is None:
        return None
    jax.config.update("jax_enable_x64", True)
    array = jax.numpy.asarray
    weights = {name: array(p.detach().numpy()) for name, p in model.named_parameters()}
    t = array(times.numpy())

    def solve(start: Any, w: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda t, y, w: field(jax, y, w)), diffrax.Kvaerno3(), t[0], t[-1],
            None, start, w, saveat=diffrax.SaveAt(ts=t), max_steps=4096,
            stepsize_controller=diffrax.PIDController(rtol=rtol, atol=array(atol)),
        ).ys  # fmt: skip

    def loss_of(w: Any) -> Any:
        return loss(jax.numpy.stack([solve(start, w) for start in array(starts.numpy())]))

    gradient = jax.jit(jax.grad(loss_of))

    def call() -> torch.Tensor:
        found = jax.block_until_ready(gradient(weights))
        parts = [torch.tensor(found[name].tolist(), dtype=torch.float64) for name in weights]
        return torch.cat([part.reshape(-1) for part in parts])

    return call

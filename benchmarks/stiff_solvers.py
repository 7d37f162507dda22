"""The stiff solvers of ``stiff.py`` behind one interface.

What is counted, for every solver alike, is what it asks of the problem:

- ``rhs``: evaluations of f;
- ``jvp``: Jacobian-vector products outside of assembled Jacobians;
- ``columns``: columns of assembled Jacobians, n each. SciPy and CVODE are given the analytic
  Jacobian and would pay n evaluations of f without it; pnode gets n rows from batched VJPs;
  diffrax n columns from JVPs.

How: pnode's ledger, in which an evaluation that records a graph is one of ``rhs``; for SciPy and
CVODE Python counters in the functions they call; for diffrax, which compiles everything,
``jax.pure_callback`` counters in f and in its JVP rule, at run time, in a program of its own:
what XLA drops or the solver skips is not counted. Kvaerno5 forms two Jacobians per attempted step,
the first of them for its explicit stage.

Times are of separate runs without counters. Fields are torch functions for pnode, JAX functions
for diffrax, and plain Python on floats, which is faster than NumPy for a few components, for SciPy
and CVODE: times compare what a user waits for, counts compare the algorithms.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Protocol

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import numpy as np
import torch
from scipy.integrate import solve_ivp
from stiff_problems import Problem

import pnode

__all__ = ["Run", "SolveFailed", "Unavailable", "create_solver", "diffrax_solve"]

MAX_STEPS = 100_000


class Unavailable(Exception):
    """A solver that is not there."""


class SolveFailed(Exception):
    """A solve that did not reach the end."""


@dataclass
class Run:
    """One counted solve; ``None`` where the solver does not say."""

    y: np.ndarray
    rhs: int
    jvp: int
    jacobians: int
    steps: int
    rejected: int | None = None
    newton: int | None = None
    factored: int | None = None


class StiffSolver(Protocol):
    """A solver of one problem."""

    def count(self, rtol: float) -> Run:
        """Solve and count."""

    def solve(self, rtol: float) -> Any:
        """Solve and do nothing else."""


def create_solver(name: str, problem: Problem) -> StiffSolver:
    """Return the solver called ``name``: a pnode method, or one of :data:`PEERS`.

    ``bdf:compiled`` is pnode's method with ``compile=True``.

    Raises
    ------
    Unavailable
        If it is not installed or does not exist.
    """
    if name in PEERS:
        package, create = PEERS[name]
        if find_spec(package) is None:
            raise Unavailable(f"{package} is not installed")
        return create(problem)
    return _Pnode(problem, *name.split(":"))


class _Pnode:
    def __init__(self, problem: Problem, method: str, how: str = "") -> None:
        if how not in ("", "compiled"):
            raise Unavailable(f"there is no {how!r}, only method:compiled")
        self._problem = problem
        self._method, self._compile = method, how == "compiled"
        self._y0 = torch.tensor(problem.start, dtype=torch.float64)
        self._times = torch.tensor([0.0, problem.end], dtype=torch.float64)
        self._solvers: dict[float, pnode.Solver] = {}
        try:
            self._solver(1e-3)
        except pnode.ConfigurationError:
            raise Unavailable("pnode has no adaptive method of this name") from None

    def _field(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack(self._problem.field(y.unbind(), self._problem.parameters))

    def _solver(self, rtol: float) -> pnode.Solver:
        if rtol not in self._solvers:
            self._solvers[rtol] = pnode.Solver(
                self._field, method=self._method, rtol=rtol, atol=self._problem.ratio * rtol,
                max_steps=MAX_STEPS, compile=self._compile,
            )  # fmt: skip
        return self._solvers[rtol]

    def solve(self, rtol: float) -> pnode.Solution:
        with torch.no_grad():
            try:
                return self._solver(rtol)(self._y0, self._times)
            except pnode.PnodeError as error:
                raise SolveFailed(str(error)) from error

    def count(self, rtol: float) -> Run:
        solution = self.solve(rtol)
        stats = solution.stats
        return Run(
            solution.ys[-1].numpy(), stats.rhs, stats.jvp, stats.jacobians, stats.steps,
            stats.rejected, stats.newton, stats.factorizations or None,
        )  # fmt: skip


class _Calls:
    """A function that counts its calls."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.count = 0

    def __call__(self, *arguments: Any) -> Any:
        self.count += 1
        return self._function(*arguments)


class _Scipy:
    def __init__(self, problem: Problem, method: str) -> None:
        self._problem = problem
        self._method = method

    def _rhs(self, t: float, y: np.ndarray) -> list[float]:
        return self._problem.field(y.tolist(), self._problem.parameters)

    def _jacobian(self, t: float, y: np.ndarray) -> list[list[float]]:
        return self._problem.jacobian(y.tolist(), self._problem.parameters)

    def solve(self, rtol: float) -> Any:
        return self._solve(rtol, self._rhs, self._jacobian)

    def _solve(self, rtol: float, rhs: Any, jacobian: Any) -> Any:
        solved = solve_ivp(
            rhs, (0.0, self._problem.end), self._problem.start, method=self._method, jac=jacobian,
            rtol=rtol, atol=self._problem.ratio * rtol,
        )  # fmt: skip
        if not solved.success:
            raise SolveFailed(solved.message)
        return solved

    def count(self, rtol: float) -> Run:
        rhs, jacobian = _Calls(self._rhs), _Calls(self._jacobian)
        solved = self._solve(rtol, rhs, jacobian)
        return Run(solved.y[:, -1], rhs.count, 0, jacobian.count, len(solved.t) - 1,
                   factored=solved.nlu)  # fmt: skip


class _Cvode:
    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._start = np.array(problem.start)
        self._times = np.array([0.0, problem.end])

    def _rhs(self, t: float, y: np.ndarray, out: np.ndarray) -> None:
        out[:] = self._problem.field(y.tolist(), self._problem.parameters)

    def _jacobian(self, t: float, y: np.ndarray, f: np.ndarray, out: np.ndarray) -> None:
        out[:] = self._problem.jacobian(y.tolist(), self._problem.parameters)

    def solve(self, rtol: float) -> Any:
        return self._solve(rtol, self._rhs, self._jacobian)

    def _solve(self, rtol: float, rhs: Any, jacobian: Any) -> Any:
        from sksundae.cvode import CVODE

        solver = CVODE(
            rhs, jacfn=jacobian, rtol=rtol, atol=self._problem.ratio * rtol,
            max_num_steps=MAX_STEPS,
        )  # fmt: skip
        solved = solver.solve(self._times, self._start)
        if not solved.success:
            raise SolveFailed(solved.message)
        return solved

    def count(self, rtol: float) -> Run:
        rhs, jacobian = _Calls(self._rhs), _Calls(self._jacobian)
        # It looks at how many arguments a function takes.
        solved = self._solve(
            rtol, lambda t, y, out: rhs(t, y, out), lambda t, y, f, out: jacobian(t, y, f, out)
        )
        return Run(solved.y[-1], rhs.count, 0, jacobian.count, len(solved.t) - 1)


def diffrax_solve(
    field: Any, y0: Any, parameters: Any, end: Any, rtol: Any, atol: Any, solver: Any = None,
    max_steps: int = MAX_STEPS, **keywords: Any,
) -> Any:  # fmt: skip
    """Trace diffrax's Kvaerno5, or another solver, from 0 to ``end`` for ``field(y, p)``.

    The step sizes are those of a PI controller: diffrax's default, an integral controller, has
    Kvaerno5 reject half of its steps on these problems.
    """
    import diffrax

    return diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, p: field(y, p)), solver or diffrax.Kvaerno5(), 0.0, end, None,
        y0, parameters, saveat=diffrax.SaveAt(t1=True), max_steps=max_steps, throw=False,
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol, pcoeff=0.4, icoeff=0.3),
        **keywords,
    )  # fmt: skip


class _Diffrax:
    def __init__(self, problem: Problem) -> None:
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        self._problem = problem
        self._start = jnp.array(problem.start)
        self._parameters = jnp.array(problem.parameters)
        self._counts = {"rhs": 0, "jvp": 0}

        def field(y: Any, p: Any) -> Any:
            return jnp.stack(problem.field(tuple(y), p))

        @jax.custom_jvp
        def counted(y: Any, p: Any) -> Any:
            return self._counting("rhs", field(y, p))

        @counted.defjvp
        def counted_jvp(primals: Any, tangents: Any) -> Any:
            _, tangent = jax.jvp(field, primals, tangents)
            return counted(*primals), self._counting("jvp", tangent)

        def compiled(function: Any) -> Any:
            return jax.jit(lambda *arguments: diffrax_solve(function, *arguments))

        self._bare, self._counted = compiled(field), compiled(counted)

    def _counting(self, what: str, array: Any) -> Any:
        """Return ``array`` as it is, by way of a function that counts."""
        import jax

        def count(value: Any) -> np.ndarray:
            self._counts[what] += 1
            return np.asarray(value)

        shape = jax.ShapeDtypeStruct(array.shape, array.dtype)
        return jax.pure_callback(count, shape, array, vmap_method="sequential")

    def solve(self, rtol: float) -> Any:
        return self._solve(self._bare, rtol)

    def _solve(self, program: Any, rtol: float) -> Any:
        import diffrax

        solved = program(
            self._start, self._parameters, self._problem.end, rtol, self._problem.ratio * rtol
        )
        solved.ys.block_until_ready()
        if solved.result != diffrax.RESULTS.successful:
            raise SolveFailed(diffrax.RESULTS[solved.result])
        return solved

    def count(self, rtol: float) -> Run:
        self._counts.update(rhs=0, jvp=0)
        solved = self._solve(self._counted, rtol)
        jacobians, rest = divmod(self._counts["jvp"], len(self._problem.start))
        steps, rejected = (
            int(solved.stats[f"num_{kind}_steps"]) for kind in ("accepted", "rejected")
        )
        return Run(np.asarray(solved.ys[-1]), self._counts["rhs"], rest, jacobians, steps, rejected)


#: Solvers that are not pnode's: the package each needs, and how to make it for a problem.
PEERS: dict[str, tuple[str, Callable[[Problem], StiffSolver]]] = {
    "diffrax-kvaerno5": ("diffrax", _Diffrax),
    "scipy-radau": ("scipy", lambda problem: _Scipy(problem, "Radau")),
    "scipy-bdf": ("scipy", lambda problem: _Scipy(problem, "BDF")),
    "cvode-bdf": ("sksundae", _Cvode),
}

"""Coefficients of one-step implicit methods as one kind of table, for compiled sweeps.

PETSc tells neither the coefficients of TSDIRK nor the embedded weights of TSROSW: they are measured
on a step of its own, once a process.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from pnode.options import OWN_PREFIX, SolverOptions
from pnode.problem import InitialValueProblem
from pnode.solution import Ledger
from pnode.solvers.integrator import IntegratorSettings, TimeIntegrator, default_options
from pnode.solvers.methods import Method
from pnode.solvers.petsc_c import before_each_stage, evaluate_step, stage_vectors
from pnode.solvers.rosenbrock import RosenbrockIntegrator
from pnode.solvers.rosenbrock_tableaus import ROSENBROCK
from pnode.vectorfield import vector_field
from pnode.vectors import copy_out

__all__ = ["ImplicitTableau", "implicit_tableau"]

_THETA = {
    "beuler": ([[1.0]], [1.0], [1.0]),
    "theta": ([[0.5]], [1.0], [0.5]),
    "cn": ([[0.0, 0.0], [0.5, 0.5]], [0.5, 0.5], [0.0, 1.0]),
}


@dataclass(frozen=True, eq=False)
class ImplicitTableau:
    """A diagonally implicit Runge-Kutta method, or a Rosenbrock method in the variables Y = G k.

    Attributes
    ----------
    A : ndarray
        Shape ``(s, s)``; At of ``RosenbrockTableau.transformed``.
    b : ndarray
        Weights, bt.
    c : ndarray
        Where in a step the stages are.
    defect : ndarray or None
        Embedded weights less b.
    inverse, correction, gamma, diagonal : ndarray
        Of a Rosenbrock method: Ginv, Corr, the row sums and the diagonal of Gamma.
    """

    A: np.ndarray
    b: np.ndarray
    c: np.ndarray
    defect: np.ndarray | None = None
    inverse: np.ndarray | None = None
    correction: np.ndarray | None = None
    gamma: np.ndarray | None = None
    diagonal: np.ndarray | None = None


@cache
def implicit_tableau(method: Method) -> ImplicitTableau:
    """Return the coefficients of a theta, DIRK or Rosenbrock method."""
    if method.ts_type in _THETA:
        return ImplicitTableau(*map(np.array, _THETA[method.ts_type]))
    if method.ts_type == "dirk":
        A, b, embedded = _measure(method)
        return ImplicitTableau(A, b, A.sum(axis=1), embedded - b)
    tableau = ROSENBROCK[method.subtype]
    At, inverse, correction, bt = tableau.transformed()
    defect = None
    if method.adaptive:
        *_, embedded = _measure(method)
        defect = (embedded - np.array(tableau.b)) @ inverse
    return ImplicitTableau(
        At, bt, np.array(tableau.alpha), defect, inverse, correction, np.array(tableau.gamma),
        np.array([row[-1] for row in tableau.Gamma]),
    )  # fmt: skip


def _measure(method: Method) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the stages, the end and the embedded solution of a step of length 1 from zero.

    On y' = g with g the k-th unit vector in the k-th stage these are the rows of A, b and the
    embedded weights; a Rosenbrock method's stages mean something else.
    """
    number, stage = method.stages, -1

    def unit(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.eye(number, dtype=torch.float64)[max(stage, 0)]

    def next_stage() -> None:
        nonlocal stage
        stage += 1
        integrator.bridge.stage_begins()

    zero = torch.zeros(number, dtype=torch.float64)
    problem = InitialValueProblem.create(unit, zero, torch.zeros(1))
    kind = RosenbrockIntegrator if method.ts_type == "rosw" else TimeIntegrator
    integrator = kind(
        IntegratorSettings(method, number, torch.float64),
        SolverOptions(OWN_PREFIX, None, default_options(method, False, "dense", torch.float64)),
    )
    callback = before_each_stage(integrator.ts, next_stage)
    integrator.begin(vector_field(problem, Ledger()), zero, 0.0)
    try:
        with torch.no_grad():
            integrator.attempt(0.0, 1.0, 0)
        embedded = integrator.solution.duplicate()
        evaluate_step(integrator.ts, method.order - 1, embedded)
        stages = [copy_out(vector).numpy() for vector in stage_vectors(integrator.ts)]
        return np.array(stages), copy_out(integrator.solution).numpy(), copy_out(embedded).numpy()
    finally:
        integrator.end()
        integrator.destroy()
        del callback

"""Where the coefficients of a method are from: PETSc, a table, or a step of PETSc's own.

PETSc tells the coefficients of TSRK alone. Those of TSDIRK and TSARKIMEX, and the embedded weights
of TSROSW, are measured, once a process and type.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from pnode.base.options import OWN_PREFIX, PETSc
from pnode.solvers.petsc.library import (
    before_each_stage,
    evaluate_step,
    rk_scheme,
    set_recompute_jacobian,
    set_subtype,
    stage_vectors,
)
from pnode.solvers.rosenbrock_tableaus import ROSENBROCK
from pnode.solvers.scheme import Row, Scheme, rows, ssp_scheme

__all__ = ["find_scheme"]

#: As PETSc takes them: the endpoint forms look at both ends of a step.
_THETA = {
    "beuler": Scheme(rows([[], [0.0, 1.0]]), (0.0, 1.0), "backward Euler"),
    "cn": Scheme(rows([[], [0.5, 0.5]]), (0.5, 0.5), "Crank-Nicolson"),
    "theta": Scheme(((0.5,),), (1.0,), "implicit midpoint rule"),
}


@cache
def find_scheme(ts_type: str, subtype: str, stages: int, order: int, adaptive: bool) -> Scheme:
    """Return the coefficients of PETSc's method. Not collective.

    Parameters
    ----------
    ts_type, subtype : str
        PETSc's names.
    stages, order : int
        Of the method.
    adaptive : bool
        Whether it has an embedded solution.
    """
    if ts_type in _THETA:
        return _THETA[ts_type]
    if ts_type == "ssp":
        return ssp_scheme(subtype, stages)
    if ts_type == "rk":
        ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
        try:
            ts.setType("rk")
            ts.setRKType(subtype)
            return rk_scheme(ts)
        finally:
            ts.destroy()
    # PETSc takes 1bee for a method of higher order, in its controller too.
    embedded = order - 1 if adaptive and subtype != "1bee" else None
    if ts_type == "rosw":
        scheme = ROSENBROCK[subtype]
        if embedded is None:
            return scheme
        *_, e = _measure(ts_type, subtype, stages, embedded)
        return replace(scheme, b_embedded=None if e is None else _row(e))
    A, b, e = _measure(ts_type, subtype, stages, embedded)
    reference, weights = f"PETSc's {ts_type}, measured", None if e is None else _row(e)
    if ts_type == "dirk":
        return Scheme(rows(A), _row(b), reference, weights)
    implicit, explicit = slice(None, stages), slice(stages, None)
    return Scheme(
        rows(A[:, implicit]), _row(b[implicit]), reference,
        None if e is None else _row(e[implicit]), rows(A[:, explicit]), _row(b[explicit]),
        b_explicit_embedded=None if e is None else _row(e[explicit]),
    )  # fmt: skip


def _row(values: np.ndarray) -> Row:
    return tuple(values.tolist())


def _measure(
    ts_type: str, subtype: str, stages: int, embedded_order: int | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Return the stages, the end and the embedded solution of a step of length 1 from zero.

    On y' = g with g the k-th unit vector in the k-th stage these are the rows of A, b and the
    embedded weights; a Rosenbrock method's stages mean something else. An IMEX method's explicit
    part has unit vectors of its own, in the second half of the state.
    """
    ts = PETSc.TS().create(comm=PETSc.COMM_SELF)
    try:
        ts.setOptionsPrefix(OWN_PREFIX)
        ts.setType(ts_type)
        if ts_type == "dirk":
            ts.setDIRKType(subtype)
        elif ts_type == "arkimex":
            ts.setARKIMEXType(subtype)
        else:
            set_subtype(ts, ts_type, subtype, stages)
            set_recompute_jacobian(ts, True)
        solution, callback = _unit_slopes(ts, stages, ts_type == "arkimex")
        ts.setTimeStep(1.0)
        ts.setMaxTime(10.0)
        ts.setExactFinalTime(PETSc.TS.ExactFinalTime.STEPOVER)
        ts.setTolerances(rtol=0.0, atol=1e30)  # any step will do for the controller
        snes = ts.getSNES()
        snes.setType("ksponly")
        snes.getKSP().setType("preonly")
        snes.getKSP().getPC().setType("lu")
        ts.setUp()
        ts.step()
        del callback
        embedded = None
        if embedded_order is not None:
            vector = solution.duplicate()
            evaluate_step(ts, embedded_order, vector)
            embedded = vector.getArray().copy()
        A = np.zeros((stages, solution.getSize()))
        if ts_type != "rosw":  # which keeps its stages to itself
            A = np.array([vector.getArray() for vector in stage_vectors(ts)])
        return A, solution.getArray().copy(), embedded
    finally:
        ts.destroy()


def _unit_slopes(ts: Any, stages: int, split: bool) -> tuple[Any, Any]:
    """Give a TS the problem of :func:`_measure`; return its solution and what is to be kept."""
    stage = -1

    def next_stage() -> None:
        nonlocal stage
        stage += 1

    def implicit(ts: Any, t: float, u: Any, u_dot: Any, f: Any) -> None:
        u_dot.copy(f)
        f.array_w[max(stage, 0)] -= 1.0  # TSDIRK asks for its initial slope before the first

    def explicit(ts: Any, t: float, u: Any, f: Any) -> None:
        f.set(0.0)
        f.array_w[stages + stage] = 1.0

    def jacobian(ts: Any, t: float, u: Any, u_dot: Any, shift: float, a: Any, p: Any) -> None:
        p.zeroEntries()
        p.shift(shift)

    size = 2 * stages if split else stages
    solution = PETSc.Vec().createSeq(size)
    matrix = PETSc.Mat().createDense(size, comm=PETSc.COMM_SELF)
    matrix.setUp()
    ts.setEquationType(PETSc.TS.EquationType.ODE_EXPLICIT)
    ts.setSolution(solution)
    ts.setIFunction(implicit, solution.duplicate())
    ts.setIJacobian(jacobian, matrix, matrix)
    if split:
        ts.setRHSFunction(explicit, solution.duplicate())
    return solution, before_each_stage(ts, next_stage)

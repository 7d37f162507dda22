"""Discrete adjoints of the steps of independent samples."""

from __future__ import annotations

import torch

from pnode.base.evidence import differs
from pnode.base.ledger import Ledger
from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.field.products import accumulate
from pnode.solvers.sample_field import RowsField
from pnode.solvers.sample_methods import RosenbrockRows, RungeKuttaRows, factored
from pnode.solvers.sample_record import Pass, Passes

__all__ = ["sample_adjoint"]

Gradients = list[torch.Tensor | None]


def sample_adjoint(
    field: RowsField, passes: Passes, cotangents: torch.Tensor, ledger: Ledger
) -> tuple[torch.Tensor, Gradients]:
    """Take the adjoint of each pass, as those of joint states do, with a length for each row.

    Parameters
    ----------
    field : RowsField
        f on all rows.
    passes : Passes
        What the forward sweep recorded.
    cotangents : Tensor
        Derivatives of the loss with respect to the outputs, shape ``(T, B, n)``.
    ledger : Ledger
        Counts.

    Returns
    -------
    initial : Tensor
        The derivative with respect to y0 that comes through the flow, shape ``(B, n)``.
    parameters : list of Tensor or None
        One per parameter.

    Raises
    ------
    FieldChanged
        If f is not that of the forward sweep any more.
    """
    state = torch.zeros_like(cotangents[0], dtype=REAL)
    gradients: Gradients = [None] * len(field.parameters)
    for one, part, kept in passes.backwards(field, ledger):
        rows = slice(None) if one.rows is None else one.rows
        marks = one.reached.ge(0).nonzero()[:, 0]
        own = state[rows].clone()
        if len(marks):
            whole = marks if one.rows is None else one.rows[marks]
            own[marks] += cotangents[one.reached[marks], whole].to(REAL)
        if isinstance(passes.method, RosenbrockRows):
            before = _rosenbrock(passes.method, part, one, kept[0], own, gradients)
        else:
            before = _runge_kutta(passes.method, part, one, kept, own, gradients)
        state[rows] = torch.where(one.length[:, None] == 0.0, own, before)
        ledger.steps += int(one.length.ne(0.0).sum())
    return state, gradients


def _runge_kutta(
    method: RungeKuttaRows, field: RowsField, one: Pass, kept: tuple[torch.Tensor, ...],
    end: torch.Tensor, gradients: Gradients,
) -> torch.Tensor:  # fmt: skip
    """Return lambda at the start of steps; ``StageAdjoint`` has the equations, with M = I.

    Of an IMEX method tau are the cotangents of the explicit part's slopes.
    """
    scheme, moving = method.scheme, one.length != 0.0
    length, zero = one.length[:, None], torch.zeros_like(end)
    split, through_stage = scheme.A_explicit, scheme.stiffly_accurate and not scheme.explicit
    stages = scheme.live_stages() if split is None else range(scheme.stages)
    live = sorted(stages, reverse=True)
    # Cotangents of slopes are zero, exactly, where rows do not step.
    scaled = length * end
    total, zeta = (zero, end) if through_stage else (end, zero)
    sigma = {i: zero if through_stage else scheme.b[i] * scaled for i in live}
    tau = {i: b * scaled for i, b in enumerate(scheme.b_explicit or ())}
    for i in live:
        a = scheme.A[i][i]
        if field.explicit is not None:
            part = field.explicit.graph(one.start + scheme.c_explicit[i] * one.length, kept[i])
            zeta = zeta + _pull_back(part, tau[i], gradients)
        graph = field.graph(one.start + scheme.c[i] * one.length, kept[i])
        if i == 0:
            _compare(field, graph, one)
        if a == 0.0:
            z = _pull_back(graph, sigma[i], gradients)
            z = z if zeta is zero else zeta + z
        else:
            shift = 1.0 / (torch.where(moving[:, None], length, 1.0) * a)
            factors = factored(field, shift, field.blocks(graph), moving, graph)
            right = torch.where(moving[:, None], zeta + shift * sigma[i], 0.0)
            w = factors.solve(right, transposed=True)
            z = shift * (w - sigma[i])
            if gradients:
                _pull_back(graph, w, gradients)
        zeta = zero
        total, scaled = total + z, length * z
        for j in (j for j in live if j < i):
            if scheme.A[i][j]:
                sigma[j] = torch.add(sigma[j], scaled, alpha=scheme.A[i][j])
            if split is not None and split[i][j]:
                tau[j] = torch.add(tau[j], scaled, alpha=split[i][j])
    return total


def _rosenbrock(
    method: RosenbrockRows, field: RowsField, one: Pass, u: torch.Tensor, end: torch.Tensor,
    gradients: Gradients,
) -> torch.Tensor:  # fmt: skip
    """Return lambda at the start of steps; ``RosenbrockAdjoint`` has the equations."""
    scheme, moving, dtype = method.scheme, one.length != 0.0, field.dtype
    own = moving[:, None]
    found = method.stages(field, one.start, u, one.length, graphs=True)
    _compare(field, found.base, one)
    h, base, factors = found.length, found.base, list(found.factors)
    end = torch.where(own, end, 0.0)
    total = end
    solved: list[torch.Tensor] = []
    Y = [b * end for b in method.bt.tolist()]
    for i in reversed(range(scheme.stages)):
        explicit = scheme.gamma_diagonal[i] == 0.0
        if explicit:
            w = h * Y[i]
        else:
            w = (factors[-1] if scheme.one_matrix else factors.pop()).solve(Y[i], transposed=True)
        Z = _pull_back(found.stages[i][0], w, gradients)
        total = total + Z
        for j in range(i):
            Y[j] = Y[j] + method.At[i, j] * Z - method.Ginv[i, j] / h * w
        if explicit and i:
            through = torch.where(own, field.product(base, found.jacobian, w, True), 0.0)
            for j in range(i):
                Y[j] = Y[j] + method.corr[i, j] * through
        solved.insert(0, w)
    w, v = (
        torch.stack(rows).to(dtype).flatten(1) for rows in (solved, [v for *_, v in found.stages])
    )
    time = None
    if scheme.needs_time_slope:
        lengths = field.times_of(h[:, 0])
        time = torch.stack([gamma * lengths for gamma in scheme.gamma])
    second = base.second_vjp(w, v, time)
    accumulate(gradients, second.parameters)
    return total + second.state.to(REAL).view_as(total)


def _pull_back(graph: Linearization, w: torch.Tensor, gradients: Gradients) -> torch.Tensor:
    """Return the VJP of rows w with the state, and add those with the parameters."""
    products = graph.vjp(w.reshape(-1).to(graph.dtype))
    accumulate(gradients, products.parameters)
    return products.state.to(REAL).view_as(w)


def _compare(field: RowsField, graph: Linearization, one: Pass) -> None:
    """Refuse an f that is not that of the forward sweep."""
    moving = one.length[:, None] != 0.0
    # In f's precision: a slope that a step carries on is f's value but for what Newton leaves.
    value = graph.flat_value().view(len(moving), -1)
    assert one.noted is not None
    by = differs(torch.where(moving, value, 0.0).reshape(-1), one.noted)
    if by:
        raise field.changed(float(one.start[0]), by)

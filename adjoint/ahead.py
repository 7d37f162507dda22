"""Derivatives of f at many stages at once, where these are known before tangents come by.

f is mapped over the stages by ``torch.func.vmap``: a small state then takes a few operations for
all stages instead of some for each. A function that torch cannot map, or maps to something else, is
left to the single stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from pnode.base.ledger import Ledger
from pnode.base.vectors import REAL
from pnode.field.products import directional_derivatives, gradients, pull_back_rows
from pnode.field.second_products import derivatives_along
from pnode.field.vectorfield import VectorField
from pnode.solvers.compiled.evaluations import agree

__all__ = ["Ahead", "curvatures_ahead", "derivatives_ahead", "pays"]

# Entries of the Jacobians that are alive at once.
_ENTRIES = 1 << 20


class Ahead(NamedTuple):
    """What is known of g at K stages.

    Attributes
    ----------
    values : Tensor
        Shape ``(K, size)``, the user's precision.
    jacobians : Tensor
        g_u transposed, shape ``(K, size, size)``, PETSc's precision.
    along : Tensor or None
        g_p v, shape ``(K, m, size)``, PETSc's precision; None without tangents of parameters.
    """

    values: torch.Tensor
    jacobians: torch.Tensor
    along: torch.Tensor | None

    def product(self, k: int, states: torch.Tensor) -> torch.Tensor:
        """Return g_u Z + g_p v at one of the stages, for tangents Z, shape ``(m, size)``."""
        if self.along is None:
            return states @ self.jacobians[k]
        return torch.addmm(self.along[k], states, self.jacobians[k])

    def factors(self, shifts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the LU factors of the K matrices shift I - g_u; None if one is singular."""
        unit = torch.eye(self.values.shape[1], dtype=REAL, device=self.values.device)
        matrices = shifts.to(unit.device)[:, None, None] * unit - self.jacobians.mT
        lu, pivots, singular = torch.linalg.lu_factor_ex(matrices)
        return None if singular.any() else (lu, pivots)


def pays(field: VectorField, stages: int, tangents: int, assembled: bool = False) -> bool:
    """Whether derivatives of that many stages are to be taken at once.

    ``assembled``: single stages would take the whole Jacobian too.
    """
    problem, size = field.problem, field.problem.layout.size
    alone = not problem.ranks.parallel and problem.exchange is None and problem.compute is None
    few = tangents > 1 and 2 * (size + 2 * tangents) <= stages
    small = stages * size * size <= _ENTRIES
    return alone and small and (few or assembled) and problem.form == "rhs"


def derivatives_ahead(
    field: VectorField, times: Sequence[float], states: Sequence[torch.Tensor],
    moving: Sequence[tuple[int, torch.Tensor]], ledger: Ledger, assembled: bool = False,
) -> Ahead | None:  # fmt: skip
    """Return g with its derivatives at stages; None for a function that torch cannot map.

    Parameters
    ----------
    field : VectorField
        Of g.
    times, states : sequence of float, sequence of Tensor
        Of the stages, flat.
    moving : sequence of (int, Tensor)
        For each parameter that moves its index and its tangents, shape ``(m, *parameter)``.
    ledger : Ledger
        Counts.
    assembled : bool
        Whether Jacobians are counted as such, and not as products.
    """
    direction, size, number = field.problem.direction, field.problem.layout.size, len(states)
    try:
        with torch.enable_grad(), field.shared.hooks_away():
            _, u, values = _mapped(field, times, states, moving)
            if values.shape != u.shape or not values.requires_grad:
                return None
            seeds = _units(u)
            (rows,) = pull_back_rows(values, (u,), seeds)
            along = None
            if moving:
                inputs = [field.parameters[index] for index, _ in moving]
                tangents = [tangents for _, tangents in moving]
                along = directional_derivatives(values, values, inputs, tangents)
    except Exception:  # whatever it is, the single stages will tell
        return None
    ledger.rhs += number
    ledger.jacobians += number * assembled
    ledger.jvp += number * (size * (not assembled) + (len(moving[0][1]) if moving else 0))
    jacobians = torch.zeros_like(seeds) if rows is None else rows
    return Ahead(
        direction * values.detach(), direction * jacobians.movedim(0, 2).to(REAL),
        None if along is None else direction * along.movedim(0, 1).to(REAL),
    )  # fmt: skip


def curvatures_ahead(
    field: VectorField, times: Sequence[float], states: Sequence[torch.Tensor],
    v: torch.Tensor, time: torch.Tensor, moving: Sequence[tuple[int, torch.Tensor]],
    ledger: Ledger,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:  # fmt: skip
    """Return derivatives of several g_u v_i + tau_i g_s at K states; None if torch cannot map f.

    Parameters
    ----------
    field, times, states, moving, ledger
        As of :func:`derivatives_ahead`.
    v, time : Tensor
        The v_i and tau_i, shapes ``(n, K, size)`` and ``(n, K)``, the user's precision.

    Returns
    -------
    by_state : Tensor
        Shape ``(K, n, size, size)``, the state's entries first; PETSc's precision.
    along : Tensor or None
        Along the tangents of parameters, ``(K, n, m, size)``; None without such.
    """
    direction, size = field.problem.direction, field.problem.layout.size
    tangents = [tangents for _, tangents in moving]
    extra = len(tangents[0]) if moving else 0
    try:
        with torch.enable_grad(), field.shared.hooks_away():
            at, u, values = _mapped(field, times, states, moving)
            rows = [torch.cat([_units(u), u.new_zeros(extra, *u.shape)])]
            rows += [torch.cat([one.new_zeros(size, *one.shape[1:]), one]) for one in tangents]
            inputs = (u, *(field.parameters[index] for index, _ in moving))
            found = derivatives_along(values, (u, at), (v, direction * time), inputs, rows)
    except Exception:  # whatever it is, the single stages will tell
        return None
    ledger.rhs += len(states)
    ledger.jvp += found[..., 0].numel()
    found = direction * found.permute(2, 1, 0, 3).to(REAL)
    return found[:, :, :size], found[:, :, size:] if moving else None


def _mapped(
    field: VectorField, times: Sequence[float], states: Sequence[torch.Tensor],
    moving: Sequence[tuple[int, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return user's times and states, which require grad, and f at all of them.

    Raises
    ------
    ArithmeticError
        If that is not what f is by itself.
    """
    layout, window = field.problem.layout, field.problem.window

    def evaluate(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = layout.flatten(field.function(t, layout.unflatten(u)))
        return value

    times = times if window is None else [window.nearest(s) for s in times]
    at = torch.tensor(times, dtype=torch.float64, device=layout.device)
    at = (at * field.problem.direction).to(layout.dtype).requires_grad_()
    u = torch.stack([state.to(layout.dtype) for state in states]).requires_grad_()
    values = torch.func.vmap(evaluate)(at, u)
    last = [x[-1].detach().requires_grad_() for x in (u, at)]
    single = evaluate(last[1], last[0])
    inputs = [field.parameters[index] for index, _ in moving]
    if not _alike(values, (u, at, *inputs), single, (*last, *inputs)):
        raise ArithmeticError("torch maps it to something else")
    return at, u, values


def _alike(
    values: torch.Tensor, inputs: tuple[torch.Tensor, ...],
    single: torch.Tensor, own: tuple[torch.Tensor, ...],
) -> bool:  # fmt: skip
    """Whether value and product of the last stage are what they are of that stage alone.

    torch's rules may be wrong for functions that are mapped, as that of ``select_scatter`` is.
    """
    if not values.requires_grad:
        return agree(values[-1], single)
    w = torch.randn(single.shape, generator=torch.Generator().manual_seed(6), dtype=REAL).to(single)
    rows = torch.zeros_like(values)
    rows[-1] = w
    found, expected = [values[-1]], [single]
    for x, mapped, alone in zip(
        own, gradients(values, inputs, rows), gradients(single, own, w), strict=True
    ):
        mapped = x.new_zeros(()) if mapped is None else mapped
        found.append(mapped[-1] if mapped.dim() > x.dim() else mapped.expand(x.shape))
        expected.append(torch.zeros_like(x) if alone is None else alone)
    return agree(*(torch.cat([_numbers(x, values.dtype) for x in y]) for y in (found, expected)))


def _numbers(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the real numbers of a tensor, flat."""
    return (torch.view_as_real(x) if x.is_complex() else x).reshape(-1).to(dtype)


def _units(u: torch.Tensor) -> torch.Tensor:
    """Return the unit vectors of each of K states, shape ``(size, *u)``."""
    number, size = u.shape
    return torch.eye(size, dtype=u.dtype, device=u.device)[:, None].expand(-1, number, -1)

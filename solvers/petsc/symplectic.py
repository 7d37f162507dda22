"""TSBASICSYMPLECTIC: the state is a pair (q, p), and each half-update needs half of f."""

from __future__ import annotations

from typing import Any

import torch

from pnode.base.devices import HOST
from pnode.base.errors import ConfigurationError
from pnode.base.evidence import project
from pnode.base.options import PETSc
from pnode.base.vectors import REAL, copy_in, copy_out, fill, view
from pnode.field.vectorfield import VectorField
from pnode.problems.problem import StateLayout
from pnode.solvers.methods import Method
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.symplectic_schemes import HalfUpdate

__all__ = ["SplitBridge", "SymplecticIntegrator", "split_size"]


def split_size(method: Method, layout: StateLayout) -> int:
    """Return how many entries of the state are positions; 0 for methods that do not split it.

    Raises
    ------
    ConfigurationError
        If a symplectic method is given a state that is not a pair.
    """
    if "separable" not in method.forms:
        return 0
    if not layout.is_tuple or len(layout.shapes) != 2 or 0 in layout.sizes:
        got = f"a tuple of {len(layout.shapes)}" if layout.is_tuple else "one tensor"
        raise ConfigurationError(
            f"y0 is {got}, and method={method.name!r} integrates a pair of positions and momenta: "
            "give y0 = (q, p) and f(t, (q, p)) -> (dq/dt, dp/dt), or take a method such as "
            "'dopri5'"
        )
    return layout.sizes[0]


class SplitBridge(Bridge):
    """Callbacks for the half-updates of a separable field.

    PETSc passes the sum of the momentum weights so far as the time of both halves, which loses
    the order where dp/dt depends on t. The times here are those of the scheme's own clocks.

    Parameters
    ----------
    updates : tuple of HalfUpdate
        Half-updates of a step.
    split : int
        Entries of the positions.
    """

    def __init__(self, updates: tuple[HalfUpdate, ...], split: int) -> None:
        super().__init__(keep=len(updates))
        self._updates = updates
        self._split = split
        self._state = torch.empty(0, device=HOST.device)
        self._time = self._step = 0.0
        self._next = 0
        self._check_split = False

    def attach(self, field: VectorField) -> None:
        """Begin a sweep with ``field``."""
        super().attach(field)
        self._check_split = field.problem.check_undeclared

    def begin_step(self, state: torch.Tensor, time: float, step: float) -> None:
        """Say from where the next half-updates go."""
        self._state, self._time, self._step, self._next = state, time, step, 0

    def set_rhs_function(self, ts: Any, solution: Any) -> None:
        """Make the halves of the field the right-hand sides of the parts of a TS."""
        size, comm = solution.getLocalSize(), solution.getComm()
        parts = {
            "position": (self._split, 0, self._position_function),
            "momentum": (size - self._split, self._split, self._momentum_function),
        }
        start = solution.getOwnershipRange()[0]
        for name, (entries, first, function) in parts.items():
            ts.setRHSSplitIS(name, PETSc.IS().createStride(entries, start + first, 1, comm=comm))
            ts.setRHSSplitRHSFunction(name, function)

    def _position_function(self, ts: Any, s: float, p: Any, q_dot: Any) -> None:
        self._state[self._split :] = view(p)
        self._half(q_dot, slice(None, self._split))

    def _momentum_function(self, ts: Any, s: float, q: Any, p_dot: Any) -> None:
        self._state[: self._split] = view(q)
        self._half(p_dot, slice(self._split, None))

    def _half(self, f: Any, part: slice) -> None:
        update = self._updates[self._next]
        s = self.stage_time(self._time + update.offset * self._step)
        self._next += 1
        with update.within(self.field.problem.flow, self._step):
            value = self.guarded("rhs", self._evaluate_state, s)
        if value is None:
            fill(f, 0.0)
        else:
            copy_in(f, value[part])

    def _evaluate_state(self, s: float) -> torch.Tensor:
        own = self._state.to(self.field.dtype, copy=True)
        self.evaluated.append(own)
        value = self._value(s, own)
        if self.projections is not None:
            self.projections.append(project(value))
        return value

    def _value(self, s: float, own: torch.Tensor) -> torch.Tensor:
        if not self._check_split:
            return self.field.rhs(s, own)
        if self.field.problem.flow is not None:  # where positions are updated, cost is not called
            with self.field.problem.flow.over(0.0):
                self.field.linearize(s, own.clone())
        linearization, known = self.field.linearize(s, own), True
        generator = torch.Generator(HOST.device).manual_seed(0)
        momenta = slice(self._split, len(own) - self.field.problem.integrals)
        for name, part in (("q", slice(None, self._split)), ("p", momenta)):
            w = torch.zeros_like(own)
            noise = torch.rand(
                w[part].shape, generator=generator, dtype=torch.float64, device=HOST.device
            )
            w[part] = (noise + 0.5).to(w)
            product = linearization.vjp(w).state[part]
            # NaN, which may come from the other half, tells nothing about this one.
            known = known and not bool(product.isnan().any())
            if bool(product.nan_to_num(0.0).ne(0.0).any()):
                raise ConfigurationError(
                    f"d{name}/dt depends on {name}: symplectic methods are for separable fields, "
                    "dq/dt = g(t, p) and dp/dt = f(t, q); take a method such as 'dopri5' or "
                    "'implicit_midpoint' (symplectic for any Hamiltonian)"
                )
        self._check_split = not known
        return linearization.flat_value()


class SymplecticIntegrator(TimeIntegrator):
    """A forward TSBASICSYMPLECTIC.

    Notes
    -----
    Whether the field is separable is checked at the first evaluation of a sweep in which torch
    records gradients, or the first with finite derivatives; without them nothing is known about
    what depends on what.
    """

    bridge: SplitBridge

    def _create_bridge(self) -> SplitBridge:
        return SplitBridge(self.settings.method.half_updates, self.settings.split)

    def _step(self, where: dict[str, Any]) -> None:
        ts = self.ts
        self.bridge.begin_step(copy_out(self.solution, REAL), ts.getTime(), ts.getTimeStep())
        super()._step(where)

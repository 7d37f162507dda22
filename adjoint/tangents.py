"""Tangents of steps that were taken, from the first to the last: what the adjoints transpose.

A step's stages are in its checkpoint. Its derivative along m directions of the state and of the
parameters then takes products with f's derivatives there, and for implicit stages one solve for
each direction with the matrix that the adjoint would use. Nothing is evaluated that the method
itself would not evaluate there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from pnode.adjoint.ahead import Ahead, derivatives_ahead, pays
from pnode.adjoint.firk import CoupledAdjoint
from pnode.adjoint.multistep import MultistepAdjoint
from pnode.adjoint.rosenbrock import RosenbrockAdjoint
from pnode.adjoint.rosenbrock_stages import KnownStages, RecordedStages
from pnode.adjoint.stages import ExplicitAdjoint, StageAdjoint
from pnode.adjoint.stepper import AdjointStepper
from pnode.adjoint.symplectic import SymplecticAdjoint
from pnode.adjoint.tangent_stepper import ImplicitTangents, Known, Moving, TangentStepper, plus
from pnode.base.evidence import notes
from pnode.base.ledger import Ledger
from pnode.base.vectors import REAL
from pnode.field.vectorfield import VectorField
from pnode.solvers.bdf import start_weights
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.scheme import Row, Rows, combine
from pnode.solvers.stepping import Step

__all__ = ["create_tangents", "has_tangents"]


class ExplicitTangents(TangentStepper):
    """Of an explicit Runge-Kutta step: its stages with l_i = g_u(U_i) w_i + g_p(U_i) v."""

    def __init__(self, adjoint: ExplicitAdjoint, start: torch.Tensor, moving: Moving) -> None:
        super().__init__(start, moving)
        self._adjoint = adjoint
        scheme = adjoint.settings.method.scheme
        assert scheme is not None
        self._scheme, self._live = scheme, sorted(scheme.live_stages())
        self._ahead: Ahead | None = None
        self._done = 0

    def look_ahead(self, steps: Known, ledger: Ledger) -> None:
        """Differentiate f at all stages at once; see :class:`TangentStepper`."""
        field, live, c = self._adjoint.field, self._live, self._scheme.c
        if pays(field, len(steps) * len(live), len(self.tangents)):
            times = [step.at(c[i]) for step, _, _ in steps for i in live]
            states = [checkpoint.stages[i] for _, checkpoint, _ in steps for i in live]
            self._ahead = derivatives_ahead(field, times, states, self._moving, ledger)

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take a step; see :class:`TangentStepper`."""
        scheme, h, ahead = self._scheme, step.length, self._ahead
        slopes: dict[int, torch.Tensor] = {}
        for i in self._live:
            w = plus(self.tangents, [(h * scheme.A[i][j], slopes[j]) for j in slopes])
            if ahead is None:
                slopes[i] = self._along(self._adjoint.graph(i, step), w)
            else:
                k, self._done = self._done, self._done + 1
                self._adjoint.verify(ahead.values[k], i, step.at(scheme.c[i]), step)
                slopes[i] = ahead.product(k, w)
        self.tangents = plus(self.tangents, [(h * scheme.b[j], slopes[j]) for j in slopes])
        ledger.steps += 1


class StageTangents(ImplicitTangents):
    """Of a diagonally implicit or IMEX step; see :class:`StageAdjoint` for the equations.

    Implicit stages have (M / (h a_ii) - g_Y) dY_i = M dZ_i / (h a_ii) + g_p v and
    dK_i = (dY_i - dZ_i) / (h a_ii), explicit ones dY_i = dZ_i and dK_i = g_Y dY_i + g_p v.
    """

    def __init__(self, adjoint: StageAdjoint, start: torch.Tensor, moving: Moving) -> None:
        super().__init__(adjoint, start, moving)
        scheme = adjoint.settings.method.scheme
        assert scheme is not None
        self._scheme = scheme
        parts = [(scheme.A, scheme.b)]
        if scheme.A_explicit is not None and scheme.b_explicit is not None:
            parts.append((scheme.A_explicit, scheme.b_explicit))
        # Whether something looks at a stage's slope, for each part.
        self._wanted = [[_is_used(A, b, j) for j in range(scheme.stages)] for A, b in parts]

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take a step; see :class:`TangentStepper`."""
        adjoint, scheme, h = self._adjoint, self._scheme, step.length
        adjoint.bridge.expected = notes(adjoint.evidence)
        slopes: dict[int, torch.Tensor] = {}
        explicit: dict[int, torch.Tensor] = {}
        A_explicit, b_explicit = scheme.A_explicit or (), scheme.b_explicit or ()
        state = self.tangents
        for i, a in enumerate(row[i] for i, row in enumerate(scheme.A)):
            driven = plus(self.tangents, [
                *((h * scheme.A[i][j], slopes[j]) for j in slopes),
                *((h * A_explicit[i][j], explicit[j]) for j in explicit),
            ])  # fmt: skip
            s, Y = step.at(scheme.c[i]), adjoint.checkpoint.stages[i]
            if a:
                shift = 1.0 / (h * a)
                state = self._solve(s, Y, shift, shift * driven, step, ledger)
                if self._wanted[0][i]:
                    slopes[i] = shift * (state - driven)
            else:
                state = driven
                if self._wanted[0][i]:
                    slopes[i] = self._slope(s, Y, driven)
            if A_explicit and self._wanted[1][i]:
                part = adjoint.field.explicit
                explicit[i] = self._slope(step.at(scheme.c_explicit[i]), Y, state, part)
        if scheme.stiffly_accurate:
            self.tangents = state
        else:
            self.tangents = plus(self.tangents, [
                *((h * scheme.b[j], slopes[j]) for j in slopes),
                *((h * b_explicit[j], explicit[j]) for j in explicit),
            ])  # fmt: skip
        ledger.steps += 1

    def _slope(
        self, s: float, u: torch.Tensor, states: torch.Tensor, part: VectorField | None = None
    ) -> torch.Tensor:
        return self._along(self._adjoint.graph_at(s, u, None, part), states)


class MultistepTangents(ImplicitTangents):
    """Of BDF and its start; see :class:`MultistepAdjoint` for the equations."""

    def __init__(self, adjoint: MultistepAdjoint, start: torch.Tensor, moving: Moving) -> None:
        super().__init__(adjoint, start, moving)
        self._history: list[torch.Tensor] = []  # of the steps before, newest first
        self._ahead: Ahead | None = None
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._done = 0

    def look_ahead(self, steps: Known, ledger: Ledger) -> None:
        """Differentiate f at all points at once, and factor; see :class:`TangentStepper`."""
        adjoint, number = self._adjoint, len(self.tangents)
        systems = [one for step, checkpoint, _ in steps for one in _systems(step, checkpoint)]
        if not (self._assembles and adjoint.solves_rows and systems):
            return
        if pays(adjoint.field, len(systems), number, assembled=True):
            times, states, shifts = zip(*systems, strict=True)
            ahead = derivatives_ahead(adjoint.field, times, states, self._moving, ledger, True)
            self._factors = ahead and ahead.factors(torch.tensor(shifts, dtype=REAL))
            if self._factors is not None:
                self._ahead = ahead
                ledger.factorizations += len(systems)
                ledger.krylov += len(systems) * number

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take a step; see :class:`TangentStepper`."""
        before = [self.tangents, *self._history]
        if step.order < 0:
            self.tangents = self._extrapolated(step, -step.order, ledger)
        else:
            (u,), d = self._adjoint.checkpoint.stages, self._adjoint.checkpoint.weights
            assert d is not None
            first, *others = d.tolist()
            terms = zip(others, before, strict=False)
            driven = plus(torch.zeros_like(self.tangents), [(-d, Z) for d, Z in terms])
            self.tangents = self._system(0, step.end, u, first, driven, step, ledger)
        self._history = before[: self._adjoint.settings.method.order]
        ledger.steps += 1

    def _extrapolated(self, step: Step, order: int, ledger: Ledger) -> torch.Tensor:
        """Return the tangents after extrapolated implicit Euler."""
        (states,) = self._adjoint.checkpoint.stages
        total, system = torch.zeros_like(self.tangents), 0
        for number, weight in enumerate(start_weights(order), start=1):
            h, Z = step.length / number, self.tangents
            for i in range(1, number + 1):
                s, u = step.start + i * h, states[system]
                Z = self._system(system, s, u, 1.0 / h, Z / h, step, ledger)
                system += 1
            total += weight * Z
        return total

    def _system(
        self, system: int, s: float, u: torch.Tensor, shift: float, driven: torch.Tensor,
        step: Step, ledger: Ledger,
    ) -> torch.Tensor:  # fmt: skip
        """Solve one of a step's systems, and compare f there with what was noted."""
        adjoint, ahead, k = self._adjoint, self._ahead, self._done
        if ahead is None or self._factors is None:
            found = self._solve(s, u, shift, driven, step, ledger)
            value = adjoint.value(s, u)
        else:
            right = driven if ahead.along is None else driven + ahead.along[k]
            lu, pivots = self._factors
            found, value = torch.linalg.lu_solve(lu[k], pivots[k], right.mT).mT, ahead.values[k]
            self._done += 1
        doubt = adjoint.evidence[2 * system + 1] if adjoint.evidence else 0.0
        adjoint.verify(value, 2 * system, s, step, slack=doubt)
        return found


def _systems(step: Step, checkpoint: Checkpoint) -> Iterator[tuple[float, torch.Tensor, float]]:
    """Yield times, states and shifts of the systems that a step of BDF solves, in order."""
    if step.order >= 0:
        assert checkpoint.weights is not None
        yield step.end, checkpoint.stages[0], float(checkpoint.weights[0])
        return
    states = iter(checkpoint.stages[0])
    for number in range(1, len(start_weights(-step.order)) + 1):
        h = step.length / number
        yield from ((step.start + i * h, next(states), 1.0 / h) for i in range(1, number + 1))


class CoupledTangents(TangentStepper):
    """Of a step with coupled stages; see :mod:`pnode.adjoint.firk` for the equations.

    K_Y dY = A^-1 1 x M du / h + g_p v and du' = (1 - sum d_i) du + sum d_i dY_i.
    """

    def __init__(self, adjoint: CoupledAdjoint, start: torch.Tensor, moving: Moving) -> None:
        super().__init__(start, moving)
        self._adjoint = adjoint

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take a step; see :class:`TangentStepper`."""
        adjoint, new = self._adjoint, self._adjoint.transformation
        graphs, system = adjoint.linearized(step)
        mass, before = adjoint.field.mass, self.tangents
        driven = before if mass is None else mass.apply(before)
        weights = torch.as_tensor(new.from_start / step.length, device=before.device)
        right = weights[:, None] * driven[:, None, :]
        if self._moving:
            right = right + torch.stack([self._along(graph, None) for graph in graphs], 1)
        found = adjoint.solve(system, right, step, ledger)
        self.tangents = torch.as_tensor(new.end, device=before.device) @ found
        if new.start_weight:
            self.tangents = self.tangents + new.start_weight * before
        ledger.steps += 1


class RosenbrockTangents(TangentStepper):
    """Of a Rosenbrock step; see :class:`RosenbrockAdjoint` for the equations and the notation.

    M_i dY_i = g_u(Z_i) dZ_i + g_p(Z_i) v - M sum_{j<i} Ginv_ij dY_j / h + e_i, where e_i is the
    derivative of J Y_i + gamma_i h g_t at the step's start, J's own, along du and v.
    """

    def __init__(self, adjoint: RosenbrockAdjoint, start: torch.Tensor, moving: Moving) -> None:
        super().__init__(start, moving)
        self._adjoint = adjoint
        self._known: KnownStages | None = None

    def look_ahead(self, steps: Known, ledger: Ledger) -> None:
        """Differentiate f at all stages at once; see :class:`TangentStepper`."""
        number = len(self.tangents)
        self._known = KnownStages.create(self._adjoint, steps, number, self._moving, ledger)

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take a step; see :class:`TangentStepper`."""
        adjoint, h, zero = self._adjoint, step.length, torch.zeros_like(self.tangents)
        mass, (At, Ginv, corr, bt) = adjoint.field.mass, adjoint.coefficients
        stages: KnownStages | RecordedStages
        if self._known is None:
            stages = RecordedStages(adjoint, step, self.tangents, self._moving, ledger)
        else:
            stages = self._known.of(step.index, self.tangents)
        done: list[torch.Tensor] = []
        for i, change in enumerate(stages.changes):
            right = stages.along(i, self.tangents + combine(At[i], done, zero))
            driven = combine(Ginv[i], done, zero) / h
            right = right - (driven if mass is None else mass.apply(driven)) + change
            if adjoint.scheme.gamma_diagonal[i] == 0.0:
                if i:
                    right = right + stages.through(combine(corr[i], done, zero))
                done.append(h * right)
            else:
                done.append(stages.solve(i, right))
        self.tangents = self.tangents + combine(bt, done, zero)
        ledger.steps += 1


class SymplecticTangents(TangentStepper):
    """Of a symplectic step: its half-updates."""

    def __init__(self, adjoint: SymplecticAdjoint, start: torch.Tensor, moving: Moving) -> None:
        super().__init__(start, moving)
        self._adjoint = adjoint

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take a step; see :class:`TangentStepper`."""
        for part, factor, graph in self._adjoint.updates(step):
            slope = self._along(graph, self.tangents)
            self.tangents = self.tangents.clone()
            self.tangents[:, part] += factor * slope[:, part]
        ledger.steps += 1


def has_tangents(settings: IntegratorSettings, has_mass: bool) -> bool:
    """Whether the steps of a method have tangents here.

    Not those of residuals; nor those that have an explicit stage and a mass matrix, which may be
    singular.
    """
    method = settings.method
    if settings.graphs is not None or settings.form == "residual":
        return False
    if method.multistep or method.coupled or method.linearly_implicit or method.symplectic:
        return True
    scheme = method.scheme
    assert scheme is not None
    explicit = scheme.A_explicit is not None or any(
        not row[i] and _is_used(scheme.A, scheme.b, i) for i, row in enumerate(scheme.A)
    )
    return not (has_mass and explicit)


def _is_used(A: Rows, b: Row, stage: int) -> bool:
    """Whether a later stage, or the step's end, looks at a stage's slope."""
    return bool(b[stage]) or any(row[stage] for row in A[stage + 1 :])


def create_tangents(adjoint: AdjointStepper, start: torch.Tensor, moving: Moving) -> TangentStepper:
    """Return what takes the tangents of the steps whose adjoint is given."""
    if isinstance(adjoint, ExplicitAdjoint):
        return ExplicitTangents(adjoint, start, moving)
    if isinstance(adjoint, MultistepAdjoint):
        return MultistepTangents(adjoint, start, moving)
    if isinstance(adjoint, CoupledAdjoint):
        return CoupledTangents(adjoint, start, moving)
    if isinstance(adjoint, RosenbrockAdjoint):
        return RosenbrockTangents(adjoint, start, moving)
    if isinstance(adjoint, SymplecticAdjoint):
        return SymplecticTangents(adjoint, start, moving)
    assert isinstance(adjoint, StageAdjoint)
    return StageTangents(adjoint, start, moving)

"""Discrete adjoints of Runge-Kutta methods of every kind, from the last stage to the first."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch

from pnode.adjoint.implicit import ImplicitAdjointStepper
from pnode.adjoint.stepper import NOTHING, StageCotangents, TorchAdjointStepper
from pnode.base.errors import SolveError
from pnode.base.evidence import notes, projector
from pnode.base.ledger import Ledger
from pnode.base.options import SolverOptions, log_event
from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.field.products import accumulate
from pnode.field.vectorfield import VectorField
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.scheme import Scheme
from pnode.solvers.stepping import Step

__all__ = ["ExplicitAdjoint", "StageAdjoint"]

_LARGE = 2**17  # bytes; below, to allocate takes longer than what it saves is worth
Cotangent: TypeAlias = torch.Tensor | None
Cotangents: TypeAlias = list[Cotangent]


def _plus(total: Cotangent, term: Cotangent, factor: float = 1.0) -> Cotangent:
    """Return the sum of a cotangent and ``factor`` times another, None being zero."""
    if term is None or factor == 0.0:
        return total
    if total is None:
        return term if factor == 1.0 else factor * term
    return torch.add(total, term, alpha=factor)


class _Plan:
    """Which rows hold lambda' and the l_i of an explicit method's adjoint, as few as can be.

    Two that no earlier stage weights any more are added up, which makes room for the next l_i.

    Attributes
    ----------
    weights : list of list of float
        For each stage, from the last to the first, those of the rows in w_i / h.
    rows : list of (int or None, int)
        Likewise, once w_i is known: the row that another one is added to, and that other one, or a
        new one, where l_i goes.
    number : int
        Of all rows, whose sum is the step's lambda.
    """

    def __init__(self, scheme: Scheme) -> None:
        def weight(j: int, i: int) -> float:
            """Return that of l_j, or of lambda' for j = s, in w_i."""
            return scheme.b[i] if j == scheme.stages else scheme.A[j][i]

        self.weights: list[list[float]] = []
        self.rows: list[tuple[int | None, int]] = []
        places, done, self.number = {scheme.stages: 0}, list[int](), 1
        for i in reversed(range(scheme.stages)):
            held = {place: weight(j, i) for j, place in places.items()}
            self.weights.append([held.get(place, 0.0) for place in range(self.number)])
            for j in [j for j in places if not any(weight(j, k) for k in range(i))]:
                done.append(places.pop(j))
            if len(done) > 1:
                places[i] = done.pop()
                self.rows.append((done[0], places[i]))
            else:
                places[i] = self.number
                self.rows.append((None, self.number))
                self.number += 1


class ExplicitAdjoint(TorchAdjointStepper):
    """Adjoint of an explicit Runge-Kutta step, from its Butcher tableau.

    Parameters
    ----------
    settings : IntegratorSettings
        Those of the forward integrator.
    parameters : bool
        Whether gradients with respect to parameters are wanted.

    Notes
    -----
    Checkpoints hold the stages U_1, ..., U_s; the last one may be missing where nothing depends on
    its slope (FSAL). With lambda' the cotangent of the step's end u' = u + h sum_i b_i k_i,
    backwards through the stages::

        w_i = h (b_i lambda' + sum_{j>i} a_ji l_j),   l_i = g_u(U_i)^T w_i,
        lambda = lambda' + sum_i l_i,                  mu += sum_i g_p(U_i)^T w_i

    (E. Hairer, C. Lubich & G. Wanner, Geometric Numerical Integration, section VI.9; A. Sandu, On
    the properties of Runge-Kutta discrete adjoints, ICCS 2006).
    """

    def __init__(self, settings: IntegratorSettings, parameters: bool) -> None:
        super().__init__(settings, parameters)
        scheme = settings.method.scheme
        assert scheme is not None
        self._nodes, self._b = scheme.c, scheme.b
        device = settings.place.device
        self._plan = _Plan(scheme)
        weights = self._plan.weights
        self._counts = [len(row) for row in weights]
        self._weights = torch.tensor([x for row in weights for x in row], dtype=REAL, device=device)
        self._ones = torch.ones(self._plan.number, dtype=REAL, device=device)
        self._vjp_event = log_event("pnode vjp")
        self._length = math.nan
        self._project: Callable[[torch.Tensor], torch.Tensor] | None = None
        self._scaled: tuple[torch.Tensor, ...] = ()
        self._none: Cotangents = [None] * scheme.stages
        self._needed = scheme.live_stages()
        self._rows: list[torch.Tensor] = []

    def _allocate(self, shape: torch.Size) -> None:
        """Make room for lambda' and the l_i: w_i weights the rows that are in use by then."""
        number, device = len(self._ones), self.settings.place.device
        products = torch.empty((number, shape.numel()), dtype=REAL, device=device)
        self._rows = list(products.view(number, *shape))
        self._columns = [products[:count].t() for count in (*self._counts, number)]

    def begin(self, field: VectorField, batch: Sequence[int] = ()) -> None:
        """Begin a sweep with zero cost gradients. Collective."""
        super().begin(field, batch)
        if self._rows and self.state.shape != self._rows[0].shape:
            self._rows = []
        if self.settings.place.on_host:  # elsewhere nothing was noted
            one = self.state[0] if batch else self.state
            self._project = projector(one.to(field.dtype))
        self._graphs: Sequence[Linearization] | None = None

    def load(
        self, checkpoint: Checkpoint, graphs: Any = None, evidence: Sequence[float] = ()
    ) -> None:
        """Put a step's checkpoint in place, with the graphs at its stages. Not collective."""
        super().load(checkpoint, graphs, evidence)
        self._graphs = graphs

    def end(self) -> None:
        """End a sweep: let go of the user's objects, and of what a batch has taken."""
        super().end()
        self._graphs = None
        if self.state.dim() > 1:
            self.state = self.state[0].clone()
            self._rows = []

    def step(self, step: Step, ledger: Ledger, inside: StageCotangents = NOTHING) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded.

        Parameters
        ----------
        step : Step
            The step.
        ledger : Ledger
            Counts it.
        inside : StageCotangents
            Further cotangents. That of an FSAL method's last slope wants the step's end as one
            more stage of the checkpoint.

        Raises
        ------
        BaseException
            Whatever the vector field raised.
        """
        h, field, dtype = step.length, self.field, self.field.dtype
        look, batched = field.look, self.state.dim() > 1
        if h != self._length:
            self._length, self._scaled = h, (self._weights * h).split(self._counts)
        needed, stages = self._needed, len(self._nodes)
        states = slopes = self._none
        if inside is not NOTHING:
            needed = frozenset(range(len(self.checkpoint.stages)))
            states, slopes = inside.of(stages)
        expected, project = self.evidence, self._project
        if not self._rows:
            self._allocate(self.state.shape)
        rows = self._rows
        rows[0].copy_(self.state)
        self.state = rows[0]
        for row, (weights, (into, place)) in enumerate(
            zip(self._scaled, self._plan.rows, strict=True)
        ):
            i, product = stages - 1 - row, rows[place]
            w = torch.mv(self._columns[row], weights) if i in needed else None
            if into is not None:
                rows[into].add_(product)
            if w is None:
                product.zero_()
                continue
            if batched:
                w = w.view(product.shape)
            own, slope = states[i], slopes[i]
            if slope is not None:
                w.add_(slope)
            if look is not None:
                look(step.at(self._nodes[i]), self.checkpoint.stages[i], w, h * self._b[i], "rhs")
            if self._graphs is not None and i < len(self._graphs) and inside.look is None:
                graph = self._graphs[i]
                graph.adopt(field.shared)
            else:
                c = self._nodes[i]
                s = step.end if c == 1.0 else step.start + c * h
                graph = self.linearize(s, self.checkpoint.stages[i], step)
                value = graph.flat_value()
                if i < len(expected) and project and float(project(value)) != expected[i]:
                    self.verify(value, i, s, step)
                if inside.look is not None:
                    inside.look(i, value.to(REAL))
            with self._vjp_event:
                products = graph.vjp(w if dtype is REAL else w.to(dtype))
            if self.wants_parameters:
                accumulate(self._gradients, products.parameters)
            product.copy_(products.state)
            if own is not None:
                product.add_(own)
            del graph, products  # before the next graph is built, so that memory is reused
        self.state = torch.mv(self._columns[-1], self._ones).view(rows[0].shape)
        self._graphs = None
        if len(rows) * rows[0].nbytes > _LARGE:  # a step that is repeated has a use for
            self._rows, self._columns = [], []
        ledger.steps += 1

    def graph(self, i: int, step: Step) -> Linearization:
        """Return the graph at a stage, kept or not; in ``step`` a call would be one a stage."""
        if self._graphs is not None and i < len(self._graphs):
            graph = self._graphs[i]
            graph.adopt(self.field.shared)
            return graph
        s = step.at(self._nodes[i])
        graph = self.linearize(s, self.checkpoint.stages[i], step)
        self.verify(graph.flat_value(), i, s, step)
        return graph


class StageAdjoint(ImplicitAdjointStepper):
    """Adjoint of a diagonally implicit or IMEX Runge-Kutta step, from its stages.

    Notes
    -----
    The step has Z_i = u + h sum_{j<i} a_ij K_j, and F(t_i, Y_i, K_i) = 0 with
    K_i = (Y_i - Z_i) / (h a_ii); where a_ii = 0 Y_i = Z_i and M K_i = g(t_i, Y_i). It ends at
    u' = Y_s, or else at u + h sum_i b_i K_i. Let zeta_i, rho_i and sigma_i be the cotangents of
    Y_i, K_i and M K_i: at first lambda' of Y_s, or else h b_i lambda' of K_i. From the last stage
    to the first::

        (F_Y + F_K / (h a_ii))^T w = zeta_i + (rho_i + M^T sigma_i) / (h a_ii)
        z = (M^T (w - sigma_i) - rho_i) / (h a_ii),    mu -= F_p^T w
        lambda += z,    rho_j += h a_ij z  or  sigma_j += a_ij / a_ii (w - sigma_i),  j < i

    with M = F_K; for an explicit stage z = zeta_i + g_Y^T sigma_i and mu += g_p^T sigma_i. With a
    mass matrix the cotangents go on as those of M K_j where rho_i is not in use: an explicit
    stage, whose K M may not determine, then needs no other. Without, rho and sigma are the same.

    The explicit part of an IMEX method has slopes of its own, with cotangents tau_i: what goes on
    from z is h times its coefficients, and g_Y^T tau_i adds to zeta_i.
    """

    def __init__(
        self, settings: IntegratorSettings, options: SolverOptions, parameters: bool
    ) -> None:
        super().__init__(settings, options, parameters)
        scheme = settings.method.scheme
        assert scheme is not None
        self._scheme = scheme
        self._solves_start = settings.method.carries_slope
        self._own_part = "rhs" if scheme.A_explicit is None else "implicit"

    def step(self, step: Step, ledger: Ledger, inside: StageCotangents = NOTHING) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded. Collective.

        Parameters
        ----------
        step : Step
            The step.
        ledger : Ledger
            Counts it.
        inside : StageCotangents
            Further cotangents; the slopes are sums of both parts of an IMEX method's.

        Raises
        ------
        LinearSolveFailed
            If a transposed solve did not converge.
        BaseException
            Whatever the vector field raised.
        """
        self.bridge.expected = notes(self.evidence)
        try:
            self.state = self._passed_back(step, ledger, inside)
        except SolveError as error:
            raise error.located(**self._where(step)) from error.__cause__
        ledger.steps += 1

    def _passed_back(self, step: Step, ledger: Ledger, inside: StageCotangents) -> torch.Tensor:
        """Return lambda at the start of a step."""
        A, A_explicit, h = self._scheme.A, self._scheme.A_explicit, step.length
        total, zeta, rho, sigma, tau = self._cotangents(h, inside)
        for i in reversed(range(len(A))):
            explicit = tau[i]
            if explicit is not None:
                if self.field.mass is not None:
                    explicit = self.field.mass.solve_transpose(explicit)
                zeta[i] = self._explicit(i, step, zeta[i], explicit, split=True)
            z, own = self._stage(i, step, ledger, zeta[i], rho[i], sigma[i])
            if z is None:
                continue
            total = _plus(total, z)
            slopes, passed = (rho, z) if own is None else (sigma, own)
            for j in range(i):
                slopes[j] = _plus(slopes[j], passed, h * A[i][j])
                if A_explicit is not None:
                    tau[j] = _plus(tau[j], z, h * A_explicit[i][j])
        assert total is not None
        return total

    def _cotangents(
        self, h: float, inside: StageCotangents
    ) -> tuple[Cotangent, Cotangents, Cotangents, Cotangents, Cotangents]:
        """Return those of u, Y_i, K_i, M K_i and the explicit slopes, before the last stage."""
        scheme, end = self._scheme, self.state
        zeta, slopes = inside.of(scheme.stages)
        tau: Cotangents = [None] * scheme.stages
        total: Cotangent = end
        if scheme.b_explicit is not None:
            tau = [_plus(k, end, h * b) for k, b in zip(slopes, scheme.b_explicit, strict=True)]
        if scheme.stiffly_accurate:
            total, zeta[-1] = None, _plus(zeta[-1], end)
        else:
            slopes = [_plus(k, end, h * b) for k, b in zip(slopes, scheme.b, strict=True)]
        nothing: Cotangents = [None] * scheme.stages
        if self.field.mass is None and self.field.has_rhs:  # then K and M K are the same
            return total, zeta, nothing, slopes, tau
        return total, zeta, slopes, nothing, tau

    def _explicit(
        self, i: int, step: Step, zeta: Cotangent, sigma: torch.Tensor, split: bool = False
    ) -> torch.Tensor:
        """Return zeta + g_Y^T sigma, g being the explicit part of a split field if asked for."""
        part, c, b = self.field, self._scheme.c, self._scheme.b
        if split:
            assert self.field.explicit is not None and self._scheme.b_explicit is not None
            part, c, b = self.field.explicit, self._scheme.c_explicit, self._scheme.b_explicit
        if self.field.look is not None:
            name = "explicit" if split else self._own_part
            self.field.look(
                step.at(c[i]), self.checkpoint.stages[i], sigma, step.length * b[i], name
            )
        products = self.products(step.at(c[i]), self.checkpoint.stages[i], sigma, part=part)
        self.accumulate(products.parameters)
        state = products.state.to(REAL)
        return state if zeta is None else zeta + state

    def _stage(
        self, i: int, step: Step, ledger: Ledger,
        zeta: Cotangent, rho: Cotangent, sigma: Cotangent,
    ) -> tuple[Cotangent, Cotangent]:  # fmt: skip
        """Return z of a stage, and what M^T is to be applied to for it, where that goes on."""
        mass, a = self.field.mass, self._scheme.A[i][i]
        if a == 0.0:
            if rho is not None:
                assert mass is not None
                sigma = _plus(sigma, mass.solve_transpose(rho))
            if sigma is not None and mass is not None and self._solves_start and mass.singular:
                # The first slope is that of what M can reach.
                sigma = mass.solve_transpose(mass.apply_transpose(sigma))
            z = zeta if sigma is None else self._explicit(i, step, zeta, sigma)
            return z, z if mass is None else None
        shift = 1.0 / (step.length * a)
        moved = sigma if sigma is None or mass is None else mass.apply_transpose(sigma)
        right = _plus(_plus(zeta, rho, shift), moved, shift)
        if right is None:
            return None, None
        s, Y, rate = step.at(self._scheme.c[i]), self.checkpoint.stages[i], None
        if not self.field.has_rhs:  # only backward Euler, whose Z is the state at the start
            rate = self.checkpoint.stages[0] * -shift + Y * shift  # with the bits of PETSc's
        w = self.solve_transposed(s, Y, shift, right, step, ledger, rate)
        if self.field.look is not None:
            self.field.look(s, Y, w, step.length * self._scheme.b[i], self._own_part)
        v = shift * (w if sigma is None else w - sigma)
        if self.wants_parameters or rate is not None:
            products = self.products(s, Y, w, rate)
            self.accumulate(products.parameters)
            if products.rate is not None and rate is not None:
                return _plus(products.rate.to(REAL) * shift, rho, -shift), None
        if mass is not None:
            z = mass.apply_transpose(v)
            return (z, v) if rho is None else (z - shift * rho, None)
        return v, v

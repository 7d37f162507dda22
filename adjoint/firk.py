"""The discrete adjoint of fully implicit Runge-Kutta methods.

A step solves K(Y) = (A^-1 x M)(Y - 1 x u) / h - G(Y) = 0 and ends at u' = (1 - sum d_i) u +
sum d_i Y_i, d = A^-T b (d = e_s for Radau IIA). With lambda' at its end::

    K_Y^T w = d x lambda',   K_Y = A^-1 x M / h - diag(g_Y(Y_i))
    lambda = (1 - sum d_i) lambda' + M^T sum_j (A^-1 1)_j w_j / h,    mu += sum_i g_p(Y_i)^T w_i

one transposed solve of all stages together. No product with g_Y is needed for lambda, and nothing
cancels where g is stiff.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode.adjoint.stepper import TorchAdjointStepper
from pnode.base.errors import LinearSolveFailed, SolveError
from pnode.base.ledger import Ledger
from pnode.base.options import SolverOptions
from pnode.field.linearization import Linearization
from pnode.field.vectorfield import VectorField
from pnode.solvers.firk.integrator import refuse_options
from pnode.solvers.firk.systems import Blocks, CoupledSystem, Krylov
from pnode.solvers.firk.tableaus import transformation
from pnode.solvers.petsc.bridge import Bridge
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.stepping import Step

__all__ = ["CoupledAdjoint"]


class CoupledAdjoint(TorchAdjointStepper):
    """Adjoint of a fully implicit Runge-Kutta step, from its stages."""

    def __init__(
        self, settings: IntegratorSettings, options: SolverOptions, parameters: bool
    ) -> None:
        super().__init__(settings, parameters)
        refuse_options(settings, options)
        scheme = settings.method.scheme
        assert scheme is not None
        self._scheme = scheme
        self.transformation = transformation(scheme)
        self.bridge = Bridge(points=scheme.stages)
        tight = 1e-12 if settings.dtype is torch.float64 else 1e-6
        self._krylov = Krylov(options.values, tight)
        self._blocks = Blocks(settings)
        self._mass: torch.Tensor | None = None

    def begin(self, field: VectorField, batch: Sequence[int] = ()) -> None:
        """Begin a sweep with zero cost gradients. Collective."""
        super().begin(field, batch)
        self.bridge.attach(field)
        self._mass = self._blocks.mass(field.mass) if self._blocks.assembles else None

    def end(self) -> None:
        """End a sweep: let go of the user's objects."""
        self.bridge.detach()
        self._mass = None
        super().end()

    def step(self, step: Step, ledger: Ledger) -> None:
        """Take the adjoint of one step, whose checkpoint has been loaded. Collective.

        Raises
        ------
        LinearSolveFailed
            If a transposed solve did not converge.
        BaseException
            Whatever the vector field raised.
        """
        graphs, system = self.linearized(step)
        new, device = self.transformation, self.state.device
        right = torch.as_tensor(new.end, device=device)[:, None] * self.state[..., None, :]
        w = self.solve(system, right, step, ledger, transposed=True)
        self._add_products(graphs, w, step)
        driven = torch.as_tensor(new.from_start / step.length, device=device) @ w
        mass = self.field.mass
        driven = driven if mass is None else mass.apply_transpose(driven)
        if new.start_weight:
            driven = driven + new.start_weight * self.state
        self.state = driven
        ledger.steps += 1

    def _add_products(self, graphs: Sequence[Linearization], w: torch.Tensor, step: Step) -> None:
        """Add the products with the parameters' derivatives at the stages."""
        look = self.field.look
        for i, graph in enumerate(graphs):
            own = w.select(-2, i)
            if look is not None:
                s, Y = step.at(self._scheme.c[i]), self.checkpoint.stages[i]
                look(s, Y, own, step.length * self._scheme.b[i], "rhs")
            if self.wants_parameters:
                self.pull_back(graph.vjp, own)

    def linearized(self, step: Step) -> tuple[list[Linearization], CoupledSystem]:
        """Return the graphs at the stages, compared with what was noted, and their system."""
        bridge, graphs, jacobians = self.bridge, [], []
        try:
            for i, (c, Y) in enumerate(zip(self._scheme.c, self.checkpoint.stages, strict=True)):
                point = bridge.point_at(step.at(c), Y)
                graph = bridge.linearize(point)
                graphs.append(graph)
                if self._blocks.assembles:
                    jacobians.append(self._blocks.jacobian(bridge, point))
                doubt = self.evidence[2 * i + 1] if self.evidence else 0.0
                self.verify(graph.flat_value(), 2 * i, step.at(c), step, slack=doubt)
        except SolveError as error:
            raise error.located(**self._where(step)) from error.__cause__
        system = CoupledSystem(
            self.transformation, step.length, jacobians or graphs, self.field.mass, self._mass,
            self._krylov, self.field.problem.ranks,
        )  # fmt: skip
        return graphs, system

    def solve(
        self, system: CoupledSystem, b: torch.Tensor, step: Step, ledger: Ledger,
        transposed: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Solve a step's system, b of shape ``(..., s, size)``. Collective."""
        before = self._krylov.iterations
        found = system.solve(b, transposed)
        ledger.krylov += self._krylov.iterations - before
        if found is None:
            raise LinearSolveFailed(
                "a solve of the adjoint for the coupled stages failed: use jacobian='dense', or "
                "allow more iterations with petsc_options={'ksp_max_it': ...}",
                **self._where(step),
            )
        return found

"""Linear systems of a step: A^-1 x M / h - diag(J_i), in two ways.

With one Jacobian for all stages, in the eigenvectors of A^-1 (a real and a complex matrix of the
size of the state, for three stages); and with each stage's own, coupled. Dense matrices are a batch
of one of the blocks of independent samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pnode.base.devices import Place
from pnode.base.ranks import Ranks
from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.problems.mass import MassMatrix
from pnode.solvers.firk.gmres import gmres
from pnode.solvers.firk.tableaus import Transformation
from pnode.solvers.linear.block import BlockAssembly
from pnode.solvers.linear.linearizer import Linearizer, Point
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["Blocks", "CoupledSystem", "Krylov", "SimplifiedSystem"]


class Krylov:
    """How systems are solved by products, and how many these took.

    Parameters
    ----------
    values : mapping
        PETSc's options: ksp_rtol, ksp_gmres_restart and ksp_max_it are heard.
    rtol : float
        Instead of ksp_rtol, where that is not given.

    Attributes
    ----------
    iterations : int
        So far.
    """

    def __init__(self, values: Any, rtol: float) -> None:
        self.rtol = float(values.get("ksp_rtol", rtol))
        self._restart = int(values.get("ksp_gmres_restart", 100))
        self._limit = int(values.get("ksp_max_it", 10_000))
        self.iterations = 0

    def solve(self, apply: Any, b: torch.Tensor, ranks: Ranks) -> torch.Tensor | None:
        """Return the solution, None where there is none. Collective."""
        x, taken = gmres(apply, b, ranks, self.rtol, self._restart, self._limit)
        self.iterations += taken
        return x


class Blocks:
    """Assembles Jacobians as blocks, shape ``(B, m, m)``; None where products are to do.

    Parameters
    ----------
    settings : IntegratorSettings
        Kind of Jacobian, and the place.
    """

    def __init__(self, settings: IntegratorSettings) -> None:
        self.assembles = settings.jacobian in ("dense", "block")
        self._size = settings.size
        self._place: Place = settings.place
        self.samples = settings.jacobian_options.samples if settings.jacobian == "block" else 1
        self._assembly: BlockAssembly | None = None
        if settings.jacobian == "block":
            self._assembly = BlockAssembly(self.samples, settings.place)
            self._assembly.create(settings.size, settings.comm).destroy()
        self._check = True

    def begin(self) -> None:
        """Begin a sweep, whose first blocks are to be compared with a product."""
        self._check = True

    def jacobian(self, linearizer: Linearizer, point: Point) -> torch.Tensor:
        """Return the blocks of dg/du at a point, PETSc's precision."""
        if self._assembly is None:
            return linearizer.linearize(point).jacobian().to(REAL)[None]
        blocks: torch.Tensor = self._assembly.evaluate(linearizer, point, self._check)[0]
        self._check = False
        return blocks

    def mass(self, mass: MassMatrix | None) -> torch.Tensor:
        """Return the blocks of M, or one that stands for all."""
        if mass is None:
            width = self._size // self.samples
            return torch.eye(width, dtype=REAL, device=self._place.device)[None]
        return mass.dense()[None] if self._assembly is None else mass.blocks(self.samples)


class SimplifiedSystem:
    """Systems with one Jacobian for all stages: those of Newton's simplified method.

    Parameters
    ----------
    transformation : Transformation
        Of the method.
    h : float
        Length of the step.
    jacobian : Tensor or Linearization
        J, blocks or products.
    mass : MassMatrix or None
        M.
    blocks : Tensor or None
        Its blocks, where J has some.
    krylov : Krylov
        For products.
    ranks : Ranks
        Who share the state.
    """

    def __init__(
        self, transformation: Transformation, h: float, jacobian: torch.Tensor | Linearization,
        mass: MassMatrix | None, blocks: torch.Tensor | None, krylov: Krylov, ranks: Ranks,
    ) -> None:  # fmt: skip
        self._transformation, self.h = transformation, h
        self._jacobian, self._mass = jacobian, mass
        self._krylov, self._ranks = krylov, ranks
        self._factors: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.factored = 0
        if isinstance(jacobian, torch.Tensor):
            assert blocks is not None
            device = jacobian.device
            self._vectors = torch.as_tensor(transformation.vectors, device=device)
            self._covectors = torch.as_tensor(transformation.covectors, device=device)
            for value in transformation.eigenvalues:
                shift = complex(value) / h
                shift = shift.real if abs(shift.imag) <= 1e-12 * abs(shift) else shift
                matrix = shift * blocks - jacobian
                self._factors.append(torch.linalg.lu_factor_ex(matrix)[:2])
                self.factored += 1

    def solve(self, b: torch.Tensor) -> torch.Tensor | None:
        """Return Z of (A^-1 x M / h - I x J) Z = b, shape ``(s, size)``. Collective."""
        if not self._factors:
            inverse = torch.as_tensor(self._transformation.inverse / self.h, device=b.device)
            return self._krylov.solve(
                lambda Z: inverse @ _times(self._mass, Z) - torch.stack(list(map(self._along, Z))),
                b, self._ranks,
            )  # fmt: skip
        parts = []
        for right, (factors, pivots) in zip(
            self._covectors @ b.to(self._covectors), self._factors, strict=True
        ):
            real = not factors.is_complex()
            right = (right.real if real else right).reshape(len(factors), -1, 1)
            parts.append(torch.linalg.lu_solve(factors, pivots, right).reshape(-1))
        return (self._vectors @ torch.stack([part.to(self._vectors) for part in parts])).real

    def solve_real(self, b: torch.Tensor) -> torch.Tensor | None:
        """Return x of (gamma M / h - J) x = b, gamma the real eigenvalue. Collective."""
        if not self._factors:
            shift = float(self._transformation.eigenvalues[0].real) / self.h
            return self._krylov.solve(
                lambda v: shift * _times(self._mass, v) - self._along(v), b, self._ranks
            )
        factors, pivots = self._factors[0]
        return torch.linalg.lu_solve(factors, pivots, b.reshape(len(factors), -1, 1)).reshape(-1)

    def _along(self, v: torch.Tensor) -> torch.Tensor:
        assert isinstance(self._jacobian, Linearization)
        return self._jacobian.jvp(v.to(self._jacobian.dtype)).to(REAL)


class CoupledSystem:
    """The system of all stages, each with its own Jacobian: what derivatives of a step solve.

    Parameters
    ----------
    transformation, h, mass, blocks, krylov, ranks
        As for :class:`SimplifiedSystem`.
    jacobians : sequence of (Tensor or Linearization)
        J_i.
    """

    def __init__(
        self, transformation: Transformation, h: float,
        jacobians: Sequence[torch.Tensor] | Sequence[Linearization], mass: MassMatrix | None,
        blocks: torch.Tensor | None, krylov: Krylov, ranks: Ranks,
    ) -> None:  # fmt: skip
        self._mass, self._krylov, self._ranks = mass, krylov, ranks
        self._jacobians = jacobians
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._inverse = transformation.inverse / h
        if blocks is not None:
            J = torch.stack(list(jacobians))  # type: ignore[arg-type]
            s, batch, width, _ = J.shape
            inverse = torch.as_tensor(self._inverse, device=J.device)
            matrix = torch.einsum("ij,bpq->bipjq", inverse, blocks.expand(batch, -1, -1))
            matrix = matrix.contiguous()
            for i in range(s):
                matrix[:, i, :, i] -= J[i]
            size = s * width
            self._factors = torch.linalg.lu_factor_ex(matrix.view(batch, size, size))[:2]

    def solve(self, b: torch.Tensor, transposed: bool = False) -> torch.Tensor | None:
        """Return the solution, None where there is none; b has shape ``(..., s, size)``.

        Collective.
        """
        if self._factors is None:
            rows = [self._products(row, transposed) for row in b.reshape(-1, *b.shape[-2:])]
            found = [row for row in rows if row is not None]
            return torch.stack(found).view(b.shape) if len(found) == len(rows) else None
        factors, pivots = self._factors
        batch, s = len(factors), b.shape[-2]
        right = b.reshape(-1, s, batch, b.shape[-1] // batch).permute(2, 1, 3, 0)
        right = right.reshape(batch, factors.shape[-1], -1)
        x = torch.linalg.lu_solve(factors, pivots, right, adjoint=transposed)
        x = x.view(batch, s, -1, x.shape[-1]).permute(3, 1, 0, 2).reshape(b.shape)
        # What is not finite here has a matrix that is singular.
        return x if self._ranks.norm(x) < 1e300 else None

    def _products(self, b: torch.Tensor, transposed: bool) -> torch.Tensor | None:
        inverse = torch.as_tensor(self._inverse, device=b.device)
        inverse = inverse.T if transposed else inverse

        def product(graph: Any, v: torch.Tensor) -> torch.Tensor:
            v = v.to(graph.dtype)
            found: torch.Tensor = graph.vjp(v).state if transposed else graph.jvp(v)
            return found.to(REAL)

        def apply(Z: torch.Tensor) -> torch.Tensor:
            own = [product(graph, v) for graph, v in zip(self._jacobians, Z, strict=True)]
            return inverse @ _times(self._mass, Z, transposed) - torch.stack(own)

        return self._krylov.solve(apply, b, self._ranks)


def _times(mass: MassMatrix | None, v: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    if mass is None:
        return v
    return mass.apply_transpose(v) if transposed else mass.apply(v)

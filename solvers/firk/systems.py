"""Linear systems of a step: A^-1 x M / h - diag(J_i), in two ways.

With one Jacobian for all stages, in the eigenvectors of A^-1 (a real and a complex matrix of the
size of the state, for three stages); and with each stage's own, coupled. Dense matrices are a batch
of one of the blocks of independent samples; sparse ones are factored by SuperLU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pnode.base.devices import Place
from pnode.base.errors import ConfigurationError
from pnode.base.ranks import Ranks
from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization
from pnode.problems.mass import MassMatrix
from pnode.solvers.firk.gmres import gmres
from pnode.solvers.firk.sparse_factors import SparseFactors
from pnode.solvers.firk.tableaus import Transformation
from pnode.solvers.linear.block import BlockAssembly, Factors
from pnode.solvers.linear.linearizer import Linearizer, Point
from pnode.solvers.linear.sparse import Entries, SparseAssembly
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["AnyJacobian", "Blocks", "CoupledSystem", "Krylov", "SimplifiedSystem"]


# A state with its tangents or integrals has a dense Jacobian up to this size, where the state's is
# dense: GMRES takes ten products and more for each system.
_SMALL_PAIR = 64

# Blocks, entries, or what has products.
AnyJacobian = torch.Tensor | Entries | Linearization


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
    """Assembles Jacobians as blocks, shape ``(B, m, m)``, or as entries, unless products are to do.

    Parameters
    ----------
    settings : IntegratorSettings
        Kind of Jacobian, and the place.
    """

    def __init__(self, settings: IntegratorSettings) -> None:
        self.assembles = settings.jacobian in ("dense", "block", "sparse") or _is_small(settings)
        self._size = settings.size
        self._place: Place = settings.place
        self.samples = settings.jacobian_options.samples if settings.jacobian == "block" else 1
        self._assembly: BlockAssembly | SparseAssembly | None = None
        if settings.jacobian == "block":
            self._assembly = BlockAssembly(self.samples, settings.place)
            self._assembly.create(settings.size, settings.comm).destroy()
        elif settings.jacobian == "sparse":
            pattern = settings.jacobian_options.pattern
            assert pattern is not None
            if pattern.columns_to is not None:
                raise ConfigurationError(
                    f"jacobian='sparse' with layout= and method={settings.method.name!r}, whose "
                    "systems are factored on each rank by itself: use jacobian='matrix-free', or "
                    "another method such as 'bdf' or 'es325'"
                )
            self._assembly = SparseAssembly(pattern, settings.place)

    def jacobian(self, linearizer: Linearizer, point: Point) -> torch.Tensor | Entries:
        """Return dg/du at a point, PETSc's precision: blocks, or entries with M's beside them."""
        if self._assembly is None:
            return linearizer.linearize(point).jacobian().to(REAL)[None]
        found: Any = self._assembly.evaluate(linearizer, point, check=True)
        return found if isinstance(found, Entries) else found[0]

    def mass(self, mass: MassMatrix | None) -> torch.Tensor | None:
        """Return the blocks of M, or one that stands for all; None for entries."""
        if isinstance(self._assembly, SparseAssembly):
            return None
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
    jacobian : Tensor, Entries or Linearization
        J, blocks, entries or products.
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
        self, transformation: Transformation, h: float, jacobian: AnyJacobian,
        mass: MassMatrix | None, blocks: torch.Tensor | None, krylov: Krylov, ranks: Ranks,
    ) -> None:  # fmt: skip
        self._transformation, self.h = transformation, h
        self._jacobian, self._mass = jacobian, mass
        self._krylov, self._ranks = krylov, ranks
        self._factors: list[Factors | SparseFactors] = []
        if isinstance(jacobian, Linearization):
            return
        device = jacobian.device if isinstance(jacobian, torch.Tensor) else jacobian.fixed.device
        self._vectors = torch.as_tensor(transformation.vectors, device=device)
        self._covectors = torch.as_tensor(transformation.covectors, device=device)
        for value in transformation.eigenvalues:
            shift = complex(value) / h
            shift = shift.real if abs(shift.imag) <= 1e-12 * abs(shift) else shift
            if isinstance(jacobian, Entries):
                values = jacobian.fixed + shift * jacobian.scaled
                self._factors.append(SparseFactors(jacobian.rows, jacobian.columns, values))
            else:
                assert blocks is not None
                self._factors.append(Factors(shift * blocks - jacobian))

    @property
    def factored(self) -> int:
        """Number of matrices that have been factored."""
        return len(self._factors)

    def solve(self, b: torch.Tensor) -> torch.Tensor | None:
        """Return Z of (A^-1 x M / h - I x J) Z = b, shape ``(s, size)``. Collective."""
        if not self._factors:
            inverse = torch.as_tensor(self._transformation.inverse / self.h, device=b.device)
            return self._krylov.solve(
                lambda Z: inverse @ _times(self._mass, Z) - torch.stack(list(map(self._along, Z))),
                b, self._ranks,
            )  # fmt: skip
        parts = []
        for right, factors in zip(
            self._covectors @ b.to(self._covectors), self._factors, strict=True
        ):
            right = right if factors.is_complex else right.real
            parts.append(factors.solve(right.reshape(len(factors.singular), -1)).reshape(-1))
        return (self._vectors @ torch.stack([part.to(self._vectors) for part in parts])).real

    def solve_real(self, b: torch.Tensor) -> torch.Tensor | None:
        """Return x of (gamma M / h - J) x = b, gamma the real eigenvalue. Collective."""
        if not self._factors:
            shift = float(self._transformation.eigenvalues[0].real) / self.h
            return self._krylov.solve(
                lambda v: shift * _times(self._mass, v) - self._along(v), b, self._ranks
            )
        factors = self._factors[0]
        return factors.solve(b.reshape(len(factors.singular), -1)).reshape(-1)

    def _along(self, v: torch.Tensor) -> torch.Tensor:
        assert isinstance(self._jacobian, Linearization)
        return self._jacobian.jvp(v.to(self._jacobian.dtype)).to(REAL)


class CoupledSystem:
    """The system of all stages, each with its own Jacobian: what derivatives of a step solve.

    Parameters
    ----------
    transformation, h, mass, blocks, krylov, ranks
        As for :class:`SimplifiedSystem`.
    jacobians : sequence of (Tensor, Entries or Linearization)
        J_i.
    """

    def __init__(
        self, transformation: Transformation, h: float,
        jacobians: Sequence[AnyJacobian], mass: MassMatrix | None,
        blocks: torch.Tensor | None, krylov: Krylov, ranks: Ranks,
    ) -> None:  # fmt: skip
        self._mass, self._krylov, self._ranks = mass, krylov, ranks
        self._jacobians = jacobians
        self._factors: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sparse: SparseFactors | None = None
        self._inverse = transformation.inverse / h
        if isinstance(jacobians[0], Entries):
            self._sparse = self._assembled(jacobians)  # type: ignore[arg-type]
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
        if self._sparse is not None:
            x = self._sparse.solve(b.reshape(-1, b.shape[-2] * b.shape[-1]), transposed)
            return x.view(b.shape) if self._ranks.norm(x) < 1e300 else None
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

    def _assembled(self, jacobians: Sequence[Entries]) -> SparseFactors:
        """Return the factors of all stages together."""
        size = int(jacobians[0].rows.max()) + 1
        rows, columns, values = [], [], []
        for i, own in enumerate(jacobians):
            for j, weight in enumerate(self._inverse[i].tolist()):
                rows.append(own.rows + i * size)
                columns.append(own.columns + j * size)
                values.append(weight * own.scaled + (own.fixed if i == j else 0.0))
        return SparseFactors(torch.cat(rows), torch.cat(columns), torch.cat(values))

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


def _is_small(settings: IntegratorSettings) -> bool:
    """Whether it is a small pair, or pair of pairs, of a state with a dense Jacobian."""
    jacobian, options = settings.jacobian, settings.jacobian_options
    while options.pair is not None:
        jacobian, options = options.pair.jacobian, options.pair.options
    small = not settings.parallel and settings.size <= _SMALL_PAIR
    return small and jacobian == "dense"


def _times(mass: MassMatrix | None, v: torch.Tensor, transposed: bool = False) -> torch.Tensor:
    if mass is None:
        return v
    return mass.apply_transpose(v) if transposed else mass.apply(v)

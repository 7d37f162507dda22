"""Jacobians of independent samples: a block for each, and their LU as a preconditioner."""

from __future__ import annotations

from typing import Any

import torch

from pnode.base.devices import HOST, Place
from pnode.base.errors import ConfigurationError
from pnode.base.evidence import projection_weights
from pnode.base.options import PETSc, log_event
from pnode.base.vectors import REAL, copy_in, view
from pnode.field.linearization import Linearization
from pnode.problems.problem import StateLayout
from pnode.solvers.linear.assembly import Assembly, differ
from pnode.solvers.linear.linearizer import Linearizer, Point
from pnode.solvers.linear.shells import shell_matrix

__all__ = [
    "BLOCK_LU", "BlockAssembly", "BlockLU", "BlockMatrix", "Factors", "block_lu", "sample_blocks",
    "sample_count",
]  # fmt: skip

#: Options value of the preconditioner.
BLOCK_LU = "pnode.solvers.linear.block.BlockLU"


def sample_count(layout: StateLayout) -> int:
    """Return B of a state of shape (B, ...).

    Raises
    ------
    ConfigurationError
        For a tuple or a single number.
    """
    if layout.is_tuple or not layout.shapes[0]:
        shapes = [tuple(shape) for shape in layout.shapes]
        raise ConfigurationError(
            "jacobian='block' (or preconditioner='block') needs a state that is one tensor of "
            f"shape (B, ...), B independent samples, and y0 has the shape {shapes}: stack the "
            "parts along a later dimension, or use jacobian='sparse'"
        )
    return layout.shapes[0][0]


def sample_blocks(
    linearization: Linearization, samples: int, check: bool, own: int | None = None
) -> tuple[list[torch.Tensor], bool]:
    """Return the diagonal blocks of dg/du (and dF/du_dot, for a residual), (B, m, m) each.

    With ``check`` also whether there is more than these, by one product more among them; ``own``:
    those of the first entries of each sample alone, which depend on no others.
    """
    like = linearization.flat_value()
    whole = like.numel() // samples
    width = whole if own is None else own
    # Row j of every sample's Jacobian at once: no entry of the state has two of them.
    units = torch.eye(width, whole, dtype=like.dtype, device=like.device)
    units = units[:, None, :].expand(width, samples, whole).reshape(width, -1)
    if check:
        units = torch.cat([units, (w := projection_weights(like))[None]])
    found = linearization.assemble(units)
    blocks = [
        rows[:width].view(width, samples, whole)[..., :width].transpose(0, 1).contiguous()
        for rows in found
    ]
    if not check:
        return blocks, False
    rows = w.view(samples, 1, -1)
    coupled = any(
        differ(
            product[-1], torch.bmm(rows, block).reshape(-1),
            torch.bmm(rows.abs(), block.abs()).reshape(-1),
        )
        for block, product in zip(blocks, found, strict=True)
    )  # fmt: skip
    return blocks, coupled


class Factors:
    """LU of each of several matrices, shape ``(B, m, m)``.

    Attributes
    ----------
    singular : Tensor
        Which of them are, shape ``(B,)``.
    is_complex : bool
        What the matrices are.
    """

    def __init__(self, matrices: torch.Tensor) -> None:
        self._factors, self._pivots, info = torch.linalg.lu_factor_ex(matrices)
        self.singular, self.is_complex = info.ne(0), matrices.is_complex()

    def solve(self, b: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Return the solutions for right-hand sides ``(B, m)``."""
        return self.solve_columns(b[..., None], transposed)[..., 0]

    def solve_columns(self, b: torch.Tensor, transposed: bool = False) -> torch.Tensor:
        """Return the solutions for k right-hand sides of each, ``(B, m, k)``."""
        found: torch.Tensor = torch.linalg.lu_solve(
            self._factors, self._pivots, b, adjoint=transposed
        )
        return found


class BlockMatrix:
    """Python context of a block-diagonal matrix.

    Attributes
    ----------
    blocks : Tensor
        Shape ``(B, m, m)``, PETSc's precision.
    """

    def __init__(self, blocks: torch.Tensor) -> None:
        self.blocks = blocks

    def mult(self, mat: Any, x: Any, y: Any) -> None:
        """y = A x."""
        copy_in(y, self._product(self.blocks, x))

    def multTranspose(self, mat: Any, x: Any, y: Any) -> None:
        """y = A^T x."""
        copy_in(y, self._product(self.blocks.mT, x))

    def scale(self, mat: Any, factor: float) -> None:
        """A = factor A."""
        self.blocks = self.blocks * factor

    def shifted(self, shift: float) -> BlockMatrix:
        """Return A + shift I."""
        unit = torch.eye(self.blocks.shape[-1], dtype=REAL, device=self.blocks.device)
        return BlockMatrix(self.blocks + shift * unit)

    @staticmethod
    def _product(blocks: torch.Tensor, x: Any) -> torch.Tensor:
        return torch.bmm(blocks, view(x).view(len(blocks), -1, 1)).reshape(-1)


class BlockLU:
    """Python context of a preconditioner: LU of every block of a :class:`BlockMatrix`."""

    def setUp(self, pc: Any) -> None:
        """Factor; a singular block fails the solve, as PETSc's own LU does."""
        event = log_event("pnode block LU")
        event.begin()
        self._factors = Factors(pc.getOperators()[1].getPythonContext().blocks)
        self._singular = bool(self._factors.singular.any())
        event.end()
        reasons = PETSc.PC.FailedReason
        pc.setFailedReason(reasons.FACTOR_NUMERIC_ZEROPIVOT if self._singular else reasons.NOERROR)

    def apply(self, pc: Any, x: Any, y: Any) -> None:
        """y = A^-1 x."""
        self._solve(x, y, False)

    def applyTranspose(self, pc: Any, x: Any, y: Any) -> None:
        """y = A^-T x."""
        self._solve(x, y, True)

    def solve(self, b: torch.Tensor, transposed: bool) -> torch.Tensor | None:
        """Return A^-1 b, or A^-T b, of the blocks last set up; None if one is singular."""
        if self._singular:
            return None
        rows = b.view(len(self._factors.singular), -1)
        return self._factors.solve(rows, transposed).reshape(-1)

    def matApply(self, pc: Any, x: Any, y: Any) -> None:
        """Y = A^-1 X."""
        if self._singular:
            x.copy(y)
            return
        rows, found = (torch.from_numpy(one.getDenseArray().T) for one in (x, y))
        b = rows.view(len(rows), len(self._factors.singular), -1).permute(1, 2, 0)
        columns = self._factors.solve_columns(b)
        found.copy_(columns.permute(2, 0, 1).reshape(rows.shape))

    def _solve(self, x: Any, y: Any, transposed: bool) -> None:
        found = self.solve(view(x), transposed)
        if found is None:
            x.copy(y)
        else:
            copy_in(y, found)


def block_lu(ksp: Any) -> BlockLU | None:
    """Return the preconditioner of a KSP that does nothing but apply it; None for another."""
    pc = ksp.getPC()
    context = pc.getPythonContext() if pc.getType() == "python" else None
    return context if ksp.getType() == "preonly" and isinstance(context, BlockLU) else None


class BlockAssembly(Assembly):
    """Samples that do not know of one another: B blocks from m products for all at once.

    Parameters
    ----------
    samples : int
        B.
    place, exact
        As for :class:`~pnode.solvers.linear.sparse.SparseAssembly`.
    """

    def __init__(self, samples: int, place: Place = HOST, exact: bool = False) -> None:
        super().__init__(place)
        self._samples = samples
        self._exact = exact
        self._width = 0

    def create(self, size: int, comm: Any) -> Any:
        """Return a python matrix."""
        self._width = size // self._samples
        blocks = torch.zeros(
            self._samples, self._width, self._width, dtype=REAL, device=self._place.device
        )
        return shell_matrix(BlockMatrix(blocks), size, size, comm, self._place)

    def evaluate(self, linearizer: Linearizer, point: Point, check: bool) -> Any:
        """Return the blocks of dg/du and dF/du_dot (None for the identity), (B, m, m) each."""
        linearization = linearizer.linearize(point)
        batch = self._samples
        blocks, coupled = sample_blocks(linearization, batch, check or self._exact)
        if coupled:
            raise ConfigurationError(
                "jacobian='block' (or preconditioner='block') needs a vector field that acts on "
                f"each of the {batch} rows of the batch by itself, and this one couples them: use "
                "jacobian='dense', 'sparse' or 'matrix-free', or put each system of coupled "
                "samples into one row"
            )
        if len(blocks) == 2:
            return blocks[0].to(REAL), blocks[1].to(REAL)
        mass = point.field.mass
        return blocks[0].to(REAL), None if mass is None else mass.blocks(batch)

    def form(self, matrix: Any, values: Any, shift: float) -> None:
        """Put the blocks into the matrix's context."""
        context = matrix.getPythonContext()
        state, rate = (None, None) if values is None else values
        unit = rate
        if unit is None:
            unit = torch.eye(self._width, dtype=REAL, device=self._place.device)
        blocks = (shift * unit).expand(self._samples, -1, -1)
        context.blocks = blocks.contiguous() if state is None else blocks - state
        matrix.assemble()
        matrix.stateIncrease()

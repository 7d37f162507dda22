"""Jacobians of few colors in machine code: ``jacobian="sparse"`` and "block"."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from pnode.base.evidence import projection_weights
from pnode.base.options import PETSc
from pnode.base.vectors import REAL
from pnode.field.vectorfield import VectorField
from pnode.solvers.compiled.compiler import bare
from pnode.solvers.linear.jacobians import JacobianOptions
from pnode.solvers.linear.linearizer import Point
from pnode.solvers.linear.sparse import SparsityPattern

__all__ = ["Colored", "colored"]


class Colored:
    """The entries of a Jacobian, the products that tell them, and the order of elimination.

    Parameters
    ----------
    pattern : SparsityPattern
        Where entries may be.

    Attributes
    ----------
    seeds : Tensor
        Shape ``(colors + 1, size)``: of the products, and of one that shows that there are no
        other entries.
    rows, columns, colors, order : Tensor
        Of the entries; of the rows; of elimination, by nested dissection.
    name : str
        Tells it from others.
    """

    def __init__(self, pattern: SparsityPattern) -> None:
        self.rows, self.columns, self.colors = (
            x.contiguous() for x in (pattern.rows, pattern.columns, pattern.colors)
        )
        size = pattern.size
        self.seeds = torch.zeros(pattern.color_count + 1, size, dtype=REAL)
        self.seeds[self.colors, torch.arange(size)] = 1.0
        self.seeds[-1] = projection_weights(self.seeds[-1])
        self.order = _order(self.rows, self.columns, size)
        parts = (x.numpy().tobytes() for x in (self.rows, self.columns, self.colors, self.order))
        self.name = hashlib.sha256(b"".join(parts)).hexdigest()


def _order(rows: torch.Tensor, columns: torch.Tensor, size: int) -> torch.Tensor:
    """Return the rows in the order in which PETSc's nested dissection eliminates them."""
    diagonal = torch.arange(size)
    i = torch.cat([rows, columns, diagonal]).numpy().astype(PETSc.IntType)
    j = torch.cat([columns, rows, diagonal]).numpy().astype(PETSc.IntType)
    matrix = PETSc.Mat().createAIJ(size, comm=PETSc.COMM_SELF)
    matrix.setPreallocationCOO(i, j)
    matrix.setValuesCOO(torch.ones(len(i), dtype=REAL).numpy())
    found = matrix.getOrdering("nd")
    order = torch.from_numpy(found[0].getIndices().astype("int64"))
    for made in (matrix, *found):
        made.destroy()
    return order


def colored(
    codes: dict[Any, Any], jacobian: str, options: JacobianOptions, part: VectorField,
    y0: torch.Tensor,
) -> Colored | None:  # fmt: skip
    """Return what there is to know of a field's Jacobian; None of a dense one.

    Kept among the field's codes. A pattern that nobody gave is looked for, as eagerly.
    """
    if jacobian == "dense":
        return None
    pattern = options.pattern
    key: Any = (Colored, options.samples)
    if jacobian == "sparse":
        assert pattern is not None
        key = (pattern, len(pattern.rows))
    if key not in codes:
        if jacobian == "block":
            pattern = _of_blocks(options.samples, len(y0))
        assert pattern is not None
        codes[key] = Colored(pattern if pattern.known else _detected(part, y0))
    found: Colored = codes[key]
    return found


def _detected(part: VectorField, y0: torch.Tensor) -> SparsityPattern:
    """Return a pattern of its own: single steps look where they are."""
    field, s, u, pattern = bare(part), part.problem.times[0], y0.detach().clone(), SparsityPattern()
    pattern.detect(Point(s, u, (0, 0), field), field.linearize(s, u))
    return pattern


def _of_blocks(samples: int, size: int) -> SparsityPattern:
    width = size // samples
    rows = torch.arange(size).repeat_interleave(width)
    columns = (torch.arange(size) // width * width)[:, None] + torch.arange(width)
    return SparsityPattern(rows, columns.reshape(-1), size)

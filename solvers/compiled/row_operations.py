"""Graphs on a batch of independent samples as expressions of one of them, or why they are none.

The number of an entry tells its expression and whose it is: one row's, that of all rows alike, or
a sum over all rows. An operation that mixes entries of several rows in another way ends the
evaluation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pnode.solvers.compiled.operations import Operations
from pnode.solvers.compiled.scalars import Scalars, Symbols
from pnode.solvers.compiled.trace import Untraceable

__all__ = ["Coupled", "RowOperations"]

# Of sums over rows they are sums over rows.
_ADDING = {"add", "sub", "neg", "sum"}


class Coupled(Untraceable):
    """That rows depend on one another, or compute different things."""


class RowOperations(Operations):
    """Evaluates graphs on expressions of one row.

    Parameters
    ----------
    scalars : Scalars
        Where the expressions are kept.
    rows : int
        How many rows there are.
    """

    def __init__(self, scalars: Scalars, rows: int) -> None:
        super().__init__(scalars)
        self._rows, self._width = rows, rows + 2
        # Whose: 0 all rows' alike, 1 to B a row's, B + 1 the sum over rows.
        self._total = rows + 1

    def of_rows(self, expressions: Symbols, axis: int) -> Symbols:
        """Return entries that belong to the rows along an axis, of whose length there are."""
        shape = [1] * (expressions.ids.dim() + 1)
        shape[axis] = self._rows
        whose = torch.arange(1, self._rows + 1).view(shape)
        return Symbols(expressions.ids.unsqueeze(axis) * self._width + whose)

    def shared(self, expressions: Symbols) -> Symbols:
        """Return entries that all rows have alike."""
        return Symbols(expressions.ids * self._width)

    def alike(self, values: Symbols) -> Symbols:
        """Return the expressions of what :meth:`shared` gave."""
        return Symbols(values.ids // self._width)

    def summed(self, expressions: Symbols) -> Symbols:
        """Return entries that are sums over all rows."""
        ids = expressions.ids
        return Symbols(torch.where(ids == 0, 0, ids * self._width + self._total))

    def row(self, values: Symbols) -> Symbols:
        """Return the expressions of one row of ``(B, ...)``.

        Raises
        ------
        Coupled
            If they are not those of all rows.
        """
        ids, whose = self._parts(values.ids)
        own = torch.arange(1, self._rows + 1).view(-1, *[1] * (whose.dim() - 1))
        if bool(((whose != own) & (whose != 0)).any()):
            raise Coupled("the vector field gives a row what depends on others")
        if bool((ids != ids[:1]).any()):
            raise Coupled("the vector field computes different things in different rows")
        return Symbols(ids[0])

    def total(self, values: Symbols) -> Symbols:
        """Return the expressions in a row of sums over all rows.

        Raises
        ------
        Coupled
            If they are no such sums.
        """
        ids, whose = self._parts(values.ids)
        known = (whose == self._total) | (ids == 0)
        if self._rows == 1:
            known |= whose <= 1
        if not bool(known.all()):
            raise Coupled("a gradient is no sum over rows")
        return Symbols(ids)

    def _parts(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return codes // self._width, codes % self._width

    def _constants(self, values: torch.Tensor) -> Symbols:
        return self.shared(super()._constants(values))

    def _each(
        self, combine: Callable[[list[int]], int], rows: torch.Tensor, name: str
    ) -> torch.Tensor:
        if not rows.numel():
            return super()._each(combine, rows, name) * self._width
        ids, whose = self._parts(rows)
        own = whose.amax(dim=1)
        alone = ((whose == own[:, None]) | (whose == 0)).all(dim=1)
        over = alone & (own == self._total)
        if bool(over.any()):
            self._refuse_nonlinear(name, ids[over], whose[over])
        made = torch.zeros(len(rows), dtype=torch.int64)
        distinct, places = _distinct(ids[alone])
        found = super()._each(combine, distinct, name)[places]
        made[alone] = torch.where(found == 0, 0, found * self._width + own[alone])
        for index in (~alone).nonzero()[:, 0].tolist():
            made[index] = self._over_rows(combine, rows[index], name)
        return made

    def _refuse_nonlinear(self, name: str, ids: torch.Tensor, whose: torch.Tensor) -> None:
        """Raise Coupled if an operation on sums over rows is no sum over rows of that."""
        sums = whose == self._total
        if name in _ADDING:
            linear = sums | (ids == 0)
        elif name == "mul":
            linear = sums.sum(dim=1, keepdim=True) == 1
        elif name == "div":
            linear = ~sums[:, 1:]
        else:
            linear = torch.zeros(1, dtype=torch.bool)
        if not bool(linear.all()):
            raise Coupled(f"the vector field takes {name} of a sum over rows")

    def _over_rows(
        self, combine: Callable[[list[int]], int], codes: torch.Tensor, name: str
    ) -> int:
        """Return a sum over all rows."""
        ids, whose = self._parts(codes[codes != 0])
        order = whose.argsort(stable=True)
        each = len(ids) // self._rows
        expected = torch.arange(1, self._rows + 1).repeat_interleave(each)
        same = torch.equal(whose[order], expected)
        terms = ids[order].view(self._rows, each) if same else ids[:0]
        if name != "sum" or not same or bool((terms != terms[:1]).any()):
            raise Coupled(f"the vector field mixes rows, by {name}")
        return combine(terms[0].tolist()) * self._width + self._total

    def matrix_product(self, a: Any, b: Any) -> Symbols:
        """Return the product of two matrices."""
        left, right = self._symbols(a).ids, self._symbols(b).ids.t()
        rows, columns = self._lines(left), self._lines(right)
        if rows is None or columns is None:
            products = self._pointwise("mul", Symbols(left[:, None]), Symbols(right[None]))
            return self._do_sum(products, [2])
        own, other = rows[0][:, None], columns[0][None]
        if bool(((own != other) & (own != 0) & (other != 0)).any()):
            raise Coupled("the vector field mixes rows in a matrix product")
        done = [
            [self._scalars.product_sum(row, column) for column in columns[1].tolist()]
            for row in rows[1].tolist()
        ]
        found = torch.tensor(done, dtype=torch.int64)[rows[2]][:, columns[2]]
        return Symbols(torch.where(found == 0, 0, found * self._width + torch.maximum(own, other)))

    _do_mm = matrix_product

    def _lines(self, codes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """Return whose each line of a matrix is, the lines that differ, and which it is of these.

        None if one is of several rows, or of sums.
        """
        ids, whose = self._parts(codes)
        own = whose.amax(dim=1)
        if bool(((whose != own[:, None]) & (whose != 0)).any() or (own == self._total).any()):
            return None
        return own, *_distinct(ids)

    def _do_bmm(self, a: Any, b: Any) -> Symbols:
        left, right = self._symbols(a).ids, self._symbols(b).ids.mT
        products = self._pointwise("mul", Symbols(left[:, :, None]), Symbols(right[:, None]))
        return self._do_sum(products, [3])


def _distinct(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of a matrix that differ, and which of them each one is."""
    generator = torch.Generator().manual_seed(3)
    most = 2**62
    weights = torch.randint(-most, most, rows.shape[1:], generator=generator, dtype=torch.int64)
    kinds, places = torch.unique((rows * weights).sum(dim=1), return_inverse=True)
    first = torch.full((len(kinds),), len(rows), dtype=torch.int64)
    first.scatter_reduce_(0, places, torch.arange(len(rows)), "amin")
    found = rows[first]
    if torch.equal(found[places], rows):
        return found, places
    distinct, places = torch.unique(rows, dim=0, return_inverse=True)
    return distinct, places

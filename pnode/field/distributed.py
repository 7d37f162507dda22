"""Products with the derivatives of f where several ranks share the state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from pnode.base.ranks import Ranks
from pnode.field.linearization import Linearization, Products
from pnode.layout.layouts import Layout

__all__ = ["Cells", "DistributedLinearization"]


class Cells(NamedTuple):
    """The cells of one rank and those that it looks at.

    Attributes
    ----------
    ranks : Ranks
        The processes that share the state.
    exchange : Layout or None
        Of a state with ghost cells.
    """

    ranks: Ranks
    exchange: Layout | None

    def gather(self, u: torch.Tensor) -> torch.Tensor:
        """Return the ghosted part of a flat state, flat."""
        return u if self.exchange is None else self.exchange.gather(u).reshape(-1)

    def scatter(self, w: torch.Tensor) -> torch.Tensor:
        """Return the transpose of :meth:`gather` applied to w."""
        return w if self.exchange is None else self.exchange.scatter(w)


class DistributedLinearization(Linearization):
    """A linearization on one of several ranks: products exchange ghost cells too.

    Assembled rows (:meth:`rows`) are with respect to the ghosted state.

    Parameters
    ----------
    cells : Cells
        The ranks, and who exchanges.
    *arguments
        Those of a :class:`Linearization`.
    """

    def __init__(self, cells: Cells, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._cells = cells

    def vjp(self, w: torch.Tensor) -> Products:
        """Return w^T dg/dy and this rank's part of w^T dg/dp. Collective with ghost cells."""
        products = self._cells.ranks.attempt(super().vjp, w)
        if products is None:
            nothing = torch.full_like(self._leaves[0], torch.nan).reshape(-1)
            parameters = (None,) * len(self._shared.parameters)
            rate = None if self._shared.mass is None else torch.full_like(w, torch.nan)
            products = Products(nothing, parameters, rate)
        return products._replace(state=self._cells.scatter(products.state))

    def jvp(self, v: torch.Tensor, state: float = 1.0, rate: float = 0.0) -> torch.Tensor:
        """Return ``state dg/du v + rate dF/du_dot v``, flat. Collective with ghost cells."""
        product = self._cells.ranks.attempt(super().jvp, self._cells.gather(v), state, 0.0)
        if product is None:
            return torch.full_like(v, torch.nan)
        if rate:
            mass = self._shared.mass
            product = product + rate * (v if mass is None else mass.apply(v))
        return product

    def along(
        self, states: torch.Tensor | None, parameters: Sequence[tuple[int, torch.Tensor]],
        time: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return dg/du Z_k + dg/dp v_k + dg/ds tau_k. Collective with ghost cells."""
        given = (states, time, *(tangents for _, tangents in parameters))
        number = next(len(one) for one in given if one is not None)
        if states is not None:
            states = self._gathered(states)
        found = self._cells.ranks.attempt(super().along, states, parameters, time)
        if found is None:
            return self._value.new_full((number, self._value.numel()), torch.nan)
        return found

    def second_vjp(
        self, w: torch.Tensor, v: torch.Tensor, time: torch.Tensor | None = None
    ) -> Products:
        """Return the derivatives of sum_i w_i^T (dg/dy v_i + ...). Collective with ghost cells."""
        products = self._cells.ranks.attempt(super().second_vjp, w, self._gathered(v), time)
        if products is None:
            nothing = torch.full_like(self._leaves[0], torch.nan).reshape(-1)
            products = Products(nothing, (None,) * len(self._shared.parameters))
        return products._replace(state=self._cells.scatter(products.state))

    def second_along(
        self, states: torch.Tensor, parameters: Sequence[tuple[int, torch.Tensor]],
        v: torch.Tensor, time: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return the derivatives of dg/dy v_i + ... along tangents. Collective with ghost cells."""
        number = len(states)
        states, v = self._gathered(states), self._gathered(v)
        found = self._cells.ranks.attempt(super().second_along, states, parameters, v, time)
        if found is None:
            return self._value.new_full((len(v), number, self._value.numel()), torch.nan)
        return found

    def _gathered(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.stack([self._cells.gather(row) for row in rows])

    def _rows(self, cotangents: torch.Tensor) -> list[torch.Tensor]:
        rows = self._cells.ranks.attempt(super()._rows, cotangents)
        if rows is None:
            width = self._leaves[0].numel()
            return [cotangents.new_full((len(cotangents), width), torch.nan)]
        return rows

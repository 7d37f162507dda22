"""Parts of the graph of a state and what it drives, each of which is a graph by itself."""

from __future__ import annotations

from typing import Any

import torch

from pnode.base.vectors import REAL
from pnode.field.linearization import Linearization, Shared
from pnode.field.products import batched, edges_work, joined_edges
from pnode.layout.pair_layout import PairLayout

__all__ = ["PartLinearization", "integrands_by_state"]

# Integrals whose integrands' derivatives are kept, instead of products with the pair's graph.
_FEW = 16
_ONE = torch.Size()


class PartLinearization(Linearization):
    """One of the parts that a pair's value was joined of, by the state that comes first in it.

    Parameters
    ----------
    whole : Linearization
        Of the pair.
    shared : Shared
        What it has in common with others of its field.
    edge : GradientEdge
        Where the part's graph ends.
    value : Tensor
        A flat tensor of the part's shape and dtype, its value if that is to be asked for.
    size : int
        Entries of the state.
    beside : GradientEdge or None
        Where the graph of few integrands ends, for products with them among those of a Jacobian.
    number : int
        How many these are.

    Attributes
    ----------
    driven : Tensor or None
        Products with these, ``(number, size)``, once there are some.
    """

    def __init__(
        self, whole: Linearization, shared: Shared, edge: Any, value: torch.Tensor, size: int,
        beside: Any = None, number: int = 0,
    ) -> None:  # fmt: skip
        super().__init__(shared, whole._leaves, value, whole._sign, whole._time)
        self._end, self._recorded = edge, True
        self._size, self._beside, self._number = size, beside, number
        self.driven: torch.Tensor | None = None

    @classmethod
    def of(
        cls, whole: Linearization, layout: PairLayout, shared: Shared | None = None
    ) -> PartLinearization | None:
        """Return a part of a pair's graph; None where it cannot be told from the others.

        Parameters
        ----------
        whole : Linearization
            Of the pair.
        layout : PairLayout
            Of the pair.
        shared : Shared or None
            Of the state's own field, for the state's part; None for that of the integrals.
        """
        if type(whole) not in (Linearization, cls) or len(whole._leaves) > 1 or not edges_work:
            return None  # cells of others, or a rate, are what it depends on
        value, edges = whole._value.detach(), joined_edges(whole._end)
        if not edges:
            return None
        if shared is None:
            shared, edge, value = whole._shared, edges[-1], layout.integral(value)
        elif len(edges) == 1 + layout.tangents + bool(layout.integrals):
            edge, value = edges[0], value[: layout.size]
            if _few(layout) and edge is not None and edges[-1] is not None:
                return cls(whole, shared, edge, value, layout.size, edges[-1], layout.integrals)
        else:
            return None  # a state of several parts
        return None if edge is None else cls(whole, shared, edge, value, layout.size)

    def _flat(self, product: torch.Tensor | None, batch: torch.Size = _ONE) -> torch.Tensor:
        return super()._flat(product, batch)[..., : self._size]

    def _record_vjp(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        cotangent, (product,) = super()._record_vjp()
        with torch.enable_grad():
            return cotangent, (product[: self._size],)

    def _rows(self, cotangents: torch.Tensor) -> list[torch.Tensor]:
        number = self._number
        if self._beside is not None and 4 * number <= len(cotangents):
            rows = torch.cat([cotangents, cotangents.new_zeros(number, self._size)])
            unit = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)[:, -number:]
            ends = (self._end, self._beside)
            both = batched(ends, self._leaves, (rows, unit))
            if both is not None and both[0] is not None:
                found = both[0][:, : self._size]
                self.driven = found[-number:] if self._sign > 0 else -found[-number:]
                return [found[:-number]]
        return [found[..., : self._size] for found in super()._rows(cotangents)]


def _few(layout: PairLayout) -> bool:
    return not layout.tangents and 0 < layout.integrals <= _FEW


def integrands_by_state(
    whole: Linearization, layout: PairLayout, own: Linearization | None
) -> torch.Tensor | None:
    """Return the derivatives of a pair's integrands by the state, ``(integrals, size)``, if few.

    ``own`` is the state's part, which may have found them already.
    """
    if not _few(layout):
        return None
    if isinstance(own, PartLinearization) and own.driven is not None:
        whole._shared.ledger.vjp += layout.integrals
        return own.driven.to(REAL)
    part = PartLinearization.of(whole, layout)
    if part is None:
        return None
    like = part.flat_value()
    return part.vjps(torch.eye(len(like), dtype=like.dtype, device=like.device)).to(REAL)

"""f and its graph at one point: products with its derivatives, by autograd."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from pnode.base.graphs import graph_bytes
from pnode.base.hooks import ParameterHooks
from pnode.base.ledger import Ledger
from pnode.field.products import (
    batched,
    directional_derivatives,
    edges_work,
    gradients,
    pull_back,
    pull_back_rows,
)
from pnode.field.second_products import derivatives_along, vjps_of_products
from pnode.problems.mass import MassMatrix
from pnode.problems.transfers import Remote

__all__ = ["Linearization", "Products", "Shared"]

_ONE = torch.Size()


class Products(NamedTuple):
    """Products of a cotangent w with the derivatives of g (for a residual, g = -F).

    Attributes
    ----------
    state : Tensor
        w^T dg/du, shape ``(size,)``, the user's precision.
    parameters : tuple of Tensor or None
        w^T dg/dp, one per parameter; None where the field does not use it.
    rate : Tensor or None
        w^T dF/du_dot, shape ``(size,)``; None if F = u_dot - g, when it is w itself.
    """

    state: torch.Tensor
    parameters: tuple[torch.Tensor | None, ...]
    rate: torch.Tensor | None = None


@dataclass(slots=True)
class Shared:
    """What the linearizations of one sweep have in common.

    Attributes
    ----------
    parameters : tuple of Tensor
        That products are taken with.
    mass : MassMatrix or None
        M of M y' = f; None for the identity.
    ledger : Ledger
        Where products are counted.
    hooks : ParameterHooks or None
        What must not act on single products with the parameters.
    remote : Remote or None
        Copies f's arguments to where it computes, if that is elsewhere.
    """

    parameters: tuple[torch.Tensor, ...]
    mass: MassMatrix | None
    ledger: Ledger
    hooks: ParameterHooks | None = None
    remote: Remote | None = None
    _blank: torch.Tensor | None = None

    def like(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the shape, dtype and device of a value, and without its numbers."""
        if self._blank is None or self._blank.shape != value.shape:
            self._blank = value.new_empty(()).expand(value.shape)
        return self._blank

    def hooks_away(self) -> AbstractContextManager[None]:
        """Return a context in which hooks on parameters do not act; see :mod:`pnode.base.hooks`."""
        return nullcontext() if self.hooks is None else self.hooks.away()


class Linearization:
    """g and its graph at one point; products with dg/du and its transpose.

    Parameters
    ----------
    shared : Shared
        What it has in common with the others of its sweep.
    leaves : tuple of Tensor
        Leaves of the graph, in the user's shape (flat for a tuple) and precision: the state y,
        and its rate y' for a residual.
    value : Tensor
        What the user's function returned, with its graph, in the same shape.
    sign : float
        g = sign * value.
    time : Tensor
        The user's time, a leaf of the graph if its derivative is wanted.
    rate_sign : float, optional
        dF/du_dot = rate_sign * dvalue/dy', for a residual.
    """

    def __init__(
        self,
        shared: Shared,
        leaves: tuple[torch.Tensor, ...],
        value: torch.Tensor,
        sign: float,
        time: torch.Tensor,
        rate_sign: float | None = None,
    ) -> None:
        self._shared = shared
        self._leaves = leaves
        self._value = value
        self._sign = sign
        self._rate_sign = rate_sign
        self._time = time
        self._end: Any = value  # or the edge that it is at
        self._recorded = value.requires_grad
        self._double_backward: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        self._jacobians: tuple[torch.Tensor, ...] | None = None

    @property
    def dtype(self) -> torch.dtype:
        """The user's precision."""
        return self._value.dtype

    def drop_value(self) -> None:
        """Let go of f's value, which only the graph itself may still need: for VJPs alone."""
        if self._value.requires_grad and edges_work:
            self._end = torch.autograd.graph.get_gradient_edge(self._value)
            # Its shape and dtype, without its numbers.
            self._value = self._shared.like(self._value)

    def kept_bytes(self, copy: int = 0) -> int:
        """Return about how many bytes are kept besides the state, its ``copy`` and parameters."""
        known = [*self._leaves, *self._shared.parameters]
        return graph_bytes(self._value, [each for each in known if each is not self._value], copy)

    def adopt(self, shared: Shared) -> None:
        """Take products for another sweep of the same problem, and count them there."""
        if self._shared.remote is not None:
            self._shared.remote.ledger = shared.ledger
        self._shared = shared

    def flat_value(self) -> torch.Tensor:
        """Return g at this point, flat, without its graph."""
        value = self._value.detach().reshape(-1)
        return value if self._sign > 0 else -value

    def vjp(self, w: torch.Tensor) -> Products:
        """Return w^T dg/dy and w^T dg/dp from one backward pass.

        Parameters
        ----------
        w : Tensor
            Flat cotangent, shape ``(size,)``, the user's precision; or k of them as rows: so have
            the products.
        """
        # The graph is kept even for a single product: part of it may be the user's, from
        # parameters that are not leaves.
        inputs = (*self._leaves, *self._shared.parameters)
        batch = _ONE if w.dim() == 1 else w.shape[:-1]
        self._shared.ledger.vjp += batch.numel()
        products: tuple[torch.Tensor | None, ...] = (None,) * len(inputs)
        if self._recorded:
            cotangent = (w if self._sign > 0 else -w).view(batch + self._value.shape)
            if batch:
                with self._shared.hooks_away():
                    products = pull_back_rows(self._end, inputs, cotangent)
            elif self._shared.hooks is None:
                products = pull_back(self._end, inputs, cotangent)
            else:
                with self._shared.hooks.away():
                    products = pull_back(self._end, inputs, cotangent)
        state = self._flat(products[0], batch)
        if self._rate_sign is not None:
            rate = self._flat(products[1], batch)
            rate = rate if self._sign * self._rate_sign > 0 else -rate
            return Products(state, products[2:], rate)
        if self._shared.mass is not None:
            return Products(state, products[1:], self._shared.mass.apply_transpose(w))
        return Products(state, products[1:])

    def jvp(self, v: torch.Tensor, state: float = 1.0, rate: float = 0.0) -> torch.Tensor:
        """Return ``state dg/du v + rate dF/du_dot v``, flat.

        The VJP w -> w^T J is linear in w, so its own VJP with v is J v. Its graph is built once
        per point and serves every Krylov iteration there.
        """
        self._shared.ledger.jvp += 1
        if self._double_backward is None:
            self._double_backward = self._record_vjp()
        cotangent, products = self._double_backward
        factors = [state * self._sign]
        if self._rate_sign is not None:
            factors.append(rate * self._rate_sign)
        chosen = [
            (product, v * factor)
            for product, factor in zip(products, factors, strict=True)
            if product.requires_grad and factor
        ]
        result = None
        if chosen:
            (result,) = torch.autograd.grad(
                [product for product, _ in chosen],
                cotangent,
                [direction.view(product.shape) for product, direction in chosen],
                retain_graph=True,
                allow_unused=True,
            )
        flat = (torch.zeros_like(self._value) if result is None else result).reshape(-1)
        if rate and self._rate_sign is None:
            mass = self._shared.mass
            flat = flat + rate * (v if mass is None else mass.apply(v))
        return flat

    def _record_vjp(self) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        cotangent = torch.ones_like(self._value, requires_grad=True)
        products: tuple[torch.Tensor | None, ...] = (None,) * len(self._leaves)
        if self._recorded:
            with torch.enable_grad():
                products = gradients(self._end, self._leaves, cotangent, True)
        return cotangent, tuple(
            torch.zeros_like(leaf) if product is None else product
            for product, leaf in zip(products, self._leaves, strict=True)
        )

    def vjps(self, cotangents: torch.Tensor) -> torch.Tensor:
        """Return the VJPs with dg/du of the rows of ``cotangents``, shape ``(k, size)``."""
        self._shared.ledger.vjp += len(cotangents)
        products = self._rows(cotangents)[0]
        return products if self._sign > 0 else -products

    def along(
        self, states: torch.Tensor | None, parameters: Sequence[tuple[int, torch.Tensor]],
        time: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return dg/du Z_k + dg/dp v_k + dg/ds tau_k for several tangents, shape ``(m, size)``.

        Parameters
        ----------
        states, time : Tensor or None
            The Z_k and tau_k, shapes ``(m, size)`` and ``(m,)``, the user's precision; or zero.
        parameters : sequence of (int, Tensor)
            For each parameter that moves its index and its tangents, shape ``(m, *parameter)``.
        """
        inputs = [self._shared.parameters[index] for index, _ in parameters]
        rows = [tangents for _, tangents in parameters]
        if states is not None:
            inputs.append(self._leaves[0])
            rows.append(states)
        if time is not None and self._time.requires_grad:
            inputs.append(self._time)
            rows.append(self._sign * time)
        number = len(rows[0] if time is None else time)
        found = None
        if rows:
            with self._shared.hooks_away():
                found = directional_derivatives(self._value, self._end, inputs, rows)
        self._shared.ledger.jvp += number * (states is not None or found is not None)
        if found is None:
            return self._value.new_zeros(number, self._value.numel())
        return found.reshape(number, -1) if self._sign > 0 else -found.reshape(number, -1)

    def second_vjp(
        self, w: torch.Tensor, v: torch.Tensor, time: torch.Tensor | None = None
    ) -> Products:
        """Return the derivatives of sum_i w_i^T (dg/dy v_i + tau_i dg/ds) by y and parameters.

        Parameters
        ----------
        w, v, time : Tensor, Tensor, Tensor or None
            Shapes ``(n, size)`` or ``(k, n, size)``, ``(n, size)`` and ``(n,)``; constant.
        """
        batch = w.shape[:-2]
        self._shared.ledger.vjp += (len(v) + (time is not None)) * batch.numel()
        inputs = (self._leaves[0], *self._shared.parameters)
        rows = (w if self._sign > 0 else -w).reshape(-1, len(v), *self._value.shape)
        with self._shared.hooks_away():
            found = vjps_of_products(self._value, *self._weighted(v, time), inputs, rows)
        found = found if batch else [None if one is None else one[0] for one in found]
        return Products(self._flat(found[0], batch), tuple(found[1:]))

    def second_along(
        self, states: torch.Tensor, parameters: Sequence[tuple[int, torch.Tensor]],
        v: torch.Tensor, time: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Return derivatives of what :meth:`second_vjp` has along tangents, ``(n, m, size)``."""
        self._shared.ledger.jvp += len(v) * len(states)
        inputs = (self._leaves[0], *(self._shared.parameters[index] for index, _ in parameters))
        rows = [states, *(tangents for _, tangents in parameters)]
        with self._shared.hooks_away():
            found = derivatives_along(self._value, *self._weighted(v, time), inputs, rows)
        found = found.reshape(len(states), len(v), -1).movedim(0, 1)
        return found if self._sign > 0 else -found

    def _weighted(
        self, v: torch.Tensor, time: torch.Tensor | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Return the leaves of the graph that products are with, and what they are with."""
        leaves, given = [self._leaves[0]], [v.reshape(len(v), *self._leaves[0].shape)]
        if time is not None and self._time.requires_grad:
            leaves.append(self._time)
            given.append(self._sign * time)
        return leaves, given

    def time_derivative(self) -> torch.Tensor:
        """Return dg/ds = df/dt, flat; zero if the graph does not contain time."""
        return self.along(None, (), torch.ones_like(self._time)[None])[0]

    def records_time(self) -> bool:
        """Whether the graph contains time, which is to be a leaf of it."""
        if not self._value.requires_grad or not self._time.requires_grad:
            return False
        ones = torch.ones_like(self._value)
        return gradients(self._value, (self._time,), ones)[0] is not None

    def jacobian(self) -> torch.Tensor:
        """Return dg/du as a dense matrix, shape ``(size, size)``, the user's precision.

        All rows come from one batched backward pass if torch can batch f. Computed once per point.
        """
        matrix = self._matrices()[0]
        return matrix if self._sign > 0 else -matrix

    def rate_jacobian(self) -> torch.Tensor | None:
        """Return dF/du_dot as a dense matrix; None for the identity."""
        if self._rate_sign is not None:
            matrix = self._matrices()[1]
            return matrix if self._rate_sign > 0 else -matrix
        mass = self._shared.mass
        return None if mass is None else mass.dense()

    def rows(self, cotangents: torch.Tensor) -> list[torch.Tensor]:
        """Return w^T dg/du for every row w; for a residual, w^T dF/du_dot too. Not counted.

        Parameters
        ----------
        cotangents : Tensor
            Shape ``(k, size)``, the user's precision.

        Returns
        -------
        list of Tensor
            One or two, shape ``(k, size)``.
        """
        signs = (self._sign, self._rate_sign or 1.0)
        found = zip(self._rows(cotangents), signs, strict=False)
        return [part if sign > 0 else -part for part, sign in found]

    def assemble(self, cotangents: torch.Tensor) -> list[torch.Tensor]:
        """Return :meth:`rows`, counted as one assembled Jacobian."""
        self._shared.ledger.jacobians += 1
        return self.rows(cotangents)

    def _matrices(self) -> tuple[torch.Tensor, ...]:
        if self._jacobians is None:
            self._shared.ledger.jacobians += 1
            size = self._value.numel()
            identity = torch.eye(size, dtype=self._value.dtype, device=self._value.device)
            self._jacobians = tuple(matrix.reshape(size, size) for matrix in self._rows(identity))
        return self._jacobians

    def _rows(self, cotangents: torch.Tensor) -> list[torch.Tensor]:
        """Return the VJPs of the rows of ``cotangents``, shape ``(k, size)``, with each leaf."""
        if not self._recorded:
            return [cotangents.new_zeros(len(cotangents), leaf.numel()) for leaf in self._leaves]
        rows = cotangents.reshape(-1, *self._value.shape)
        found = batched((self._end,), self._leaves, (rows,)) if len(rows) > 1 else None
        if found is None:  # a single row, or no batching rule for an operation of this field
            one_by_one = [gradients(self._end, self._leaves, row) for row in rows]
            found = tuple(
                None if parts[0] is None else torch.stack(parts)
                for parts in zip(*one_by_one, strict=True)
            )
        return [
            cotangents.new_zeros(len(rows), leaf.numel())
            if part is None
            else part.reshape(len(rows), -1)
            for part, leaf in zip(found, self._leaves, strict=True)
        ]

    def _flat(self, product: torch.Tensor | None, batch: torch.Size = _ONE) -> torch.Tensor:
        if product is None:
            return self._leaves[0].new_zeros(*batch, self._leaves[0].numel())
        return product.reshape(*batch, -1)

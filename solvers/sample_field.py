"""The vector field of independent samples: all rows at once, each at a time of its own."""

from __future__ import annotations

from typing import Any

import torch

from pnode.base.devices import HOST
from pnode.base.errors import ConfigurationError
from pnode.base.ledger import Ledger
from pnode.base.noise import noise
from pnode.base.vectors import REAL, is_finite
from pnode.field.field_checks import undisturbed
from pnode.field.linearization import Linearization
from pnode.field.vectorfield import VectorField
from pnode.problems.problem import InitialValueProblem, StateLayout
from pnode.solvers.linear.block import sample_blocks
from pnode.solvers.linear.structure import halves_of

__all__ = ["RowsField"]


class RowsField(VectorField):
    """f on all rows, at a time for each: a tensor of shape ``(B,)`` in place of a number."""

    explicit: RowsField | None

    def __init__(self, problem: InitialValueProblem, ledger: Ledger, function: Any = None) -> None:
        super().__init__(problem, ledger, function)
        if problem.explicit is not None and function is None:
            self.explicit = RowsField(problem, ledger, problem.explicit)
            self.explicit.used = self.used
        self._parts: dict[int, RowsField] = {}
        tangents = problem.base is not None and not problem.integrals
        base = problem.base if problem.base is not None and tangents else problem
        #: Entries of a row, and those before its tangents.
        self.whole, self.own = (
            one.layout.size // one.layout.shapes[0][0] for one in (problem, base)
        )
        #: Those of its state: errors and residuals of integrals do not count.
        self.width = self.own - base.integrals
        self._checked = tangents

    def _time(self, s: Any) -> torch.Tensor:
        shape = self._layout.shapes[0]
        others = len(shape) - 1 - any(self._layout.pairs)
        return s.to(self._layout.dtype).view(-1, *[1] * others)

    def times_of(self, values: torch.Tensor) -> torch.Tensor:
        """Return a number of each row in the shape of the times that f gets."""
        return self._time(values)

    def rate(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return f at times ``(B,)`` and states ``(B, n)``, in double precision."""
        own = u.to(self.dtype, copy=True).reshape(-1)
        return self.rhs(t, own).to(REAL).view_as(u)  # type: ignore[arg-type]

    def total_rate(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return dy/dt: the sum of both parts of a split field."""
        own = self.rate(t, u)
        return own if self.explicit is None else own + self.explicit.rate(t, u)

    def graph(self, t: torch.Tensor, u: torch.Tensor, by_time: bool = False) -> Linearization:
        """Return f with its graph there; ``by_time`` for derivatives by the times too."""
        own = u.to(self.dtype, copy=True).reshape(-1)
        return self.linearize(t, own, differentiate_time=by_time)  # type: ignore[arg-type]

    def blocks(self, graph: Linearization) -> torch.Tensor:
        """Return the Jacobian of each row, shape ``(B, n, n)``, double precision; of no tangents.

        Raises
        ------
        ConfigurationError
            If a row depends on others: the first of a sweep are compared with a product.
        """
        rows = self._layout.shapes[0][0]
        found, coupled = sample_blocks(graph, rows, not self._checked, self.own)
        if coupled:
            raise self._coupled()
        self._checked = self._checked or is_finite(found[0])  # what is not says nothing
        return found[0].to(REAL)

    def product(
        self, graph: Linearization, blocks: torch.Tensor | None, v: torch.Tensor,
        transposed: bool = False,
    ) -> torch.Tensor:  # fmt: skip
        """Return the Jacobian, or its transpose, times v of each row, ``(B, n)``.

        By ``blocks`` where these are all of it.
        """
        if blocks is not None and self.own == self.whole:
            return torch.bmm(blocks.mT if transposed else blocks, v[..., None])[..., 0]
        flat = v.reshape(-1).to(graph.dtype)
        found = graph.vjps(flat[None])[0] if transposed else graph.jvp(flat)
        return found.to(REAL).view_as(v)

    def _coupled(self, what: str = "") -> ConfigurationError:
        return ConfigurationError(
            "samples='independent' needs a vector field that acts on each of the "
            f"{self._layout.shapes[0][0]} rows of y0 by itself, and this one couples them{what}: "
            "take samples='joint', put each system of coupled samples into one row, or a Module "
            "that normalizes over the batch into eval()"
        )

    def refuse_coupled(
        self, t: torch.Tensor, u: torch.Tensor, value: torch.Tensor, solves: int
    ) -> None:
        """Move some rows, and see to it that f of the others does not.

        A field that takes another value at the same point, or none at the moved one, is left to
        the checks that follow.

        Parameters
        ----------
        t, u, value : Tensor
            Times, states and f there.
        solves : int
            How many solves there were. In the first any two rows are told apart, by 2 log2(B)
            evaluations. Others take one of these, in turn: which finds at once what couples all
            rows, as normalization over a batch does.

        Raises
        ------
        ConfigurationError
            If f of a row depends on others.
        """
        halves = halves_of(len(u), u.device)
        if solves and len(halves):
            halves = halves[[solves % len(halves)]]
        scale = torch.maximum(u.abs(), u.abs().mean())
        by = 1.0 + 0.5 * noise(u.shape, torch.Generator(HOST.device).manual_seed(5)).to(u).tanh()
        moved = u + 0.1 * torch.where(scale > 0.0, scale, 1.0) * by
        for half in halves:
            try:
                found = self.glance(t, torch.where(half[:, None], moved, u))
            except Exception:  # outside of its domain
                return
            if self._alike(found[~half], value[~half]):
                continue
            if self._alike(self.glance(t, u), value):
                rows = (found != value).any(dim=1) & ~half
                raise self._coupled(f" (row {int(rows.nonzero()[0])} moves with others)")
            return

    def glance(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Return f as :meth:`rate` does, and leave what it writes and draws as it was."""
        with undisturbed(self.function, self.problem.compute or u.device):
            return self.rate(t, u)

    def _alike(self, found: torch.Tensor, value: torch.Tensor) -> bool:
        """Whether values are the same but for round-off, that of sums included."""
        tolerance = 1e-10 if self.dtype is torch.float64 else 1e-4
        finite = torch.where(value.isfinite(), value.abs(), 0.0)
        largest = float(finite.amax()) if value.numel() else 0.0
        return torch.allclose(found, value, rtol=0.0, atol=tolerance * largest, equal_nan=True)

    def layout_of(self, number: int) -> StateLayout:
        """Return the layout of so many rows alone."""
        layout = self._layout
        shape = torch.Size((number, *layout.shapes[0][1:]))
        return StateLayout((shape,), False, layout.dtype, layout.device, layout.pairs)

    def of_rows(self, number: int) -> RowsField:
        """Return the field of so many rows alone."""
        if number not in self._parts:
            part = RowsField(self.problem.but(layout=self.layout_of(number)), self.ledger)
            for one in (part, part.explicit):
                if one is not None:
                    one.recording, one._check_first, one._checked = self.recording, False, True
                    one.used = self.used
            self._parts[number] = part
        return self._parts[number]

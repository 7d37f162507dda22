"""The vector field of independent samples: all rows at once, each at a time of its own."""

from __future__ import annotations

from typing import Any

import torch

from pnode.base.ledger import Ledger
from pnode.base.vectors import REAL
from pnode.errors import ConfigurationError
from pnode.field.linearization import Linearization
from pnode.field.vectorfield import VectorField
from pnode.problems.problem import InitialValueProblem, StateLayout
from pnode.solvers.linear.block import sample_blocks

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
        #: Entries of a row that are its state's: errors and residuals of integrals do not count.
        self.width = self._layout.size // self._layout.shapes[0][0] - problem.integrals
        self._checked = False

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
        """Return the Jacobian of each row, shape ``(B, n, n)``, double precision.

        Raises
        ------
        ConfigurationError
            If a row depends on others: the first of a sweep are compared with a product.
        """
        rows = self._layout.shapes[0][0]
        found, coupled = sample_blocks(graph, rows, not self._checked)
        self._checked = True
        if coupled:
            raise ConfigurationError(
                "samples='independent' needs a vector field that acts on each of the "
                f"{rows} rows of y0 by itself, and this one couples them: take "
                "samples='joint', or put each system of coupled samples into one row"
            )
        return found[0].to(REAL)

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

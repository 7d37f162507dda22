"""Whole sweeps of implicit methods with products alone: GMRES solves their linear systems.

Of states with ghost cells on all ranks at once, and of others in one process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode.base.vectors import REAL
from pnode.field.vectorfield import VectorField
from pnode.solvers.compiled.backend import GHOSTS, Checked, Compilation, Trace, Wanted
from pnode.solvers.compiled.exchanges import NO_FOREST
from pnode.solvers.compiled.fields import field_code
from pnode.solvers.compiled.ghost_programs import GhostProgram
from pnode.solvers.compiled.implicit_settings import prepared
from pnode.solvers.compiled.implicit_sweeps import JACOBIANS, ImplicitSweeps, kind_of
from pnode.solvers.compiled.trace import Untraceable

__all__ = ["GhostSweeps", "ProductSweeps"]

_FREE = "jacobian='matrix-free' is compiled "


class GhostSweeps(ImplicitSweeps):
    """Sweeps whose linear systems are solved by GMRES, with products alone."""

    ghosts: bool | None = True
    repeat = True
    others = GHOSTS

    def refuses(self, wanted: Wanted) -> str | None:
        """Return why there are no such sweeps for a solve, whatever the field."""
        settings, more = wanted.settings, wanted.settings.jacobian_options
        plain = settings.form in ("rhs", "imex") and not (wanted.watched or wanted.dense)
        products = settings.jacobian == "matrix-free" and more.preconditioner is None
        if (
            not (plain and products)
            or kind_of(settings.method) not in ("dirk", "bdf")
            or more.reuse not in ("auto", "iteration")
        ):
            return self.others
        return super().refuses(wanted)

    def _takes_entries(self, wanted: Wanted) -> bool:
        return True  # no Jacobian is made

    def _compile(
        self, trace: Trace, part: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> GhostProgram:
        method = wanted.settings.method
        explicit = method.kind == "imex" and part.explicit is None
        key = (GhostSweeps, "explicit" if explicit else kind_of(method))
        if key not in trace.codes:
            if any(x.dtype is not REAL for x in part.problem.parameters):
                raise Untraceable("it is differentiated by tensors that are not float64")
            trace.codes[key] = GhostProgram(field_code(trace, part, wanted), key[1])
        made: GhostProgram = trace.codes[key]
        if not explicit:
            prepared(made, wanted)
        return made

    def begin(
        self, checked: Sequence[Checked], field_: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Compilation:
        """Return the sweep. Collective."""
        layout = field_.problem.exchange
        assert layout is not None
        forest = layout.forest()
        if forest is None:
            return Compilation(reasons=(NO_FOREST,))
        for one in checked:
            one.code.exchange_by(forest)
        return super().begin(checked, field_, y0, wanted)


class ProductSweeps(GhostSweeps):
    """These of states of one process, whose fields get what it owns."""

    ghosts = False
    free = True
    others = JACOBIANS

    def refuses(self, wanted: Wanted) -> str | None:
        """Return why there are no such sweeps for a solve, whatever the field."""
        for given, text in (
            (wanted.settings.jacobian_options.preconditioner is not None, "a preconditioner"),
            (wanted.settings.integrals, "cost="),
            (wanted.watched or wanted.dense, "anybody who looks at single steps"),
        ):
            if given:
                return f"{_FREE}without {text}"
        return super().refuses(wanted)

    def begin(
        self, checked: Sequence[Checked], field_: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Compilation:
        """Return the sweep."""
        return ImplicitSweeps.begin(self, checked, field_, y0, wanted)

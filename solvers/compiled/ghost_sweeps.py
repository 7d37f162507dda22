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


class ProductSweeps(ImplicitSweeps):
    """Sweeps whose linear systems are solved by GMRES, with products alone, in one process."""

    free: bool | None = True

    def refuses(self, wanted: Wanted) -> str | None:
        """Return why there are no such sweeps for a solve, whatever the field."""
        for given, text in (
            (wanted.settings.jacobian_options.preconditioner is not None, "a preconditioner"),
            (wanted.settings.integrals, "cost="),
            (wanted.watched or wanted.dense, "anybody who looks at single steps"),
        ):
            if given:
                return f"jacobian='matrix-free' is compiled without {text}"
        return super().refuses(wanted) if self._takes_products(wanted) else JACOBIANS

    @staticmethod
    def _takes_products(wanted: Wanted) -> bool:
        """Whether there are such sweeps of a method, with nothing but products asked for."""
        settings, more = wanted.settings, wanted.settings.jacobian_options
        return (
            settings.form in ("rhs", "imex") and settings.jacobian == "matrix-free"
            and more.preconditioner is None and more.reuse in ("auto", "iteration")
            and not (wanted.watched or wanted.dense)
            and kind_of(settings.method) in ("dirk", "bdf")
        )  # fmt: skip

    def _takes_entries(self, wanted: Wanted) -> bool:
        return True  # no Jacobian is made

    def _compile(
        self, trace: Trace, part: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> GhostProgram:
        method = wanted.settings.method
        explicit = method.kind == "imex" and part.explicit is None
        key = (GhostProgram, "explicit" if explicit else kind_of(method))
        if key not in trace.codes:
            if any(x.dtype is not REAL for x in part.problem.parameters):
                raise Untraceable("it is differentiated by tensors that are not float64")
            trace.codes[key] = GhostProgram(field_code(trace, part, wanted), key[1])
        made: GhostProgram = trace.codes[key]
        if not explicit:
            prepared(made, wanted)
        return made


class GhostSweeps(ProductSweeps):
    """These of states with ghost cells, which all ranks exchange."""

    ghosts: bool | None = True
    repeat = True
    free = False

    def refuses(self, wanted: Wanted) -> str | None:
        """Return why there are no such sweeps for a solve, whatever the field."""
        return ImplicitSweeps.refuses(self, wanted) if self._takes_products(wanted) else GHOSTS

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

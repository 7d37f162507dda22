"""The user's own PETSc preconditioner or solver, to precondition with."""

from __future__ import annotations

from typing import Any

from pnode.base.errors import ConfigurationError
from pnode.base.options import PETSc

__all__ = ["FLEXIBLE", "GivenSolve"]

#: Krylov methods of PETSc whose preconditioner may be another one each time.
FLEXIBLE = ("fgmres", "pipefgmres", "gcr", "pipegcr", "fbcgs", "fbcgsr", "fcg", "pipefcg")


class GivenSolve:
    """Python context of a preconditioner: applies the user's PC, or solves with their KSP.

    Parameters
    ----------
    solver : PETSc.PC or PETSc.KSP
        With operators of its own, which stay. Shared by all sweeps and copies of a solver.
    """

    #: The same at all points.
    varies = False

    def __init__(self, solver: Any) -> None:
        self.solver = solver
        self.iterates = isinstance(solver, PETSc.KSP)
        self._forward, self._backward = (
            (solver.solve, solver.solveTranspose)
            if self.iterates
            else (solver.apply, solver.applyTranspose)
        )

    def __deepcopy__(self, memo: Any) -> GivenSolve:
        return self

    def __reduce__(self) -> Any:
        raise ConfigurationError(
            f"preconditioner is a PETSc {type(self.solver).__name__}, which cannot be pickled: "
            "make the solver where it is used"
        )

    def install(self, ksp: Any, size: int, chosen: Any) -> None:
        """Let a KSP use it. Collective.

        Parameters
        ----------
        ksp : PETSc.KSP
            Which has read its options.
        size : int
            Local entries of the state.
        chosen : str or None
            The preconditioner of the options, which must be none.

        Raises
        ------
        ConfigurationError
            If it does not fit the state or the options.
        """
        name = f"preconditioner is a PETSc {type(self.solver).__name__}"
        if chosen not in (None, "none"):
            raise ConfigurationError(f"{name}, and pc_type={chosen!r} is given: drop one of them")
        if self.iterates and ksp.getType() not in FLEXIBLE:
            raise ConfigurationError(
                f"{name}, whose result need not be linear in what it is given, and "
                f"ksp_type={ksp.getType()!r} takes it for that: use 'fgmres' (the default then) or "
                "'gcr', or give its PC"
            )
        matrix = self.solver.getOperators()[1]
        sizes = matrix.getLocalSize() if matrix else None
        if sizes != (size, size) or matrix.comm.size != ksp.comm.size:
            raise ConfigurationError(
                f"{name} with operators of local size {sizes}, for a state of {size} entries on "
                f"each of {ksp.comm.size} ranks (here): give one whose operators, "
                "setOperators(...), have the state's layout"
            )
        self.solver.setUp()
        ksp.getPC().setType("python")
        ksp.getPC().setPythonContext(self)

    def apply(self, pc: Any, x: Any, y: Any) -> None:
        """y = P^-1 x."""
        self._forward(x, y)

    def applyTranspose(self, pc: Any, x: Any, y: Any) -> None:
        """y = P^-T x."""
        self._backward(x, y)

"""Why rows of independent samples fail, in words, and their fixed steps."""

from __future__ import annotations

import torch

from pnode.base.errors import (
    LinearSolveFailed,
    NonFiniteVectorField,
    NonlinearSolveFailed,
    SolveError,
    StepLimitReached,
    StepSizeUnderflow,
)
from pnode.solvers.clock import FixedGrid

__all__ = ["WHY", "row_grids"]

_UNSOLVED = "the equations of a step were not solved: take smaller or adaptive steps"
#: What the errors say; ``most`` is the limit of steps, ``who`` is called.
WHY: dict[type[SolveError], str] = {
    NonFiniteVectorField: "{who} returned NaN or infinity",
    NonlinearSolveFailed: _UNSOLVED,
    LinearSolveFailed: _UNSOLVED,
    StepLimitReached: "max_steps={most} steps did not reach its last output time: raise max_steps, "
    "or loosen the tolerances",
    StepSizeUnderflow: "the smallest step failed: lower min_step, loosen rtol and atol, or look "
    "for a singularity of the vector field",
}


def row_grids(
    clock: torch.Tensor, directions: torch.Tensor, step_size: float, resolution: float, method: str
) -> list[FixedGrid]:
    """Return the fixed steps of each row, whose increasing times are ``clock``, shape ``(B, T)``.

    Raises
    ------
    StepSizeUnderflow
        Where float64 does not tell such steps apart.
    """
    grids: list[FixedGrid] = []
    for row, times in enumerate(clock.tolist()):
        grid = FixedGrid(tuple(times), step_size, resolution)
        if grid.unresolved is not None:
            raise StepSizeUnderflow(
                f"row {row}: step_size={step_size!r}, and float64 does not tell such times apart "
                "there: take larger steps, or measure t from nearby",
                time=directions[row].item() * times[grid.unresolved], step=0, method=method,
            )  # fmt: skip
        grids.append(grid)
    return grids

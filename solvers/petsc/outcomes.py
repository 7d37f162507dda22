"""What an attempt to take a step came to."""

from __future__ import annotations

from dataclasses import dataclass

from pnode.base.errors import SolveError

__all__ = ["StepOutcome"]


@dataclass
class StepOutcome:
    """What one attempt came to.

    Attributes
    ----------
    accepted : bool
        Whether the solution has moved.
    next_step : float
        Step size that the controller proposes.
    error : SolveError or None
        Why not, unless only the error estimate was too large.
    order : int
        What :class:`Step` records of it.
    """

    accepted: bool
    next_step: float
    error: SolveError | None = None
    order: int = 0

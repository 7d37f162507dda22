"""Tolerances as PETSc takes them, by which one of several ranks can reject a step of all."""

from __future__ import annotations

from typing import Any

import torch

from pnode.base import vectors
from pnode.base.devices import HOST
from pnode.problems.tolerances import Resolved
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["Rejection", "tolerance"]


def tolerance(settings: IntegratorSettings, given: Resolved) -> Any:
    """Return a tolerance as PETSc takes it: a number or a vector.

    A vector on several ranks, so that one of them can reject a step: see :class:`Rejection`.
    """
    if isinstance(given, float) and not (settings.parallel and settings.adaptive):
        return given
    vector = vectors.create(settings.comm, settings.size, settings.place)
    _fill(vector, given)
    return vector


def _fill(vector: Any, given: Resolved) -> None:
    values = given if isinstance(given, float) else given.tensor()
    values = torch.as_tensor(values, dtype=vectors.REAL, device=HOST.device)
    vectors.copy_in(vector, values.expand(vector.local_size))


class Rejection:
    """Makes the error estimate of a step too large, by tiny tolerances on this rank.

    The norm that PETSc reduces then rejects the step on all ranks. Not collective.

    Attributes
    ----------
    wanted : bool
        Whether the step under way is to be rejected.
    """

    def __init__(self, ts: Any, settings: IntegratorSettings) -> None:
        self._ts, self._settings = ts, settings
        self.wanted = False

    def ask(self) -> None:
        """Reject the step under way."""
        if not self.wanted:
            self.wanted = True
            self._set(0.0, 1e-100)

    def withdraw(self) -> None:
        """Take the tolerances of the settings again."""
        if self.wanted:
            self.wanted = False
            self._set(self._settings.rtol, self._settings.atol)

    def _set(self, rtol: Resolved, atol: Resolved) -> None:
        for vector, value in zip(self._ts.getTolerances(), (rtol, atol), strict=True):
            _fill(vector, value)

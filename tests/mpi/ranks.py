"""The ranks that run the tests of this folder, and what they found."""

from __future__ import annotations

from typing import Any

from mpi4py import MPI


class Checks:
    """Collects what holds and what does not; every rank goes on, so that none waits in vain.

    Each test of a module that has them begins and finishes with them, see ``conftest.py``.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Forget what was found. Not collective."""
        self.number = 0
        self.failures: list[str] = []

    def true(self, condition: Any, *what: Any) -> None:
        """Note whether something holds on this rank. Not collective."""
        self.number += 1
        if not condition:
            self.failures.append(" ".join(map(str, what)))

    def below(self, value: float, bound: float, *what: Any) -> None:
        """Note whether a value is at most a bound on this rank; NaN is not. Not collective."""
        self.true(value <= bound, *what, f"{value:.3e} > {bound:.3e}")

    def finish(self) -> None:
        """Fail with what did not hold, or if nothing was checked. Not collective."""
        assert not self.failures, "\n".join(self.failures[:40])
        assert self.number, "nothing was checked"


comm = MPI.COMM_WORLD
checks = Checks()

"""The ranks that run the tests of this folder, and what they found."""

from __future__ import annotations

from typing import Any

from mpi4py import MPI


class Checks:
    """Collects what holds and what does not; every rank goes on, so that none waits in vain.

    At the end of each test :meth:`finish` is called, see ``conftest.py``.
    """

    def __init__(self) -> None:
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
        """Fail with what did not hold, or if nothing was checked; begin anew. Not collective."""
        number, failures = self.number, self.failures
        self.number, self.failures = 0, []
        assert not failures, "\n".join(failures[:40])
        assert number, "nothing was checked"


comm = MPI.COMM_WORLD
checks = Checks()

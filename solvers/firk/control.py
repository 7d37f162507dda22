"""Step control of RADAU5: predictive, with the steps that are almost as long left as they are.

References
----------
E. Hairer, G. Wanner, Solving Ordinary Differential Equations II, section IV.8.
K. Gustafsson, Control-theoretic techniques for stepsize selection in implicit Runge-Kutta methods,
ACM Trans. Math. Softw. 20 (1994) 496-517.
"""

from __future__ import annotations

from pnode.problems.step_controllers import ErrorMemory

__all__ = ["PredictiveControl", "RememberedControl"]


class PredictiveControl:
    """Proposes the next step from this error and that of the step before."""

    _LEAST, _MOST, _SAFETY = 0.2, 10.0, 0.9
    # A step is kept, and its factors, where it could grow by less.
    _WORTH = 1.2
    # Of an error estimate of order 3.
    _EXPONENT = 0.25

    def __init__(self, most_iterations: int) -> None:
        self._most_iterations = most_iterations
        self.restart()

    def restart(self) -> None:
        """Know of no step before."""
        self._before: tuple[float, float] | None = None

    def reject(self, step: float, error: float, iterations: int) -> float:
        """Return the length to try instead."""
        return step * max(self._LEAST, self._safety(iterations) * self._factor(step, error))

    def accept(self, step: float, error: float, iterations: int, renews: bool) -> float:
        """Return the next step's length.

        ``renews`` tells whether its matrices are factored anew in any case.
        """
        factor = min(self._MOST, self._safety(iterations) * self._factor(step, error))
        self._before = step, error
        return step if factor < self._WORTH and not renews else step * factor

    def _safety(self, iterations: int) -> float:
        most = 2 * self._most_iterations
        return self._SAFETY * (most + 1) / (most + iterations)

    def _factor(self, step: float, error: float) -> float:
        if error == 0.0:
            return self._MOST
        growth = 1.0
        if self._before is not None and self._before[1] > 0.0:
            length, last = self._before
            growth = min(1.0, step / length * (last / error) ** self._EXPONENT)
        return float(growth * error**-self._EXPONENT)


class RememberedControl(ErrorMemory):
    """Proposes the next step by a PID."""

    def reject(self, step: float, error: float, iterations: int) -> float:
        """Return the length to try instead."""
        return self.propose(step, error, False)

    def accept(self, step: float, error: float, iterations: int, renews: bool) -> float:
        """Return the next step's length."""
        return self.propose(step, error, True)

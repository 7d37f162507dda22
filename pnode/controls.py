"""Controls: functions of time through samples, for vector fields that are driven from outside.

Each is a Module, called as ``control(t)`` inside of f. Before the first time and after the last one
it keeps the first and the last value. Times of any shape have one row of the values each; where t
ends with as many dimensions of size 1 as such a row has, as that of independent samples does, they
make room for it. ``control.derivative(t)`` is the derivative by time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pnode.base.real_times import real_times
from pnode.base.vectors import is_finite
from pnode.errors import ConfigurationError

__all__ = ["Control", "cubic", "hold", "linear"]


class Control(torch.nn.Module):
    """A function of time through samples; see :func:`hold`, :func:`linear` and :func:`cubic`.

    Attributes
    ----------
    times : Tensor
        Shape ``(T,)``, float64.
    values : Tensor
        Shape ``(T, ...)``, as given.
    breakpoints : Tensor
        Where the function jumps or has a kink in some derivative, float64. A solve takes them from
        the control itself, ``solver(y0, t, breakpoints=control)``.
    """

    _least = 2

    def __init__(self, times: Sequence[float] | torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.times, self.values = _samples(times, values)
        if len(self.times) < self._least:
            raise ConfigurationError("times has 1 entry: give two at least, or use hold")

    @property
    def breakpoints(self) -> torch.Tensor:
        """All times."""
        return self.times

    def _at(self, t: torch.Tensor, last: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a time, and the index of the last sample that is not after it, at most ``last``.

        The index stays a tensor, in operations that torch's compiler follows.
        """
        t = real_times("t", t, "give a time").to(self.times)
        more = self.values.dim() - 1
        if t.dim() > more and t.shape[t.dim() - more :] == (1,) * more:
            t = t.reshape(t.shape[: t.dim() - more])  # a column, one time a row of the values
        found = torch.searchsorted(self.times.detach(), t.detach().contiguous(), right=True) - 1
        return t, found.clamp(0, last)

    def derivative(self, t: torch.Tensor) -> torch.Tensor:
        """Return the derivative by time, shaped as the values are; zero outside of the samples.

        At a time of a sample that of the interval after it, at the last that of the one before.

        Raises
        ------
        ConfigurationError
            Of :func:`hold`, which jumps.
        """
        raise ConfigurationError("hold jumps and has no derivative by time: take linear or cubic")

    def _between(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the index of the interval of a time, its length, and where in it, in [0, 1]."""
        i, length, theta = self._around(t)
        return i, length, theta.clamp(0.0, 1.0)

    def _around(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Do so for where, of times outside of the samples, less than 0 or more than 1."""
        t, i = self._at(t, len(self.times) - 2)
        begin, end = _row(self.times, i), _row(self.times, i + 1)
        return i, end - begin, (t - begin) / (end - begin)

    def _slope(
        self, i: torch.Tensor, length: torch.Tensor, theta: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the slope of the polygon, and 1 where a time is within the samples, else 0."""
        rise = _row(self.values, i + 1) - _row(self.values, i)
        return rise / self._beside(length), self._beside((theta >= 0.0) & (theta <= 1.0))

    def _beside(self, numbers: torch.Tensor) -> torch.Tensor:
        """Return numbers, one a time, that multiply rows of the values."""
        more = (1,) * (self.values.dim() - 1)
        return numbers.reshape(numbers.shape + more).to(self.values)


class _Hold(Control):
    _least = 1

    @property
    def breakpoints(self) -> torch.Tensor:
        """All times but the first, before which the function is the same."""
        return self.times[1:]

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Return the value at the last sample that is not after t."""
        return _row(self.values, self._at(t, len(self.times) - 1)[1])


class _Linear(Control):
    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Return the value at a time."""
        i, _, theta = self._between(t)
        theta = self._beside(theta)
        return (1.0 - theta) * _row(self.values, i) + theta * _row(self.values, i + 1)

    def derivative(self, t: torch.Tensor) -> torch.Tensor:
        """Return the derivative by time."""
        slope, within = self._slope(*self._around(t))
        return within * slope


class _Cubic(Control):
    def __init__(self, times: Sequence[float] | torch.Tensor, values: torch.Tensor) -> None:
        super().__init__(times, values)
        # Second derivatives by values; built anew in each call where times get gradients.
        self._rows = None if self.times.requires_grad else _second_derivatives(self.times)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        """Return the value at a time."""
        i, length, theta = self._between(t)
        values, rest = self.values, 1.0 - theta
        bent = self._bent(
            i, (rest**3 - rest) * length**2 / 6.0, (theta**3 - theta) * length**2 / 6.0
        )
        rest, theta = self._beside(rest), self._beside(theta)
        return rest * _row(values, i) + theta * _row(values, i + 1) + bent

    def derivative(self, t: torch.Tensor) -> torch.Tensor:
        """Return the derivative by time."""
        i, length, theta = self._around(t)
        slope, within = self._slope(i, length, theta)
        left, right = 1.0 - 3.0 * (1.0 - theta) ** 2, 3.0 * theta**2 - 1.0
        return within * (slope + self._bent(i, left * length / 6.0, right * length / 6.0))

    def _bent(self, i: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return the second derivatives at both ends of an interval, by these weights."""
        rows = _second_derivatives(self.times) if self._rows is None else self._rows
        weights = left[..., None] * _row(rows, i) + right[..., None] * _row(rows, i + 1)
        return torch.tensordot(weights.to(self.values), self.values, dims=1)


def hold(times: Sequence[float] | torch.Tensor, values: torch.Tensor) -> Control:
    """Return a control that keeps each value until the next time: zero-order hold.

    Parameters
    ----------
    times : sequence of float or Tensor
        Increasing, shape ``(T,)``; no gradients, as jumps have no derivative that autograd sees.
    values : Tensor
        Shape ``(T, ...)``. At a time itself the function has the new value already. A Parameter is
        one of the control's; any other tensor that requires grad is to be named in ``params=``.

    Raises
    ------
    ConfigurationError
        For unusable samples, and for times that require grad.
    """
    if isinstance(times, torch.Tensor) and times.requires_grad:
        raise ConfigurationError(
            "times of hold require grad, and a jump moves with them, which autograd does not see: "
            "pass times.detach() here, and breakpoints=times to the solve, which has the gradient; "
            "or use linear or cubic"
        )
    return _Hold(times, values)


def linear(times: Sequence[float] | torch.Tensor, values: torch.Tensor) -> Control:
    """Return the polygon through samples; differentiable by times and values.

    Parameters
    ----------
    times : sequence of float or Tensor
        Increasing, shape ``(T,)`` with T > 1.
    values : Tensor
        Shape ``(T, ...)``; see :func:`hold`.

    Raises
    ------
    ConfigurationError
        For unusable samples.
    """
    return _Linear(times, values)


def cubic(times: Sequence[float] | torch.Tensor, values: torch.Tensor) -> Control:
    """Return the natural cubic spline through samples; differentiable by times and values.

    Parameters
    ----------
    times : sequence of float or Tensor
        Increasing, shape ``(T,)`` with T > 1.
    values : Tensor
        Shape ``(T, ...)``; see :func:`hold`.

    Raises
    ------
    ConfigurationError
        For unusable samples.
    """
    return _Cubic(times, values)


def _samples(times: object, values: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Validate samples."""
    if not isinstance(values, torch.Tensor) or not values.is_floating_point() or not values.dim():
        raise ConfigurationError(f"values={values!r}: give a real tensor of shape (T, ...)")
    knots = real_times("times", times, "give increasing numbers").to(values.device, torch.float64)
    if knots.dim() != 1 or not len(knots) or len(knots) != len(values):
        raise ConfigurationError(
            f"times has shape {tuple(knots.shape)} and values {tuple(values.shape)}: give one time "
            "for each row of values"
        )
    if not is_finite(knots.detach()) or bool((knots.detach().diff() <= 0.0).any()):
        raise ConfigurationError(f"times={times!r}: give finite numbers that strictly increase")
    if not is_finite(values.detach()):
        raise ConfigurationError("values contains NaN or infinity: give finite samples")
    return knots, values


def _row(rows: torch.Tensor, i: torch.Tensor) -> torch.Tensor:
    """Return ``rows[i]``, whose index no compiled code would have to be told as a number."""
    return rows.index_select(0, i.reshape(-1)).reshape(i.shape + rows.shape[1:])


def _second_derivatives(times: torch.Tensor) -> torch.Tensor:
    """Return the second derivatives of the natural spline at its knots by its values, (T, T)."""
    number, h = len(times), times.diff()
    matrix = torch.zeros((number - 2, number), dtype=times.dtype, device=times.device)
    right = torch.zeros_like(matrix)
    rows = torch.arange(number - 2, device=times.device)
    for system, parts in (
        (matrix, (h[:-1] / 6.0, (h[:-1] + h[1:]) / 3.0, h[1:] / 6.0)),
        (right, (1.0 / h[:-1], -1.0 / h[:-1] - 1.0 / h[1:], 1.0 / h[1:])),
    ):
        for shift, part in enumerate(parts):
            system[rows, rows + shift] = part
    inner = torch.linalg.solve(matrix[:, 1:-1], right)
    zero = torch.zeros_like(right[:1]) if number > 2 else right.new_zeros((1, number))
    return torch.cat([zero, inner, zero])

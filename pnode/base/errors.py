"""Exceptions, which users know by ``pnode.errors``: so tracebacks and pickles name them."""

from __future__ import annotations

__all__ = [
    "BackwardError",
    "CheckpointError",
    "ConfigurationError",
    "EventError",
    "FieldChanged",
    "LinearSolveFailed",
    "MissingPackage",
    "NonFiniteDerivative",
    "NonFiniteVectorField",
    "NonlinearSolveFailed",
    "PnodeError",
    "RankError",
    "SolveError",
    "StepLimitReached",
    "StepSizeUnderflow",
    "VectorFieldError",
]


class PnodeError(Exception):
    """Base class of all errors raised by pnode."""


class ConfigurationError(PnodeError, ValueError):
    """An argument is unusable; the message names it, its value and the remedy."""


class MissingPackage(PnodeError, ImportError):
    """A package that pnode can do without is not installed; the message has the pip command."""


class SolveError(PnodeError, RuntimeError):
    """A solve stopped.

    Parameters
    ----------
    message : str
        What happened and what to do.
    time : float, optional
        Time at which the failing step starts, in the user's units.
    step : int, optional
        Index of the failing step, counted from 0.
    method : str, optional
        Name of the method.
    reason : str, optional
        PETSc's own reason, such as ``"DIVERGED_MAX_IT"``.
    rank : int, optional
        Which process of several it happened on.
    """

    def __init__(
        self,
        message: str,
        *,
        time: float | None = None,
        step: int | None = None,
        method: str | None = None,
        reason: str | None = None,
        rank: int | None = None,
    ) -> None:
        self.message = message
        self.time, self.step, self.method, self.reason = time, step, method, reason
        self.rank = rank
        where = [
            text
            for text, value in (
                (f"t = {time!r}", time),
                (f"step {step}", step),
                (f"method {method!r}", method),
                (f"PETSc: {reason}", reason),
                (f"rank {rank}", rank),
            )
            if value is not None
        ]
        super().__init__(f"{message} [{', '.join(where)}]" if where else message)

    def located(self, *, time: float, step: int, method: str) -> SolveError:
        """Return this error with what it does not say yet about where it happened."""
        return type(self)(
            self.message,
            time=time if self.time is None else self.time,
            step=step if self.step is None else self.step,
            method=method if self.method is None else self.method,
            reason=self.reason,
            rank=self.rank,
        ).with_traceback(self.__traceback__)


class StepSizeUnderflow(SolveError):
    """The step-size controller asked for a step below the smallest one allowed."""


class StepLimitReached(SolveError):
    """``max_steps`` steps were taken before the last output time."""


class NonlinearSolveFailed(SolveError):
    """Newton's method did not converge."""


class LinearSolveFailed(SolveError):
    """A linear solve, forward or transposed, did not converge."""


class NonFiniteVectorField(SolveError):
    """The vector field returned NaN or infinity."""


class NonFiniteDerivative(NonFiniteVectorField):
    """A derivative of the vector field is NaN or infinite where its value is not."""


class VectorFieldError(SolveError):
    """The vector field returned the wrong thing, or wrote into its input."""


class EventError(SolveError):
    """``event_fn`` returned the wrong thing, or its root has no derivative."""


class CheckpointError(SolveError):
    """A checkpoint is missing or damaged."""


class BackwardError(SolveError):
    """The backward sweep cannot be done as asked."""


class FieldChanged(BackwardError):
    """The vector field is not the one of the forward sweep any more."""


class RankError(SolveError):
    """Code of the user's raised something on one process of several; its cause there is that."""


for _name in __all__:
    globals()[_name].__module__ = "pnode.errors"

"""What a sweep is asked for besides integrating, and which arguments do not go together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from pnode.errors import ConfigurationError
from pnode.problems import arguments
from pnode.sweeping.run import Requests

if TYPE_CHECKING:
    from pnode.configuration import LinearAlgebra, Output, Steps
    from pnode.solvers.methods import Method

__all__ = ["requested"]

_DISCRETE = "drop it, or take gradient='discrete'"
_JOINT = "take samples='joint' for it, or a loop over the samples"


def requested(
    gradient: str,
    form: str,
    method: Method,
    steps: Steps,
    linear_algebra: LinearAlgebra,
    output: Output,
    checkpointing: Any,
    cost: Any,
    layout: Any,
    compile: Any,
) -> Requests:
    """Return what a sweep is to do besides integrating, and refuse what it cannot.

    Parameters
    ----------
    gradient, form, method, steps, linear_algebra, output, checkpointing, cost, layout, compile
        What a solver is given.

    Raises
    ------
    ConfigurationError
        Naming the argument and the remedy.
    """
    chosen = arguments.choice("gradient", gradient, ("discrete", "continuous"))
    if chosen == "continuous":
        others = {"checkpointing": checkpointing, "cost": cost, "layout": layout}
        _refuse_unsupported(form, method, steps, linear_algebra, output, others)
    if steps.sensitivity_control is not None:
        _refuse_sensitivity_control({
            "event_fn": output.event_fn, "layout": layout,
            "resume": getattr(checkpointing, "resume", None),
            "gradient": "continuous" if chosen == "continuous" else None,
            "norm": steps.norm if callable(steps.norm) else None,
        })  # fmt: skip
    independent = _independent(
        gradient, form, method, steps, linear_algebra, output, checkpointing, cost, layout,
        compile is True,
    )  # fmt: skip
    return replace(
        output.requests(), independent=independent, continuous=chosen == "continuous",
        sensitivity_control=steps.sensitivity_control,
    )  # fmt: skip


def _refuse_sensitivity_control(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if value is not None:
            raise ConfigurationError(
                f"sensitivity_control with {name}={value!r} is not supported: drop one of them, or "
                "limit the steps by max_step="
            )


def _refuse_unsupported(
    form: str,
    method: Method,
    steps: Steps,
    linear_algebra: LinearAlgebra,
    output: Output,
    others: Mapping[str, Any],
) -> None:
    if form != "rhs":
        raise ConfigurationError(
            f"gradient='continuous' is for y' = f(t, y), and the problem is given as {form}=: give "
            "rhs= alone, or take gradient='discrete'"
        )
    if method.symplectic:
        raise ConfigurationError(
            f"gradient='continuous' with method={method.name!r}: the equations of the adjoint are "
            "not separable; take another method, or gradient='discrete'"
        )
    given = {
        **others, "event_fn": output.event_fn, "dense": output.dense or None,
        "grid": steps.grid,
        "norm": steps.norm if callable(steps.norm) else None,
        "jacobian_pattern": linear_algebra.jacobian_pattern,
        "preconditioner": linear_algebra.preconditioner,
    }  # fmt: skip
    for name in (name for name, value in given.items() if value is not None):
        raise ConfigurationError(
            f"{name}= is given, which gradient='continuous' does not go with: {_DISCRETE}"
        )
    for name in ("rtol", "atol"):
        if not isinstance(getattr(steps, name), float):
            raise ConfigurationError(
                f"{name} has one tolerance per entry of y0, and gradient='continuous' integrates "
                "more than y0: give a number, or take gradient='discrete'"
            )
    for name, values in (("jacobian", ("block", "sparse")), ("jacobian_reuse", ("constant",))):
        value = getattr(linear_algebra, name)
        if value in values:
            raise ConfigurationError(
                f"{name}={value!r} is for the state alone, and gradient='continuous' integrates "
                f"its adjoint with it: {_DISCRETE}"
            )


def _independent(
    gradient: str, form: str, method: Any, steps: Any, linear_algebra: Any, output: Any,
    checkpointing: Any, cost: Any, layout: Any, compiled: bool,
) -> str | None:  # fmt: skip
    """Return what becomes of an independent sample that fails, None for one joint state.

    Raises
    ------
    ConfigurationError
        Naming what does not go with independent samples.
    """
    if steps.samples == "joint":
        if steps.on_failure != "raise":
            raise ConfigurationError(
                f"on_failure={steps.on_failure!r} is for samples='independent' alone: a joint "
                "state fails as a whole; drop it"
            )
        return None
    wrong: dict[str, Any] = {
        "layout": layout,
        "sensitivity_control": steps.sensitivity_control, "event_fn": output.event_fn,
        "monitor": output.monitor,
        "progress": output.progress or None,
        "gradient": None if gradient == "discrete" else gradient,
        "grid": steps.grid, "norm": None if steps.norm == "rms" else steps.norm,
        "controller": None if steps.controller in ("basic", "none") else steps.controller,
    }  # fmt: skip
    for each in fields(linear_algebra):
        value = getattr(linear_algebra, each.name)
        usual = ("auto", "block") if each.name == "jacobian" else ("auto",)
        wrong[each.name] = None if value is each.default or value in usual else value
    for name in ("disk", "device_memory", "resume"):
        wrong[f"checkpointing: {name}"] = getattr(checkpointing, name, None)
    if getattr(checkpointing, "reproducible", False):
        wrong["checkpointing: reproducible"] = True
    if getattr(checkpointing, "store", "auto") == "tape":
        wrong["checkpointing: store"] = "tape"
    for name, value in wrong.items():
        if value is not None:
            raise ConfigurationError(
                f"{name}={value!r} with samples='independent' is not supported: {_JOINT}"
            )
    scheme = method.scheme
    own = method.multistep or method.coupled  # in machine code alone
    split = scheme is not None and scheme.A_explicit is not None
    if form != ("imex" if split else "rhs") or (not own and scheme is None):
        raise ConfigurationError(
            f"method={method.name!r} of a problem given as {form}= with samples='independent' is "
            "not supported, only explicit and implicit Runge-Kutta, Rosenbrock and BDF methods and "
            f"rhs=, and IMEX methods and implicit=, explicit=: {_JOINT}"
        )
    if own and not compiled:
        raise ConfigurationError(
            f"method={method.name!r} with samples='independent' is machine code alone: give "
            "compile=True, or take a method such as 'rodaspr' or 'es325'"
        )
    estimated = own or method.extrapolates or scheme.b_embedded is not None
    if steps.step_size is None and not estimated:
        raise ConfigurationError(
            f"method={method.name!r} with samples='independent' has no error estimate of a step by "
            "itself: give step_size=h, or take a method such as 'rodaspr' or 'es325'"
        )
    return str(steps.on_failure)

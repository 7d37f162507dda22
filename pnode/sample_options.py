"""What independent samples go with."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from pnode.errors import ConfigurationError

__all__ = ["requested"]

_JOINT = "take samples='joint' for it, or a loop over the samples"


def requested(
    gradient: str, form: str, method: Any, steps: Any, linear_algebra: Any, output: Any,
    checkpointing: Any, cost: Any, layout: Any,
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
        "cost": cost, "layout": layout,
        "sensitivity_control": steps.sensitivity_control, "event_fn": output.event_fn,
        "monitor": output.monitor, "dense": output.dense or None,
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
    if form != "rhs" or scheme is None or scheme.coupled or scheme.A_explicit is not None:
        raise ConfigurationError(
            f"method={method.name!r} of a problem given as {form}= with samples='independent' is "
            "not supported, only explicit and diagonally implicit Runge-Kutta and Rosenbrock "
            f"methods and rhs=: {_JOINT}"
        )
    if steps.step_size is None and scheme.b_embedded is None:
        raise ConfigurationError(
            f"method={method.name!r} with samples='independent' has no error estimate of a step by "
            "itself: give step_size=h, or take a method such as 'rodaspr' or 'es325'"
        )
    return str(steps.on_failure)

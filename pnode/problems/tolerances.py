"""Tolerances of adaptive steps: one number, or one per entry of the state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pnode.base.devices import HOST
from pnode.base.errors import ConfigurationError
from pnode.base.vectors import REAL
from pnode.problems import arguments
from pnode.problems.problem import StateLayout

__all__ = [
    "EntrywiseTolerance",
    "Resolved",
    "Tolerance",
    "check",
    "describe",
    "error_norm",
    "in_units",
    "refuse_zeros",
    "resolve",
    "values",
]

#: What the user may give: a number, a tensor, or a tuple of them for a tuple state.
Tolerance = float | torch.Tensor | tuple[float | torch.Tensor, ...]


@dataclass(frozen=True)
class EntrywiseTolerance:
    """One tolerance per entry of the flat state; hashable, compared by value.

    Attributes
    ----------
    data : bytes
        The numbers, in PETSc's precision.
    """

    data: bytes

    @classmethod
    def of(cls, values: torch.Tensor) -> EntrywiseTolerance:
        """Keep the values of a flat tensor."""
        return cls(values.to(REAL).numpy().tobytes())

    def tensor(self) -> torch.Tensor:
        """Return the values, shape ``(size,)``, PETSc's precision."""
        return torch.frombuffer(bytearray(self.data), dtype=REAL)


#: A tolerance fitted to a state.
Resolved = float | EntrywiseTolerance


def check(name: str, value: Any) -> Tolerance:
    """Return a tolerance with finite entries that are not negative; of atol's, some infinite.

    Raises
    ------
    ConfigurationError
        If there are others, or the value is no number, tensor or tuple of these.
    """
    if isinstance(value, (tuple, list)):
        parts = tuple(
            math.inf if name == "atol" and _is_infinite(part) else _check_part(
                f"{name}[{index}]", part
            )
            for index, part in enumerate(value)
        )  # fmt: skip
        if not parts:
            raise ConfigurationError(f"{name} is empty: give one tolerance per part of y0")
        return parts
    return _check_part(name, value)


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and value == math.inf


def _check_part(name: str, value: Any) -> float | torch.Tensor:
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(value)
    if isinstance(value, torch.Tensor) and value.requires_grad:
        raise ConfigurationError(
            f"{name} requires grad, and the accepted steps count as constants: give {name}.detach()"
        )
    if not isinstance(value, torch.Tensor) or value.numel() == 1:
        return arguments.tolerance(name, value)
    if value.is_complex() or value.dtype is torch.bool or value.device.type != "cpu":
        raise ConfigurationError(
            f"{name} has dtype {value.dtype} on {value.device}: give real numbers on the CPU"
        )
    own = value.to(torch.float64, copy=True)
    wrong = ~(own >= 0.0)
    if not name.startswith("atol"):
        wrong |= own.isinf()
    if bool(wrong.any()):
        index = tuple(wrong.nonzero()[0].tolist())
        raise ConfigurationError(
            f"{name}{list(index)}={float(own[index])!r}: tolerances must be finite and not negative"
        )
    return own


def resolve(
    rtol: Tolerance, atol: Tolerance, layout: StateLayout, mean: bool = True
) -> tuple[Resolved, Resolved]:
    """Fit both tolerances to a state; ``mean`` tells whether the error norm is one over entries.

    Raises
    ------
    ConfigurationError
        If a shape cannot be broadcast to that of y0, both are 0 for an entry, or all of atol is
        infinite.

    Notes
    -----
    An entry with an infinite tolerance neither controls the steps nor counts: error norms are root
    mean squares over all entries, so the tolerances of the others are made smaller by the root of
    their part of them.
    """
    fitted = _fit("rtol", rtol, layout), _fit("atol", atol, layout)
    refuse_zeros(*fitted)
    if is_partial(fitted[1]):
        counted = int(torch.as_tensor(fitted[1]).isfinite().sum())
        if not counted:
            raise ConfigurationError(
                "atol is infinite for every entry of y0: nothing would control the steps"
            )
        factor = math.sqrt(counted / layout.size) if mean else 1.0
        fitted = fitted[0] * factor, fitted[1] * factor
    relative, absolute = (
        value if isinstance(value, float) else EntrywiseTolerance.of(value) for value in fitted
    )
    return relative, absolute


def is_partial(atol: Tolerance) -> bool:
    """Whether there are entries that do not control the steps."""
    parts = atol if isinstance(atol, tuple) else (atol,)
    return any(bool(torch.isinf(_as_tensor(part)).any()) for part in parts)


def refuse_zeros(rtol: float | torch.Tensor, atol: float | torch.Tensor) -> None:
    """Refuse two tolerances that are both 0 somewhere."""
    zero = [torch.as_tensor(value, device=HOST.device) == 0.0 for value in (rtol, atol)]
    neither = zero[0] & zero[1]
    if bool(neither.any()):
        where = f" for {int(neither.sum())} entries of y0" if neither.dim() else ""
        raise ConfigurationError(f"rtol and atol are both 0{where}: at least one must be positive")


def _fit(name: str, value: Tolerance, layout: StateLayout) -> float | torch.Tensor:
    """Return a number, or one per entry of the flat state."""
    if isinstance(value, float):
        return value
    if not isinstance(value, tuple) and not layout.is_tuple:
        return _broadcast(name, value, *_own_shape(layout, 0))
    if isinstance(value, tuple) and layout.is_tuple and len(value) == len(layout.shapes):
        return torch.cat([
            _broadcast(f"{name}[{index}]", _as_tensor(part), *_own_shape(layout, index))
            for index, part in enumerate(value)
        ])  # fmt: skip
    given = f"has {len(value)} parts" if isinstance(value, tuple) else "is one tensor"
    state = f"a tuple of {len(layout.shapes)}" if layout.is_tuple else "one tensor"
    raise ConfigurationError(
        f"{name} {given} and y0 is {state}: give a number, or "
        + ("one number or tensor per part" if layout.is_tuple else "a tensor of y0's shape")
    )


def _as_tensor(value: float | torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(value, dtype=torch.float64, device=HOST.device)


def _own_shape(layout: StateLayout, index: int) -> tuple[torch.Size, bool]:
    """Return the user's shape of a part of the state, and whether it is complex."""
    shape = layout.shapes[index]
    pair = bool(layout.pairs) and layout.pairs[index]
    return (shape[:-1] if pair else shape), pair


def _broadcast(name: str, value: torch.Tensor, shape: torch.Size, pair: bool) -> torch.Tensor:
    """Return a tolerance for each entry, the same for both numbers of a pair."""
    try:
        own = value.broadcast_to(shape).reshape(-1)
        return own.repeat_interleave(2) if pair else own
    except RuntimeError:
        raise ConfigurationError(
            f"{name} has shape {tuple(value.shape)}, which does not broadcast to that of y0, "
            f"{tuple(shape)}"
        ) from None


def values(tolerance: Resolved, device: torch.device = HOST.device) -> float | torch.Tensor:
    """Return a number, or a tensor of shape ``(size,)`` in PETSc's precision."""
    return tolerance if isinstance(tolerance, float) else tolerance.tensor().to(device)


def in_units(v: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return v / scale: nothing is nothing where there is no tolerance, too."""
    return torch.where(v == 0.0, 0.0, v / scale)


def error_norm(error: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return PETSc's norm, of each row: the root mean square of those that have a tolerance."""
    counted = scale.ne(0.0).sum(-1).clamp(min=1)  # of zeros alone the error is zero
    return (in_units(error, scale).square().sum(-1) / counted).sqrt()


def describe(tolerance: Tolerance) -> str:
    """Return a short text: the number, or the range of the numbers."""
    if isinstance(tolerance, float):
        return repr(tolerance)
    parts = tolerance if isinstance(tolerance, tuple) else (tolerance,)
    flat = torch.cat([_as_tensor(part).reshape(-1) for part in parts])
    low, high = float(flat.min()), float(flat.max())
    return repr(low) if math.isclose(low, high) else f"{low!r}..{high!r}"

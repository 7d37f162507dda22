"""Evidence that a backward sweep evaluates the f of the forward sweep.

f is whatever a Python function computes; what it looks at may have changed between the two sweeps.
Evaluating it twice at the same point would tell, at the cost of an evaluation. But the backward
sweep evaluates f again anyway where its graph was not kept, and a number for each value of the
forward sweep is enough to compare: the product with a fixed random vector, which two different
values share with probability zero.
"""

from __future__ import annotations

import ctypes
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch

from pnode.base.noise import drawing

__all__ = [
    "LET_NOTHING_CHANGE",
    "Evidence",
    "Note",
    "Reads",
    "differs",
    "notes",
    "numbers_of",
    "project",
    "projection_weights",
    "projector",
]

#: What to do about an f that is another one.
LET_NOTHING_CHANGE = (
    "Let nothing that it looks at change before the gradient has been taken (pass what changes as "
    "part of y0 or params, draw random numbers before the solve)"
)

#: Relative difference of two evaluations of one f, when their bits are not the same already: what
#: another kernel or a repeated step's round-off may make of it.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}

#: Weights of so many numbers are the products of one for each row, and one for each of its entries.
_MANY, _ROW = 1 << 14, 1 << 12

#: Of the tensors that graphs read: so many are kept as they were.
_FEW_BYTES = 1 << 15


@lru_cache(maxsize=8)
@drawing()
def _weights(size: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return a fixed random vector, entries between 0.5 and 1.5 in absolute value."""
    generator = torch.Generator("cpu").manual_seed(20260907)
    values = torch.rand(2, size, generator=generator, dtype=torch.float64, device="cpu")
    return ((values[0] + 0.5) * (values[1] - 0.5).sign()).to(device, dtype)


def projection_weights(value: torch.Tensor) -> torch.Tensor:
    """Return the fixed random vector that such flat tensors are multiplied with."""
    return _weights(value.numel(), value.dtype, value.device)


def projector(value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what multiplies such flat tensors with a fixed random vector.

    That of :func:`projection_weights` for few numbers; that for many never stands in memory.
    """
    size, place = value.numel(), (value.dtype, value.device)
    if size < _MANY:
        return partial(torch.dot, _weights(size, *place))
    down, across = _weights(size // _ROW, *place), _weights(_ROW, *place)
    rest = across[: size % _ROW] * 0.75
    return partial(_product, down, across, rest if len(rest) else None)


def _product(
    down: torch.Tensor, across: torch.Tensor, rest: torch.Tensor | None, value: torch.Tensor
) -> torch.Tensor:
    """Return the sum of ``down[i // n] across[i % n] value[i]``, n being the size of a row.

    What is behind the last row has weights of its own.
    """
    if rest is None:
        return torch.dot(down, torch.mv(value.view(len(down), -1), across))
    rows, behind = value.split([len(value) - len(rest), len(rest)])
    return torch.dot(down, torch.mv(rows.view(len(down), -1), across)) + torch.dot(rest, behind)


def project(value: torch.Tensor) -> float:
    """Return the product of a flat tensor with a fixed random vector."""
    return float(projector(value)(value.detach()))


def differs(value: torch.Tensor, expected: float, slack: float = 0.0) -> float:
    """Return by how much a value is not the one that was projected, relative to its norm.

    Parameters
    ----------
    value : Tensor
        Flat.
    expected : float
        ``project`` of the other one.
    slack : float
        Difference of the projections that means nothing.

    Returns
    -------
    float
        Zero if the two are the same but for round-off.
    """
    found = project(value)
    if found == expected or (math.isnan(found) and math.isnan(expected)):
        return 0.0
    difference = abs(found - expected)
    norm = float(torch.linalg.vector_norm(value))
    if difference <= slack + _TOLERANCE[value.dtype] * norm:
        return 0.0
    return difference / norm if norm else math.inf


class Note(NamedTuple):
    """Projections of the last state and value that Newton's method saw in a stage.

    Attributes
    ----------
    part : int
        1 for the explicit part of a split field, otherwise 0.
    s : float
        Stage time.
    state, value : float
        The projections.
    """

    part: int
    s: float
    state: float
    value: float


def notes(numbers: Sequence[float]) -> list[Note]:
    """Return the notes of an implicit step from its evidence."""
    return [Note(int(numbers[i]), *numbers[i + 1 : i + 4]) for i in range(0, len(numbers), 4)]


class Evidence:
    """What was noted of each step of a forward sweep, a few numbers a step."""

    def __init__(self) -> None:
        self._numbers = array("d")
        self._ends = array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, numbers: Iterable[float]) -> None:
        """Note the numbers of the next step."""
        self._numbers.extend(numbers)
        self._ends.append(len(self._numbers))

    def __getitem__(self, step: int) -> Sequence[float]:
        """Return the numbers of a step; none where nothing was noted."""
        if not 0 <= step < len(self._ends):
            return ()
        return self._numbers[self._ends[step - 1] if step else 0 : self._ends[step]]


class Reads:
    """Tensors that compiled graphs read, as they are in the forward sweep.

    The rest of f is part of the graphs and cannot change.

    Parameters
    ----------
    tensors : iterable of Tensor
        The tensors.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self._tensors = list(tensors)
        self._few = sum(tensor.nbytes for tensor in self._tensors) <= _FEW_BYTES
        self._before = self._look()

    def _look(self) -> list[Any]:
        """Return all values of few numbers, sum and norm of many."""
        if self._few:
            return [numbers_of(tensor) for tensor in self._tensors]
        return list(map(repr, _looks(self._tensors)))  # NaN is as it was

    def changed(self) -> torch.Tensor | None:
        """Return one of them that has been written into since, if there is one."""
        looks = self._look()
        if looks != self._before:
            for tensor, before, now in zip(self._tensors, self._before, looks, strict=True):
                if now != before:
                    return tensor
        return None


def numbers_of(tensor: torch.Tensor) -> bytes | None:
    """Return the numbers of a tensor, in no operation of torch; None of one that has none here."""
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        return None
    values = tensor if tensor.is_contiguous() else tensor.detach().contiguous()
    return ctypes.string_at(values.data_ptr(), values.nbytes)


def _looks(tensors: list[torch.Tensor]) -> list[list[float]]:
    """Return sum and norm of each tensor, in few calls."""
    if not tensors:
        return []
    values = [_reals(tensor.detach()) for tensor in tensors]
    numbers = [value.sum() for value in values] + list(torch._foreach_norm(values))
    same = [n if n.dtype is torch.float64 else n.double() for n in numbers]
    found = torch.stack(same).tolist()
    return [list(pair) for pair in zip(found[: len(values)], found[len(values) :], strict=True)]


def _reals(values: torch.Tensor) -> torch.Tensor:
    if values.is_complex():
        return torch.view_as_real(values.resolve_conj())
    return values if values.is_floating_point() else values.double()

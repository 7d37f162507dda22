"""A user's own Runge-Kutta method: its table, checked, and put among the others."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from pnode.base.errors import ConfigurationError
from pnode.solvers.methods import Method, add
from pnode.solvers.order_conditions import HIGHEST, TOLERANCE, defect, order_of, parts_of
from pnode.solvers.scheme import Row, Rows, Scheme

__all__ = ["tableau"]

# What abscissae may differ from the row sums, next to the moduli of the row.
_ROUND_OFF = 1e-10


def tableau(
    name: str,
    A: Any,
    b: Any,
    c: Any = None,
    embedded: Any = None,
    *,
    order: int | None = None,
    A_explicit: Any = None,
    b_explicit: Any = None,
    reference: str = "",
) -> Method:
    """Register a Runge-Kutta method of one's own under a name for ``method=``. Not collective.

    A step of length h from u at t has s stages Y_i and slopes K_i, and ends at u'::

        Y_i = u + h sum_j a_ij K_j,   K_i = f(t + c_i h, Y_i),   u' = u + h sum_i b_i K_i

    All else follows from the coefficients: the exact discrete adjoint and derivatives of any order,
    checkpoints, compiled steps, dense output by the Hermite cubic, events.

    Parameters
    ----------
    name : str
        A new name. The same method may be registered again.
    A : array_like
        Coefficients, shape (s, s), or rows that end where only zeros follow. Zeros on and above the
        diagonal make the method explicit; other numbers on the diagonal, diagonally implicit: then
        only the first stage may be explicit, if the last row is b. Of an IMEX method: of the part
        that is solved for.
    b : array_like
        Weights, shape (s,).
    c : array_like, optional
        Abscissae, shape (s,): the row sums of A, which they are checked against.
    embedded : array_like, optional
        Weights of an embedded solution of another order, shape (s,): steps may then be adaptive.
        The step control takes its order for one less than ``order``. Of an IMEX method: of both
        parts.
    order : int, optional
        Order of convergence, at most 10 (IMEX: 6). Its conditions are checked. None: the highest
        whose conditions hold.
    A_explicit, b_explicit : array_like, optional
        Make an IMEX method: coefficients of the part that is evaluated, with zeros on the diagonal.
        ``b_explicit`` is ``b`` if left out. The abscissae are its own row sums.
    reference : str
        Where the coefficients are from.

    Returns
    -------
    Method
        The row of :func:`pnode.methods`.

    Raises
    ------
    ConfigurationError
        If the name is taken; for wrong shapes and numbers that are not finite or require grad; if A
        is not lower triangular, the row sums are not c, or the conditions of the order (all
        rooted trees) do not hold to 1e-11.

    Notes
    -----
    On several ranks, and in each process that is to use a solver that was pickled elsewhere by
    name, register the same table.

    Examples
    --------
    >>> import torch, pnode
    >>> ralston = pnode.tableau("ralston", [[], [2 / 3]], [1 / 4, 3 / 4], [0, 2 / 3])
    >>> ralston.order, ralston.kind
    (2, 'explicit')
    >>> solver = pnode.Solver(lambda t, y: -y, method="ralston", step_size=0.1)
    """
    if not isinstance(name, str) or not name or not name.isascii() or not name.isprintable():
        raise ConfigurationError(f"name={name!r}: give a name of ASCII characters, such as 'mine'")
    weights = _row("b", b)
    size = len(weights)
    if size == 0:
        raise ConfigurationError("b is empty: give one weight for each stage")
    imex = A_explicit is not None
    if b_explicit is not None and not imex:
        raise ConfigurationError("b_explicit is given without A_explicit: give both, or neither")
    scheme = Scheme(
        A=_matrix("A", A, size, diagonal=True),
        b=weights,
        b_embedded=None if embedded is None else _row("embedded", embedded, size),
        A_explicit=_matrix("A_explicit", A_explicit, size, diagonal=False) if imex else None,
        b_explicit=(weights if b_explicit is None else _row("b_explicit", b_explicit, size))
        if imex
        else None,
        reference=reference or f"pnode.tableau({name!r}, ...)",
    )
    if c is not None:
        _check_sums(scheme, _row("c", c, size))
    if not scheme.explicit:
        scheme = _checked_implicit(scheme)
    _check_embedded(scheme)
    return add(name, scheme, _checked_order(scheme, order))


def _row(name: str, values: Any, size: int | None = None) -> Row:
    """Return finite numbers, ``size`` of them."""
    if isinstance(values, torch.Tensor) and values.requires_grad:
        raise ConfigurationError(
            f"{name} requires grad, and the coefficients of a method are constants: give "
            f"{name}.detach()"
        )
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ConfigurationError(f"{name}={values!r} is not a sequence of numbers")
    found = []
    for index, value in enumerate(values):
        try:
            number = float(value if not isinstance(value, (str, bytes, bool)) else "nope")
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigurationError(f"{name}[{index}]={value!r} is not a real number") from error
        if not math.isfinite(number):
            raise ConfigurationError(f"{name}[{index}]={value!r} must be finite")
        found.append(number)
    if size is not None and len(found) != size:
        raise ConfigurationError(
            f"{name} has {len(found)} entries, and b has {size}: give one for each stage"
        )
    return tuple(found)


def _matrix(name: str, values: Any, size: int, diagonal: bool) -> Rows:
    """Return a square lower triangular matrix; without a diagonal if that is not to be."""
    if isinstance(values, torch.Tensor):
        _row(name, values.flatten())  # whether it requires grad
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ConfigurationError(f"{name}={values!r} is not a matrix: give a list of rows")
    found = []
    for i, given in enumerate(values):
        row = _row(f"{name}[{i}]", given)
        if len(row) > size:
            raise ConfigurationError(
                f"{name}[{i}] has {len(row)} entries, and b has {size}: give at most {size}"
            )
        row = (*row, *[0.0] * (size - len(row)))
        above = [j for j in range(i + diagonal, size) if row[j]]
        if above and not diagonal and above[0] == i:
            raise ConfigurationError(
                f"{name}[{i}][{i}]={row[i]!r} is on the diagonal: that of the explicit part is zero"
            )
        if above:
            raise ConfigurationError(
                f"{name}[{i}][{above[0]}]={row[above[0]]!r} is above the diagonal: methods whose "
                "stages are solved for together (Gauss, Radau) are not supported; A must be lower "
                "triangular"
            )
        found.append(row)
    if len(found) != size:
        raise ConfigurationError(
            f"{name} has {len(found)} rows, and b has {size} entries: give one row for each stage"
        )
    return tuple(found)


def _check_sums(scheme: Scheme, c: Row) -> None:
    for i, (given, row) in enumerate(zip(c, scheme.A, strict=True)):
        total = math.fsum(row)
        if abs(given - total) > _ROUND_OFF * max(1.0, math.fsum(map(abs, row))):
            raise ConfigurationError(
                f"c[{i}]={given!r} is not the sum of row {i} of A, {total!r}: one of them is wrong "
                "(methods whose abscissae are other numbers are not supported)"
            )


def _checked_implicit(scheme: Scheme) -> Scheme:
    """Return a method with implicit stages, if PETSc's steps have the slopes of all its stages."""
    if not any(row[i] for i, row in enumerate(scheme.A)):
        raise ConfigurationError(
            "A has zeros on the diagonal, and A_explicit is given: A is that of the part that is "
            "solved for; leave A_explicit out for an explicit method"
        )
    for i, row in enumerate(scheme.A[1:], start=1):
        if not row[i]:
            raise ConfigurationError(
                f"A[{i}][{i}] is 0: of an implicit method only the first stage may be explicit"
            )
    if scheme.A_explicit is not None:
        return scheme
    missed = max(abs(a - b) for a, b in zip(scheme.A[-1], scheme.b, strict=True))
    if scheme.explicit_first and missed > _ROUND_OFF:
        raise ConfigurationError(
            f"A[0][0] is 0, and b differs from the last row of A, by up to {missed:.1e}: a "
            "diagonally implicit method with an explicit first stage must end at its last stage, "
            "whose slope is the next step's first"
        )
    return replace(scheme, b=scheme.A[-1]) if missed <= 1e-14 or scheme.explicit_first else scheme


def _check_embedded(scheme: Scheme) -> None:
    """Refuse embedded weights that estimate nothing."""
    if scheme.b_embedded is None:
        return
    if scheme.b_embedded == scheme.b and scheme.b_explicit in (None, scheme.b):
        raise ConfigurationError(
            "embedded is the same as b, and their difference would estimate every error as zero: "
            "give weights of another order, or leave it out (steps are then fixed)"
        )
    missed = defect(parts_of(scheme, scheme.b_embedded), 1)
    if missed >= TOLERANCE:
        raise ConfigurationError(
            f"embedded sums up to {math.fsum(scheme.b_embedded)!r}: the weights of a solution "
            "sum up to 1"
        )


def _checked_order(scheme: Scheme, claimed: Any) -> int:
    """Return the order: what is claimed, if its conditions hold, or else the highest."""
    parts = parts_of(scheme)
    highest, found = HIGHEST[len(parts)], order_of(parts)
    if claimed is None:
        claimed = max(found, 1)
    elif isinstance(claimed, bool) or not isinstance(claimed, (int, np.integer)) or claimed < 1:
        raise ConfigurationError(f"order={claimed!r} must be a whole number of at least 1, or None")
    if claimed > highest:
        raise ConfigurationError(
            f"order={claimed} is more than can be checked, {highest}: give order={highest} or None"
        )
    if claimed > found:
        missed = defect(parts, found + 1)
        raise ConfigurationError(
            f"the conditions of order {found + 1} are missed by {missed:.1e}, and order={claimed} "
            f"asks for them to hold to {TOLERANCE:.0e}: check A and b (coefficients need at least "
            f"12 digits), or claim order={found}"
            if found
            else f"b sums up to {math.fsum(scheme.b)!r}: the weights of a consistent method sum "
            "up to 1 (coefficients need at least 12 digits)"
        )
    return int(claimed)

"""Observations for the Robertson example: the reference solution, or a user's CSV file."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from scipy.integrate import solve_ivp
from training import UsageError

RATE_CONSTANTS = (0.04, 3e7, 1e4)
OBSERVATION_TIMES = np.logspace(-5, 2, 40)


class DataError(UsageError):
    """A data file cannot be used; the message says where and why."""


@dataclass(frozen=True)
class Observations:
    """States observed at increasing times; the first is the initial state.

    Attributes
    ----------
    title : str
        Where they are from.
    names : tuple of str
        One per quantity.
    times : Tensor
        Shape (N + 1,).
    states : Tensor
        Shape (N + 1, quantities), in the data's own units.
    curve : tuple of ndarray, optional
        Times and states of the true solution, for the figure.
    """

    title: str
    names: tuple[str, ...]
    times: torch.Tensor
    states: torch.Tensor
    curve: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def low(self) -> torch.Tensor:
        """The smallest value of each quantity."""
        return self.states.amin(0)

    @property
    def span(self) -> torch.Tensor:
        """Largest minus smallest value of each quantity, 1 where it is constant."""
        span = self.states.amax(0) - self.low
        return torch.where(span > 0, span, torch.ones_like(span))

    @property
    def scaled(self) -> torch.Tensor:
        """The states, each quantity scaled to [0, 1]."""
        return (self.states - self.low) / self.span

    @property
    def rates(self) -> torch.Tensor:
        """The steepest slope of each scaled quantity between two observations."""
        slopes = self.scaled.diff(dim=0) / self.times.diff()[:, None]
        return slopes.abs().amax(0).clamp(min=float(1 / (self.times[-1] - self.times[0])))


def robertson_observations() -> Observations:
    """Solve Robertson's equations to eleven digits."""
    k1, k2, k3 = RATE_CONSTANTS

    def kinetics(_: float, y: np.ndarray) -> list[float]:
        slow, fastest, fast = k1 * y[0], k2 * y[1] ** 2, k3 * y[1] * y[2]
        return [fast - slow, slow - fast - fastest, fastest]

    truth = solve_ivp(
        kinetics,
        (0.0, OBSERVATION_TIMES[-1]),
        [1.0, 0.0, 0.0],
        method="Radau",
        rtol=1e-11,
        atol=[1e-13, 1e-17, 1e-13],
        dense_output=True,
    )
    times = np.concatenate([[0.0], OBSERVATION_TIMES])
    smooth = np.geomspace(OBSERVATION_TIMES[0], OBSERVATION_TIMES[-1], 400)
    return Observations(
        title="Robertson's kinetics",
        names=("A", "B", "C"),
        times=torch.from_numpy(times),
        states=torch.from_numpy(truth.sol(times).T.copy()),
        curve=(smooth, truth.sol(smooth).T),
    )


def read_csv(path: Path) -> Observations:
    """Read observations: a time column, one column per quantity, an optional header.

    Raises
    ------
    DataError
        If the file is missing or malformed; the message names the file, line and column.
    """
    rows = _read_rows(path)
    if not rows:
        raise DataError(f"{path}: the file is empty")
    first_line, first = rows[0]
    header = first if not any(_is_number(cell) for cell in first) else None
    width = len(first)
    if width < 2:
        raise DataError(
            f"{path}, line {first_line}, column 1: the row has one column, but time and at least "
            "one quantity are needed, separated by commas"
        )
    names = [name or f"y{index}" for index, name in enumerate(header or [""] * width)]
    body = rows[1:] if header else rows
    table = [_parse_row(path, line, row, names if header else None, width) for line, row in body]
    if len(table) < 3:
        raise DataError(
            f"{path}, line {rows[-1][0]}: the file ends after {len(table)} rows of numbers, but "
            "at least 3 are needed, the first of them the initial state"
        )
    for (line, _), (before, now) in zip(body[1:], pairwise(table), strict=True):
        if not now[0] > before[0]:
            raise DataError(
                f"{path}, line {line}, {_column(0, names if header else None)}: the time "
                f"{now[0]:g} does not come after {before[0]:g}, the one before"
            )
    values = torch.tensor(table, dtype=torch.float64)
    return Observations(path.name, tuple(names[1:]), values[:, 0].clone(), values[:, 1:].clone())


def _read_rows(path: Path) -> list[tuple[int, list[str]]]:
    """Read the rows that are not blank, with their line numbers."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.reader(stream)
            try:
                rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
            except csv.Error as error:
                raise DataError(f"{path}, line {reader.line_num}: {error}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start + 1} is not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    return [(line, row) for line, row in rows if row not in ([], [""])]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _column(index: int, names: Sequence[str] | None) -> str:
    return f"column {index + 1}" + (f" ({names[index]})" if names else "")


def _parse_row(
    path: Path, line: int, row: list[str], names: Sequence[str] | None, width: int
) -> list[float]:
    """Turn a row into finite numbers."""
    if len(row) != width:
        raise DataError(
            f"{path}, line {line}, column {min(len(row), width) + 1}: the row has {len(row)} "
            f"columns, but the first row has {width}"
        )
    for index, cell in enumerate(row):
        where = f"{path}, line {line}, {_column(index, names)}"
        if not cell:
            raise DataError(f"{where}: the cell is empty")
        if not _is_number(cell):
            raise DataError(f"{where}: {cell!r} is not a number")
        if not math.isfinite(float(cell)):
            raise DataError(f"{where}: {cell!r} is not finite")
    return [float(cell) for cell in row]


def refine(times: torch.Tensor, substeps: int) -> torch.Tensor:
    """Cut each interval into equal parts; the given times are kept to the last bit."""
    parts = torch.arange(substeps, dtype=times.dtype) / substeps
    inner = times[:-1, None] + times.diff()[:, None] * parts
    return torch.cat([inner.flatten(), times[-1:]])

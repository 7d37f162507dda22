"""The structure of a Jacobian, found by products: independent samples, or few colors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from pnode.base.devices import HOST
from pnode.base.noise import noise
from pnode.base.vectors import is_finite
from pnode.field.linearization import Linearization
from pnode.problems.problem import StateLayout
from pnode.solvers.linear.sparse import SparsityPattern, color_rows

__all__ = ["find_structure", "halves_of", "seems_constant"]

# States at which a Jacobian is looked at.
_PROBES = 3
# Entries of products looked at together.
_ENTRIES_AT_ONCE = 1 << 20
# Products that an assembly may cost at most, and of the entries of a state.
_MOST_COLORS, _PART = 64, 8


def nearby(u: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield a state, and random ones near it."""
    generator = torch.Generator(HOST.device).manual_seed(1)
    scale = torch.maximum(u.abs(), u.abs().mean())
    scale = 0.01 * torch.where(scale > 0, scale, torch.ones_like(scale))
    for index in range(_PROBES):
        yield u + (scale * noise(u.shape, generator).to(u) if index else 0.0)


def halves_of(rows: int, device: torch.device) -> torch.Tensor:
    """Return masks of rows: any two are apart in one of them, in both ways; ``(2 log2 B, B)``.

    Two rows have numbers that differ in some bit: for each bit there are those that have it, and
    the others.
    """
    number = torch.arange(rows, device=device)
    return torch.stack([
        number.bitwise_and(1 << bit).ne(0) == side
        for bit in range((rows - 1).bit_length())
        for side in (True, False)
    ])  # fmt: skip


def is_batch(layout: StateLayout, batch: int, points: list[Linearization]) -> bool:
    """Whether no row of a state of shape (batch, ...) looks at another one at these points.

    The product with half the rows of a random vector vanishes on the rows of the other half if no
    row of one depends on one of the other.
    """
    halves = halves_of(batch, layout.device)
    w = noise(
        torch.Size((batch, layout.size // batch)), torch.Generator(HOST.device).manual_seed(2)
    )
    seeds = (halves[:, :, None] * w.to(layout.device, layout.dtype)).reshape(len(halves), -1)
    for point in points:
        for part in point.rows(seeds):
            others = part.view(len(halves), batch, -1)[~halves]
            if bool(others.ne(0).any()):  # NaN is
                return False
    return True


def find_pattern(size: int, points: list[Linearization]) -> SparsityPattern | None:
    """Return where Jacobians at these points are not zero, if few products tell their entries.

    Rows are looked at in groups, whose halves are looked at next: a half has no column that its
    group has not. Groups without a common column share a product, with random weights.
    """
    limit = min(_MOST_COLORS, size // _PART)
    starts = torch.tensor([0, size])  # of the groups, and the end
    groups, columns = torch.zeros(size, dtype=torch.int64), torch.arange(size)
    weights = noise(torch.Size((size,)), torch.Generator(HOST.device).manual_seed(3))
    while True:
        whole = len(starts) == size + 1
        colors = color_rows(groups, columns, len(starts) - 1, size)
        count = int(colors.max()) + 1
        if count > limit:
            return None
        owner = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
        seeds = torch.zeros(count, size, dtype=torch.float64)
        seeds[colors[owner], torch.arange(size)] = weights
        found = _not_zero(points, seeds)[colors[groups], columns]
        groups, columns = groups[found], columns[found]
        if whole:
            return SparsityPattern(groups, columns, size)
        middles = (starts[:-1] + starts[1:]) // 2
        splits = middles > starts[:-1]
        first = torch.cumsum(1 + splits.long(), 0) - (1 + splits.long())
        starts = torch.cat([starts, middles[splits]]).sort().values
        second = splits[groups]
        groups, columns = (
            torch.cat([first[groups], first[groups][second] + 1]),
            torch.cat([columns, columns[second]]),
        )


def _not_zero(points: list[Linearization], seeds: torch.Tensor) -> torch.Tensor:
    """Return where a product with one of the seeds is not zero at one of the points, as seeds."""
    found = torch.zeros(seeds.shape, dtype=torch.bool)
    together = max(1, _ENTRIES_AT_ONCE // seeds.shape[1])
    for point in points:
        for start in range(0, len(seeds), together):
            some = seeds[start : start + together].to(point.flat_value())
            for part in point.rows(some):
                found[start : start + together] |= part.ne(0).to(found.device)
    return found


def seems_constant(u: torch.Tensor, linearize: Callable[[torch.Tensor], Linearization]) -> bool:
    """Whether a product with the Jacobian is the same, bit for bit, at a state and near it."""
    w = noise(u.shape, torch.Generator(HOST.device).manual_seed(4)).to(u)[None]
    first, *others = (torch.cat(linearize(state).rows(w)) for state in nearby(u))
    return all(torch.equal(first, other) for other in others)


def find_structure(
    layout: StateLayout, u: torch.Tensor, linearize: Callable[[torch.Tensor], Linearization],
    most_wide: int, most: int,
) -> SparsityPattern | str | None:  # fmt: skip
    """Return "block", a pattern, or None for a Jacobian that has no structure to speak of.

    Parameters
    ----------
    layout : StateLayout
        Of the state.
    u : Tensor
        Flat state to look at.
    linearize : callable
        Returns the linearization at a state.
    most_wide : int
        Entries of a sample at most.
    most : int
        Entries of a state whose sparse matrix is to be factored at most.
    """
    rows = 0 if layout.is_tuple or not layout.shapes[0] else layout.shapes[0][0]
    batch = rows > 1 and layout.size // rows <= most_wide
    if not batch and layout.size > most:
        return None
    points = [linearize(state) for state in nearby(u)]
    if not all(is_finite(point.flat_value()) for point in points):
        return None
    if batch and is_batch(layout, rows, points):
        return "block"
    return find_pattern(layout.size, points) if layout.size <= most else None

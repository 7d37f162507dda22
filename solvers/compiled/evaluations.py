"""Evaluations of a field itself, to be compared with those of its graphs."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from pnode.base.errors import SolveError
from pnode.base.ranks import ALONE
from pnode.field.vectorfield import VectorField
from pnode.solvers.compiled.trace import FieldGraph

__all__ = ["agree", "is_recorded", "local", "trusted", "value_of"]

# So many numbers are compared in Python, which takes less time than torch's operations.
_FEW = 50


class trusted:
    """Evaluate a field without its checks, for a first look at it, and mostly without a graph."""

    def __init__(self, part: VectorField, used: list[bool], recorded: bool = False) -> None:
        self._part, self._used = part, used
        self._recorded = recorded and not torch.is_inference_mode_enabled()

    def __enter__(self) -> None:
        self._recording, self._part.recording = self._part.recording, self._recorded
        self._part.trust(self._used)

    def __exit__(self, *error: object) -> None:
        self._part.recording = self._recording


def local(field_: VectorField, u: torch.Tensor) -> tuple[VectorField, torch.Tensor]:
    """Return a field from what f gets to what it returns, and what it gets for a state.

    That is without the exchange of ghost cells. Collective with them.
    """
    if field_.exchange is None:
        return field_, u
    own = field_.problem.layout
    seen = replace(own, shapes=(torch.Size(field_.exchange.ghosted_shape),))
    problem = field_.problem.but(layout=seen, owned=own.shapes[0], exchange=None, ranks=ALONE)
    parts = []
    for part in (field_, field_.explicit):
        if part is not None:
            made = VectorField(problem, part.ledger, part.function)
            made.recording, made.used = part.recording, part.used
            parts.append(made)
    parts[0].explicit = parts[1] if len(parts) > 1 else None
    return parts[0], field_.exchange.gather(u).reshape(-1)


def value_of(part: VectorField, y0: torch.Tensor, method: str) -> torch.Tensor:
    """Evaluate f where the solve begins."""
    problem = part.problem
    s = problem.times[0]
    try:
        value = part.rhs(s, y0.detach().to(part.dtype, copy=True))
        if problem.ranks.failed:
            raise SolveError("the vector field failed, which its ranks know")
        return value
    except SolveError as error:
        at = problem.direction * s
        raise error.located(time=at, step=0, method=method) from error.__cause__


def is_recorded(graph: FieldGraph, field_: VectorField, y0: torch.Tensor) -> bool:
    """Compare value and product of a graph with the field's own at another point."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, len(y0), generator=generator, dtype=torch.float64)
    point = (y0.detach() + 1e-2 * noise[0] * (1.0 + y0.detach().abs())).to(field_.dtype)
    w = noise[1, : math.prod(graph.returned)].to(field_.dtype)
    problem, times = field_.problem, field_.problem.times
    s = times[0] + 0.37 * (
        times[1] - times[0] if len(times) > 1 and math.isfinite(times[1]) else 1.0
    )
    time = torch.scalar_tensor(problem.direction * s, dtype=field_.dtype)
    inputs = graph.inputs()
    with torch.no_grad():
        shaped = point.view(graph.shape)
        value, *saved = graph.value(time, shaped, *inputs)
        product = graph.product(w.view(graph.returned), time, shaped, *inputs, *saved)
        state, *slopes = product[0], *(x.gradient(product[1:]) for x in graph.parameters)
    here = field_.linearize(s, point.clone())
    flat, own = here.flat_value(), here.vjp(w)
    if not (
        agree(value.reshape(-1) * problem.direction, flat)
        and agree(state.reshape(-1) * problem.direction, own.state)
    ):
        return False
    used = [x for x in (own.parameters[part.index] for part in graph.parameters) if x is not None]
    if len(used) != len(slopes):
        return False
    # Of parameters some may be round-off alone, of terms as large as the rest.
    dtype = min((flat.dtype, *(x.dtype for x in used)), key=lambda kind: kind.itemsize)
    mine, theirs = (
        torch.cat([x.reshape(-1).to(dtype) for x in (flat, own.state, *parts)])
        for parts in ([x * problem.direction for x in slopes], used)
    )
    return agree(mine, theirs)


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two values are the same but for round-off."""
    if not b.numel():
        return True
    rtol = 1e-9 if b.dtype is torch.float64 else 1e-4
    if a.dim() == 1 and a.numel() <= _FEW:
        given, expected = a.tolist(), b.tolist()
        # Of all entries together, which is NaN if one is.
        if math.dist(given, expected) <= rtol * max(map(abs, expected)) < math.inf:
            return True
    a, b = a.detach().double(), b.detach().double()
    if float((a - b).abs().max()) <= rtol * float(b.abs().max()) < math.inf:
        return True
    scale = float(b.abs().nan_to_num(0.0, 0.0, 0.0).max())
    return torch.allclose(a, b, rtol=rtol, atol=rtol * scale, equal_nan=True)

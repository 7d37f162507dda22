"""What is noticed of a field that is another one than when it was traced.

Without a graph it is the calls of torch's functions that are followed, where these tell all
operations, and the operations themselves otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from pnode.base.ledger import Ledger
from pnode.field.vectorfield import record_all, vector_field
from pnode.problems.problem import InitialValueProblem
from pnode.solvers.compiled.evaluations import trusted
from pnode.solvers.compiled.following import Functions, Operations
from pnode.solvers.compiled.guards import Guard, followed

Y0 = torch.tensor([0.3, -0.7, 1.1], dtype=torch.float64)
TIMES = torch.tensor([0.0, 1.0], dtype=torch.float64)


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor) -> torch.Tensor:
        return 2.0 * y

    @staticmethod
    def backward(ctx: Any, w: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return 2.0 * w


@torch.jit.script
def scripted(y: torch.Tensor, k: float) -> torch.Tensor:
    return k * y


class Guarded:
    """A field of some things that change, and the guard of its trace."""

    def __init__(self, f: Callable[..., torch.Tensor], **things: Any) -> None:
        self.own = SimpleNamespace(**things)
        problem = InitialValueProblem.create(
            lambda t, y: f(self.own, t, y), Y0, TIMES, check_undeclared=True
        )
        self.part = vector_field(problem, Ledger())
        record_all(self.part)
        self.guard = Guard()
        with followed(self.part, self.guard) as seen:
            self.part.rhs(0.0, Y0.clone())
        self.guard.learn(seen)

    def holds(self, factor: float = 1.0) -> bool:
        """Whether f is the same at another state."""
        with torch.no_grad(), trusted(self.part, []), followed(self.part, self.guard) as seen:
            self.part.rhs(0.5 * factor, factor * Y0)
        return self.guard.holds(seen)


def _set_dtype(own: Any) -> None:
    torch.set_default_dtype(torch.float64)


def _set(**changes: Any) -> Callable[[Any], None]:
    return lambda own: vars(own).update(changes)


def _autocast(own: Any, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=own.k):
        return (y.float()[None] @ torch.ones(3, 3, dtype=torch.float32))[0].double()


def _inside(own: Any, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.enable_grad():
        x = y.detach().requires_grad_()
        (slope,) = torch.autograd.grad((own.k * x * x).sum(), x)
    return slope.detach() + 0.0 * y


CASES: dict[str, tuple[Any, dict[str, Any], Any, type]] = {
    "number": (lambda o, t, y: o.k * y.sin(), {"k": 2.0}, _set(k=3.0), Functions),
    "sign of zero": (lambda o, t, y: (o.k * y).abs() * y, {"k": 0.0}, _set(k=-0.0), Functions),
    "branch": (lambda o, t, y: y.sin() if o.k else y.cos(), {"k": True}, _set(k=False), Functions),
    "index": (lambda o, t, y: y * y[o.k :].sum(), {"k": 1}, _set(k=2), Functions),
    "keyword": (lambda o, t, y: y * y.softmax(dim=o.k), {"k": 0}, _set(k=-1), Functions),
    "tensor made": (
        lambda o, t, y: torch.tensor(o.k, dtype=torch.float64) * y, {"k": [1.0, 2.0, 3.0]},
        lambda o: o.k.append(o.k.pop(0)), Functions,
    ),
    "array": (
        lambda o, t, y: torch.as_tensor(o.k) * y, {"k": np.ones(3)},
        lambda o: o.k.__setitem__(0, 2.0), None,
    ),
    "constructor": (
        lambda o, t, y: torch.DoubleTensor([o.k]) * y, {"k": 2.0}, _set(k=3.0), None,
    ),
    "object": (
        lambda o, t, y: torch.tensor(o.k, dtype=torch.float64) * y, {"k": bytearray(b"abc")},
        lambda o: o.k.__setitem__(0, 1), Operations,
    ),
    "another tensor": (
        lambda o, t, y: o.k * y, {"k": Y0.clone()}, _set(k=Y0.clone()), Functions,
    ),
    "autocast": (_autocast, {"k": False}, _set(k=True), None),
    "default dtype": (
        lambda o, t, y: y * torch.full((3,), 1 / 3), {}, _set_dtype, Functions,
    ),
    "own derivative": (lambda o, t, y: o.k * Twice.apply(y), {"k": 2.0}, _set(k=3.0), Functions),
    "scripted": (lambda o, t, y: scripted(y, o.k), {"k": 2.0}, _set(k=3.0), Operations),
    "scripted inside": (
        lambda o, t, y: scripted(y.sin(), o.k).cos(), {"k": 2.0}, _set(k=3.0), Operations,
    ),
    "derivative inside": (_inside, {"k": 2.0}, _set(k=3.0), Operations),
    "vmap": (
        lambda o, t, y: torch.vmap(lambda x: o.k * x.sin())(y), {"k": 2.0}, _set(k=3.0), None,
    ),
    "operator": (
        lambda o, t, y: torch.ops.aten.mul(y, o.k), {"k": 2.0}, _set(k=3.0), Operations,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_changes_are_noticed(name: str) -> None:
    f, things, change, mode = CASES[name]
    guarded = Guarded(f, **things)
    for factor in (1.0, 2.0, -0.5, 3.0):
        assert guarded.holds(factor)
    assert mode in (None, guarded.guard.mode)
    before = torch.get_default_dtype()
    try:
        change(guarded.own)
        assert not guarded.holds()
    finally:
        torch.set_default_dtype(before)


def without_graph(own: Any, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    with torch.set_grad_enabled(own.k):
        z = y.sin()
    return z * y


def written_by_a_script(own: Any, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    z = y * t
    if not own.k:
        tripled(z)
    return z.cos()


@torch.jit.script
def tripled(z: torch.Tensor) -> torch.Tensor:
    return z.mul_(3.0)


@pytest.mark.parametrize("f", [without_graph, written_by_a_script])
def test_what_no_function_and_no_operation_without_a_graph_tells(f: Any) -> None:
    """Blocks of no_grad, and what torch's scripts write in place."""
    guarded = Guarded(f, k=True)
    assert guarded.holds() and guarded.holds() and guarded.guard.mode is Functions
    guarded.own.k = False
    assert not guarded.holds()


def test_modes_around_a_solve() -> None:
    """Other modes may change what functions do: operations are followed there."""
    guarded = Guarded(lambda own, t, y: own.k * y.sin(), k=2.0)
    assert guarded.holds() and guarded.holds() and guarded.guard.mode is Functions
    with torch.device("cpu"):
        assert guarded.holds()
        guarded.own.k = 3.0
        assert not guarded.holds()

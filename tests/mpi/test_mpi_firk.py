"""Fully implicit Runge-Kutta methods on a state that ranks share, against one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import batch, ring
from ranks import checks, comm

import pnode

D = torch.float64
T = torch.tensor([0.0, 0.02, 0.05], dtype=D)


def measure(make: Any, alone: bool, **keywords: Any) -> list[torch.Tensor]:
    """Return the last state and the gradients, whole on every rank."""
    case = make(None if alone else comm)
    solver = pnode.Solver(**case.arguments, **keywords)
    (y0,) = case.y0
    ys = solver(y0, T).ys
    state, *parameters = torch.autograd.grad((ys**3).sum(), [y0, *case.parameters])
    return [case.gather(ys[-1]), case.gather(state), *parameters]


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("make", "keywords"),
    [
        (ring, {"method": "gauss4", "step_size": 0.01}),
        (ring, {"method": "radau5", "rtol": 1e-6, "atol": 1e-8}),
        (batch, {"method": "radau5", "rtol": 1e-6, "atol": 1e-8}),
        (batch, {"method": "radau3", "step_size": 0.01, "checkpointing": "400B"}),
        (batch, {"method": "radau5", "rtol": 1e-6, "atol": 1e-8, "jacobian": "sparse"}),
    ],
    ids=["ring, gauss4", "ring, radau5", "batch, radau5", "batch, radau3", "batch, sparse"],
)
def test_the_same_as_on_one_rank(make: Any, keywords: dict[str, Any]) -> None:
    """Ghost cells by GMRES on the coupled stages, ranks that are independent by their own LU."""
    options = {"petsc_options": {"snes_stol": 1e-13}, "compile": False}
    ours, theirs = (measure(make, alone, **keywords, **options) for alone in (False, True))
    for found, expected in zip(ours, theirs, strict=True):
        checks.below(float((found - expected).norm() / expected.norm()), 1e-8)


@pytest.mark.mpi(min_size=2)
def test_sparse_matrices_are_factored_on_each_rank_by_itself() -> None:
    case = ring(comm)
    solver = pnode.Solver(**case.arguments, method="radau5", jacobian="sparse", compile=False)
    with pytest.raises(pnode.ConfigurationError, match=r"layout=.*matrix-free") as caught:
        solver(case.y0[0], T)
    checks.true("radau5" in str(caught.value))


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("method", ["radau5", "gauss4"])
def test_a_field_that_fails_on_one_rank_fails_on_all(method: str) -> None:
    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if comm.rank == 1 and float(t) > 0.3:
            raise KeyError("gone")
        return -y

    steps = {"step_size": 0.1} if method == "gauss4" else {}
    solver = pnode.Solver(field, method=method, comm=comm, compile=False, **steps)
    with pytest.raises(pnode.PnodeError) as caught:
        solver(torch.ones(2, dtype=D), torch.tensor([0.0, 1.0], dtype=D))
    checks.true("gone" in str(caught.value), caught.value)

"""Step control of a state that ranks share: PID controllers, error norms; what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from distributed import batch
from ranks import checks, comm

import pnode

D = torch.float64
T = torch.tensor([0.0, 0.05], dtype=D)
PID = pnode.PID(pcoeff=0.2, icoeff=0.4)


def measure(alone: bool, **keywords: Any) -> tuple[list[torch.Tensor], tuple[int, int]]:
    """Return the last state and the gradients, whole on every rank, and the steps."""
    case = batch(None if alone else comm)
    solver = pnode.Solver(**case.arguments, rtol=1e-5, atol=1e-7, compile=False, **keywords)
    solution = solver(case.y0[0], T)
    state, *rest = torch.autograd.grad((solution.ys**3).sum(), [case.y0[0], *case.parameters])
    values = [case.gather(solution.ys[-1]), case.gather(state), *rest]
    return values, (solution.stats.steps, solution.stats.rejected)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("method", ["dopri5", "cn", "radau5"])
@pytest.mark.parametrize("keywords", [{"controller": PID}, {"norm": "max"}], ids=["PID", "max"])
def test_the_steps_of_one_rank(method: str, keywords: dict[str, Any]) -> None:
    keywords = {"method": method, **keywords}
    if method != "dopri5":
        keywords["petsc_options"] = {"snes_stol": 1e-13}
    (ours, taken), (theirs, expected) = (measure(alone, **keywords) for alone in (False, True))
    checks.true(taken == expected, taken, expected)
    for found, wanted in zip(ours, theirs, strict=True):
        checks.below(float((found - wanted).norm() / wanted.norm()), 1e-8)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("method", ["dopri5", "cn"])
def test_a_function_of_the_whole_state_is_refused(method: str) -> None:
    case = batch(comm)
    solver = pnode.Solver(**case.arguments, method=method, norm=lambda error: error.abs().max())
    with pytest.raises(pnode.ConfigurationError, match=r"several ranks.*norm='max'") as caught:
        solver(case.y0[0], T)
    checks.true("norm=" in str(caught.value))

"""Whole compiled sweeps of implicit methods whose linear systems are solved by products alone."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import pnode
from pnode import errors

D = torch.float64
SIZE = 40
TIMES = torch.tensor([0.0, 0.2, 0.5], dtype=D)
FREE: dict[str, Any] = {"jacobian": "matrix-free"}
ADAPTIVE: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-8}
FIXED: dict[str, Any] = {"step_size": 0.05}


class Ring(torch.nn.Module):
    """Cells in a ring that react, and diffuse; or one of both."""

    def __init__(self, part: str = "") -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.7, 0.2, 20.0], dtype=D))
        self.part = part

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """dy/dt."""
        reaction = -self.w[0] * u**3 + self.w[1] * torch.cos(t)
        diffusion = self.w[2] * (torch.roll(u, 1, -1) + torch.roll(u, -1, -1) - 2 * u)
        return {"": reaction + diffusion, "explicit": reaction, "implicit": diffusion}[self.part]


@pytest.fixture(scope="module")
def ring() -> Ring:
    """One field for all: it is compiled once for each kind of steps."""
    return Ring()


def start() -> torch.Tensor:
    """An initial state."""
    generator = torch.Generator().manual_seed(0)
    return (0.5 * torch.randn(SIZE, generator=generator, dtype=D)).requires_grad_()


def taken(
    field: torch.nn.Module, compiled: Any, times: torch.Tensor = TIMES, **options: Any
) -> tuple[str, pnode.Solution, list[torch.Tensor]]:
    """Return what is compiled, the solution, and all gradients."""
    solver = pnode.Solver(field, compile=compiled, **FREE, **options)
    y0, t = start(), times.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        solution = solver(y0, t)
    loss = (solution.ys * torch.linspace(1.0, 2.0, SIZE, dtype=D)).square().sum()
    found = torch.autograd.grad(loss, [y0, t, *field.parameters()])
    return str(solver), solution, [solution.ys.detach(), *found]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "cn"} | FIXED,
        {"method": "beuler"} | FIXED,
        {"method": "es325"} | ADAPTIVE,
        {"method": "bdf"} | ADAPTIVE,
        {"method": "bdf3"} | FIXED,
        {"method": "es325", "checkpointing": pnode.Checkpointing(memory=8 * SIZE * 12)} | ADAPTIVE,
        {"method": "bdf", "times": torch.tensor([2e-3, 1e-3, 0.0], dtype=D)} | ADAPTIVE,
        {"method": "es325", "atol": torch.full((SIZE,), 1e-7, dtype=D), "rtol": 1e-6},
    ],
    ids=["cn", "beuler", "es325", "bdf", "bdf3", "memory", "backwards", "atol"],
)
def test_numbers_and_counts(ring: Ring, options: dict[str, Any]) -> None:
    """Values, gradients and counts are those of the steps taken from Python."""
    _, plain, expected = taken(ring, False, **options)
    told, solution, found = taken(ring, True, **options)
    assert "'whole sweeps'" in told
    for one, other in zip(found, expected, strict=True):
        # Systems of the adjoint are solved to 1e-12, sums are in another order.
        assert (one - other).abs().max() <= 1e-11 * other.abs().max()
    counted = ("steps", "rejected", "newton", "krylov")
    assert [getattr(solution.stats, name) for name in counted] == [
        getattr(plain.stats, name) for name in counted
    ]


def test_two_parts() -> None:
    """IMEX methods solve for the implicit part."""
    found = []
    for compiled in (False, True):
        parts = Ring("implicit"), Ring("explicit")
        solver = pnode.Solver(
            implicit=parts[0],
            explicit=parts[1],
            method="ark3",
            compile=compiled,
            **FREE,
            **ADAPTIVE,
        )
        y0 = start()
        ys = solver(y0, TIMES).ys
        given = [y0, parts[0].w, parts[1].w]
        found.append([ys.detach(), *torch.autograd.grad(ys.square().sum(), given)])
    assert "'whole sweeps'" in str(solver)
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-11 * other.abs().max()


def test_second_derivatives(ring: Ring) -> None:
    """The steps are taken again for tangents."""
    products = []
    for compiled in (False, True):
        solver = pnode.Solver(ring, method="cn", compile=compiled, **FREE, **FIXED)
        y0 = start()
        (gradient,) = torch.autograd.grad(
            solver(y0, TIMES).ys[-1].square().sum(), y0, create_graph=True
        )
        products.append(torch.autograd.grad(gradient.square().sum(), [y0, ring.w]))
        along = torch.func.jvp(lambda y, s=solver: s(y, TIMES).ys, (start(),), (start(),))[1]
        products[-1] += (along.detach(),)
    for one, other in zip(*products, strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"linear_solver": {"ksp_type": "bcgs"}}, "ksp_type"),
        ({"linear_solver": {"ksp_rtol": 1e-3}}, "ksp_rtol"),
        ({"preconditioner": "dense"}, "without a precond"),
        ({"cost": lambda t, y: y.square().sum()}, "without cost="),
        ({"dense": True}, "single steps"),
        ({"method": "radau5"}, "jacobian='dense'"),
    ],
)
def test_what_is_asked_for_otherwise(ring: Ring, options: dict[str, Any], reason: str) -> None:
    """PETSc's own options, preconditioners and onlookers are obeyed, from Python."""
    chosen = {"method": "es325"} | FREE | ADAPTIVE | options
    solver = pnode.Solver(ring, compile=True, **chosen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = solver(start(), TIMES).ys
    assert "whole sweeps" not in str(solver)
    assert reason in str(solver)
    plain = pnode.Solver(ring, compile=False, **chosen)
    assert (found - plain(start(), TIMES).ys).abs().max() <= 1e-12


def test_failures() -> None:
    """What cannot be solved, or is not finite, is the error of the steps taken from Python."""

    def root(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(0.3 - t) * y

    texts = []
    for compiled in (False, True):
        solver = pnode.Solver(root, method="cn", compile=compiled, **FREE, **FIXED)
        with pytest.raises(errors.SolveError) as caught:
            solver(start(), TIMES)
        texts.append((type(caught.value), str(caught.value)))
    assert texts[0] == texts[1]

"""Diffusion on a ring with a reaction, for the tests of what PETSc brings along."""

from __future__ import annotations

import torch

import pnode

D = torch.float64
SIZE = 12
# Newton's and the Krylov methods' tolerances leave so much.
CLOSE = {"rtol": 1e-7, "atol": 1e-9}


def heat(nu, u):
    return nu * (torch.roll(u, 1, -1) + torch.roll(u, -1, -1) - 2.0 * u)


def ripple(size=SIZE):
    return torch.cos(torch.arange(size, dtype=D)) + 0.5


def solver(method="cn", nu=None, **keywords):
    """A solver of diffusion with a reaction, and its parameter."""
    nu = torch.tensor(3.0, dtype=D, requires_grad=True) if nu is None else nu
    parts = [lambda t, u: heat(nu, u), lambda t, u: torch.sin(t) * u - 0.1 * u**3]
    field = {"implicit": parts[0], "explicit": parts[1]}
    if method != "ark4":
        field = {"rhs": lambda t, u: parts[0](t, u) + parts[1](t, u)}
    keywords = {"step_size": 0.1, "compile": False} | keywords
    return pnode.Solver(**field, params=[nu], method=method, **keywords), nu


def gradients(made, y0=None):
    """The end of a solve, and the gradients of a loss of it."""
    solver, nu = made
    y0 = ripple().requires_grad_() if y0 is None else y0
    solution = solver(y0, [0.0, 0.3])
    return solution.ys[-1], *torch.autograd.grad(solution.ys[-1].square().sum(), [nu, y0])


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)

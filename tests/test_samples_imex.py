"""Independent samples of a split right-hand side: each row is what its solve alone is."""

import pytest
import torch
from test_samples import TIMES, Y0, gradients

import pnode

D = torch.float64
# With and without an explicit first stage, ends at a stage or not, one part's stages idle or not.
METHODS = ["imexbe", "imexl2", "ars122", "ark2c", "imexssp2", "ars443", "bpr3", "ark4"]


class Stiff(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor(3.0, dtype=D))

    def forward(self, t, y):
        time = t[..., 0] if t.dim() else t
        x, v, mu = y.unbind(-1)
        return torch.stack(
            [-self.rate * torch.sin(x), -mu * torch.tanh(v) + time, 0.0 * mu], dim=-1
        )


class Rest(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7, dtype=D))

    def forward(self, t, y):
        time = t[..., 0] if t.dim() else t
        x, v, mu = y.unbind(-1)
        return torch.stack([self.weight * v, torch.sin(x) + torch.cos(time), 0.0 * mu], dim=-1)


def cost(t, y):
    return y[..., 0] * y[..., 1]


@pytest.mark.parametrize("method", METHODS)
def test_rows_are_those_of_solves_alone(method):
    f, g = Stiff(), Rest()
    y0, t = Y0.clone().requires_grad_(), TIMES.clone().requires_grad_()
    options = {"implicit": f, "explicit": g, "method": method, "step_size": 0.1, "cost": cost}
    found = pnode.Solver(samples="independent", **options)(y0, t)
    # With the Newton iterates of rows; both leave what Newton's tolerance does.
    solver = pnode.Solver(compile=False, jacobian_reuse="iteration", **options)
    alone = [solver(y0[row], t[row]) for row in range(3)]
    inputs = [y0, t, f.rate, g.weight]
    for name in ("ys", "costs"):
        expected = torch.stack([getattr(one, name) for one in alone], dim=1)
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-12, atol=1e-12)
        for one, other in zip(gradients(getattr(found, name), *inputs),
                              gradients(expected, *inputs), strict=True):  # fmt: skip
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
    assert found.stats.steps == sum(one.stats.steps for one in alone)


def test_adaptive_steps():
    f, g = Stiff(), Rest()
    y0, t = Y0.clone().requires_grad_(), TIMES.clone().requires_grad_()
    options = {"implicit": f, "explicit": g, "method": "ark4", "cost": cost, "rtol": 1e-4}
    found = pnode.Solver(samples="independent", **options)(y0, t)
    solver = pnode.Solver(compile=False, jacobian_reuse="iteration", **options)
    alone = [solver(y0[row], t[row]) for row in range(3)]
    assert found.stats.steps == sum(one.stats.steps for one in alone)
    assert found.stats.rejected == sum(one.stats.rejected for one in alone)
    inputs = [y0, t, f.rate, g.weight]
    for name in ("ys", "costs"):
        expected = torch.stack([getattr(one, name) for one in alone], dim=1)
        # Step sizes follow from states that Newton's method leaves 1e-8 of a small residual in.
        torch.testing.assert_close(getattr(found, name), expected, rtol=1e-9, atol=1e-10)
        for one, other in zip(gradients(getattr(found, name), *inputs),
                              gradients(expected, *inputs), strict=True):  # fmt: skip
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_rows_of_other_lengths_inside_of_steps():
    """Rows that are done are left out; the interpolants of both parts; a limit of memory."""
    rows = 12
    ends = torch.arange(1, rows + 1, dtype=D) / 8
    t = torch.stack([torch.zeros(rows, dtype=D), ends], dim=1)
    y0 = torch.linspace(0.5, 1.5, rows, dtype=D)[:, None].requires_grad_()
    found = []
    for limit in (None, 3000):
        solver = pnode.Solver(
            implicit=lambda t, y: -2.0 * y, explicit=lambda t, y: y, method="ark4",
            step_size=0.05, dense=True, samples="independent", checkpointing=limit,
        )  # fmt: skip
        solution = solver(y0, t)
        inside = solution(0.61 * t[:, 1:])[0]
        exact = y0 * torch.exp(-0.61 * ends)[:, None]
        torch.testing.assert_close(inside, exact, rtol=1e-6, atol=0.0)
        found.append(torch.autograd.grad(inside.sum(), y0)[0])
        torch.testing.assert_close(found[-1], (exact / y0).detach(), rtol=1e-6, atol=0.0)
    assert solution.stats.backward.recomputed
    torch.testing.assert_close(*found, rtol=1e-11, atol=0.0)


def test_what_is_refused():
    split = {"implicit": lambda t, y: -y, "explicit": lambda t, y: y, "samples": "independent"}
    with pytest.raises(pnode.ConfigurationError, match="no error estimate of a step by itself"):
        pnode.Solver(method="ars443", **split)
    with pytest.raises(pnode.ConfigurationError, match=r"only explicit and implicit"):
        pnode.Solver(method="ark4", step_size=0.1, mass=torch.eye(3), **split)
    with pytest.warns(UserWarning, match="a split right-hand side"):
        pnode.Solver(method="ark4", step_size=0.5, compile=True, **split)(Y0, [0.0, 1.0])

"""Cost integrals of independent samples: each row's are those of its solve alone."""

import pytest
import torch
from test_samples import TIMES, Y0, Oscillator

import pnode

D = torch.float64
METHODS = [
    ("rk4", 0.03), ("dopri5", None), ("tsit5", None), ("rodaspr", None), ("ra34pw2", 0.05),
    ("es325", None), ("sdirk2", 0.1), ("cn", 0.1),
]  # fmt: skip


class Cost(torch.nn.Module):
    """Two numbers of a row."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.4, dtype=D))

    def forward(self, t, y):
        time = t[..., 0] if t.dim() else t
        return torch.stack([self.weight * y[..., 0] ** 2, torch.sin(y[..., 1]) * time], dim=-1)


def loss_of(ys, costs):
    weights = torch.linspace(-1.0, 2.0, ys.numel(), dtype=D).view(ys.shape)
    return (weights * ys).sum() + (costs**2).sum() + costs[1].sum()


@pytest.mark.parametrize(("method", "step"), METHODS)
def test_rows_are_those_of_solves_alone(method, step):
    f, r = Oscillator(), Cost()
    y0, t = Y0.clone().requires_grad_(), TIMES.clone().requires_grad_()
    options = {"method": method, "step_size": step, "compile": False, "rtol": 1e-4, "cost": r}
    found = pnode.Solver(f, samples="independent", **options)(y0, t)
    # With the Newton iterates of rows; both leave what Newton's tolerance does.
    tight = {"jacobian_reuse": "iteration"} if method in ("es325", "sdirk2", "cn") else {}
    solver = pnode.Solver(f, **options, **tight)
    alone = [solver(y0[row], t[row]) for row in range(3)]
    ys, costs = (torch.stack([getattr(one, name) for one in alone], 1) for name in ("ys", "costs"))
    plain = pnode.Solver(f, samples="independent", **options | {"cost": None})(y0, t)
    assert found.costs.shape == (3, 3, 2)
    assert found.stats.steps == plain.stats.steps == sum(one.stats.steps for one in alone)
    assert found.stats.rejected == plain.stats.rejected
    torch.testing.assert_close(found.ys, plain.ys, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(found.ys, ys, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.costs, costs, rtol=1e-12, atol=1e-12)
    inputs = [y0, t, f.scale, r.weight]
    expected = torch.autograd.grad(loss_of(ys, costs), inputs)
    for one, other in zip(torch.autograd.grad(loss_of(found.ys, found.costs), inputs), expected,
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_rows_that_are_done_are_left_out():
    """The cost is called for fewer rows, too; rows of a number each, and one that fails."""
    rows, sizes = 20, set()

    def cost(t, y):
        sizes.add(len(y))
        return y[:, 0] * t[:, 0]

    ends = torch.arange(1, rows + 1, dtype=D) ** 2 / 100
    t = torch.stack([torch.zeros(rows, dtype=D), ends], dim=1)
    y0 = torch.ones(rows, 2, dtype=D, requires_grad=True)
    solver = pnode.Solver(lambda t, y: -y, samples="independent", cost=cost, rtol=1e-9, atol=1e-12)
    costs = solver(y0, t).costs[-1]
    exact = 1.0 - (1.0 + ends) * torch.exp(-ends)  # of t exp(-t)
    torch.testing.assert_close(costs, exact, rtol=0.0, atol=1e-8)
    (found,) = torch.autograd.grad(costs.sum(), y0)
    torch.testing.assert_close(found[:, 0], exact, rtol=0.0, atol=1e-8)
    assert not found[:, 1].any() and min(sizes) < 10


def test_a_row_that_fails():
    y0 = torch.tensor([[0.5], [2.0]], dtype=D)
    options = {"samples": "independent", "cost": lambda t, y: y[:, 0], "on_failure": "nan"}
    costs = pnode.Solver(lambda t, y: y * y, **options)(y0, [0.0, 0.25, 1.0]).costs
    assert costs.isnan().tolist() == [[False, False], [False, False], [False, True]]
    # Of y = 1 / (1/y0 - t).
    assert abs(float(costs[2, 0]) - torch.tensor(2.0, dtype=D).log().item()) < 1e-5


def test_complex_states():
    def cost(t, y):
        return (y.abs() ** 2).sum(dim=1, keepdim=True)

    y0 = torch.tensor([[1.0 + 1j, 2.0], [0.5, 1j]], dtype=torch.complex128, requires_grad=True)
    options = {"method": "rk4", "step_size": 0.1, "compile": False}
    t = torch.tensor([0.0, 1.0], dtype=D)
    found = pnode.Solver(
        lambda t, y: (1j - t) * y, samples="independent", cost=cost, **options
    )(y0, t)  # fmt: skip
    alone = pnode.Solver(lambda t, y: (1j - t) * y, cost=lambda t, y: (y.abs() ** 2).sum(),
                         **options)  # fmt: skip
    costs = torch.stack([alone(row, t).costs for row in y0], dim=1)
    assert found.ys.dtype is torch.complex128 and found.costs.shape == (2, 2, 1)
    torch.testing.assert_close(found.costs[..., 0], costs, rtol=1e-12, atol=1e-12)
    one, other = (torch.autograd.grad(x.sum(), y0)[0] for x in (found.costs, costs))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_bad_costs():
    y0, t = Y0.clone(), [0.0, 1.0]
    for cost, named in (
        (lambda t, y: y.sum(), r"cost returned shape \(\), of 3 independent samples"),
        (lambda t, y: y[:2], r"cost returned shape \(2, 3\)"),
        (lambda t, y: y[:, :0], r"cost returned shape \(3, 0\)"),
    ):
        with pytest.raises(pnode.ConfigurationError, match=named):
            pnode.Solver(lambda t, y: -y, samples="independent", cost=cost)(y0, t)
    with pytest.raises(pnode.errors.VectorFieldError, match="returned"):
        pnode.Solver(lambda t, y: y[:, :1], samples="independent", cost=lambda t, y: y)(y0, t)
    coupled = {"method": "es325", "samples": "independent", "cost": lambda t, y: y.cumsum(dim=0)}
    with pytest.raises(pnode.ConfigurationError, match="couples them"):
        pnode.Solver(lambda t, y: -y, **coupled)(y0, t)
    options = {"samples": "independent", "cost": lambda t, y: y, "compile": True}
    with pytest.warns(UserWarning, match="cost= of independent samples"):
        pnode.Solver(lambda t, y: -y, **options)(y0, t)
    with pytest.raises(pnode.ConfigurationError, match="cost= of independent samples"):
        pnode.Solver(lambda t, y: -y, method="bdf", **options)(y0, t)

"""A solver that is called again takes over what it has validated: nothing else may change by it."""

import copy

import pytest
import torch

import pnode
from pnode.base.evidence import Reads
from pnode.solvers.compiled.evaluations import agree

F64 = torch.float64


class Decay(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor([0.5, 1.5], dtype=F64))

    def forward(self, t, y):
        return -self.rate.to(y) * y * (1 + t)


def times(*values, dtype=F64):
    return torch.tensor(values, dtype=dtype)


def outcome(solver, y0, t):
    """Times, states and gradients by y0, t and the rate."""
    y0, t = y0.detach().clone().requires_grad_(), t.detach().clone()
    if t.is_floating_point():
        t.requires_grad_()
    given = [x for x in (y0, t, solver.rhs.rate) if x.requires_grad]
    solution = solver(y0, t)
    gradients = torch.autograd.grad(solution.ys.square().sum(), given, allow_unused=True)
    return [solution.ts.detach(), solution.ys.detach(), *gradients]


@pytest.mark.parametrize("method", ["rk3", "cn"])
def test_what_differs_is_noticed(method):
    f = Decay()

    def create(f=f):
        return pnode.Solver(f, method=method, step_size=0.25, compile=False)

    solver = create()
    y0, t = torch.tensor([1.0, -2.0], dtype=F64), times(0.0, 0.5, 1.0)
    cases = [
        (y0, t), (y0, t), (3 * y0, t), (y0, times(0.0, 1.0)), (y0, times(0.0, 0.5, 1.25)),
        (y0, times(1.0, 0.5, 0.0)), (y0, times(0, 1, 2, dtype=torch.int64)), (y0, t),
        (y0.float(), t), (y0, t.float()), (torch.stack([y0, y0]), t), (y0, t),
    ]  # fmt: skip

    def compare(f=f):
        for case in cases:
            pairs = zip(outcome(solver, *case), outcome(create(f), *case), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)

    compare()
    f.rate = torch.nn.Parameter(2 * f.rate.detach())
    compare()
    f.rate.requires_grad_(False)
    assert not solver(y0, t).ys.requires_grad
    f.rate.requires_grad_(True)
    with torch.no_grad():
        assert not solver(y0, t).ys.requires_grad
    compare()
    solver.rhs = Decay()
    compare(solver.rhs)


def test_times_written_into_are_others():
    solver = pnode.Solver(lambda t, y: torch.ones_like(y), method="euler", step_size=0.5)
    y0, t = torch.zeros(1, dtype=F64), times(0.0, 1.0)
    assert solver(y0, t).ys[-1] == 1.0
    t.data[1] = 2.0  # which no version counter sees
    assert solver(y0, t).ys[-1] == 2.0


def test_checks_are_made_again():
    outside = torch.tensor(2.0, dtype=F64)
    solver = pnode.Solver(lambda t, y: -outside * y, method="euler", step_size=0.5, compile=False)
    y0, t = torch.ones(2, dtype=F64), times(0.0, 1.0)
    expected = solver(y0, t).ys
    with pytest.raises(pnode.ConfigurationError, match="NaN"):
        solver(y0 * torch.nan, t)
    with pytest.raises(pnode.ConfigurationError, match="NaN"):
        solver(y0, times(0.0, torch.nan))
    with pytest.raises(pnode.ConfigurationError, match="increase"):
        solver(y0, times(0.0, 0.0))
    with pytest.raises(pnode.ConfigurationError, match="1-D"):
        solver(y0, t[None])
    with pytest.raises(pnode.ConfigurationError, match="vmap"):
        torch.func.vmap(lambda y: solver(y, t).ys)(y0[None])
    outside.requires_grad_()
    with pytest.raises(pnode.ConfigurationError, match="was not declared"):
        solver(y0, t)
    outside.requires_grad_(False)
    assert torch.equal(solver(y0, t).ys, expected)
    tangent = torch.func.jvp(lambda y: solver(y, t).ys, (y0,), (y0,))[1]
    assert torch.allclose(tangent, expected)
    with torch.inference_mode():
        assert torch.equal(solver(y0, t).ys, expected)


def test_calls_with_more_are_looked_at():
    def f(t, y, rate=1.0):
        return tuple(-rate * part for part in y) if isinstance(y, tuple) else -rate * y

    solver = pnode.Solver(f, method="heun2", step_size=0.25, compile=False)
    y0, t = torch.ones(2, dtype=F64), times(0.0, 1.0)
    plain = solver(y0, t).ys
    assert not torch.equal(solver(y0, t, args=2.0).ys, plain)
    assert solver(y0, t, breakpoints=[0.3]).stats.steps == 5
    assert torch.equal(solver((y0,), t).ys[0], plain)
    assert torch.equal(solver(y0, t).ys, plain)
    assert torch.equal(copy.deepcopy(solver)(y0, t).ys, plain)


def test_reads_of_few_numbers():
    whole = torch.arange(12.0).reshape(3, 4)
    tensors = [whole.t()[:2], torch.tensor([1j, torch.nan]), torch.tensor([True]), torch.ones(0)]
    reads = Reads(tensors)
    assert reads.changed() is None
    whole[0, 3] = 5.0  # not of them
    assert reads.changed() is None
    tensors[2].logical_not_()
    assert reads.changed() is tensors[2]
    tensors[2].logical_not_()
    a, b = whole[0, 0].item(), whole[1, 1].item()  # neither sum nor norm tells
    whole[0, 0], whole[1, 1] = b, a
    assert reads.changed() is tensors[0]
    many = [torch.ones(1 << 14, dtype=F64)]
    reads = Reads(many)
    assert reads.changed() is None
    many[0].data[7] = 2.0
    assert reads.changed() is many[0]


def test_agreement_of_few_numbers():
    for size in (3, 300):
        a = torch.linspace(-1.0, 2.0, size, dtype=F64)
        assert agree(a, a * (1 + 1e-12))
        assert not agree(a, a + 1e-8)
        unknown = a.clone()
        unknown[0] = torch.nan
        assert agree(unknown, unknown)
        assert not agree(unknown, a)
        assert not agree(a, unknown)
        endless = a.clone()
        endless[-1] = torch.inf
        assert agree(endless, endless)
        assert not agree(endless, a)
        assert not agree(a, endless)

"""compile="auto": without machine code at first, and with it once that has come to pay."""

from __future__ import annotations

import logging
import time
import warnings
from itertools import pairwise

import pytest
import torch
from test_compiled import interpreted, start

import pnode
from pnode.errors import ConfigurationError
from pnode.solvers.compiled import account, inductor

__all__ = ["interpreted"]  # a fixture

D = torch.float64
TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=D)
WAYS = {
    "steps": {"method": "bosh3", "step_size": 0.1},
    "adaptive steps": {"method": "dopri5", "rtol": 1e-5, "atol": 1e-7, "first_step": 0.1},
    "field": {"method": "bdf2", "step_size": 0.1, "jacobian": "matrix-free"},
    "field of block": {"method": "cn", "step_size": 0.1, "jacobian": "matrix-free"},
}


class Net(torch.nn.Module):
    """A network and a time-dependent decay."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(3, 9).to(D)
        self.second = torch.nn.Linear(9, 3).to(D)

    def forward(self, t, y):
        return self.second(torch.tanh(self.first(y))) - torch.sin(t) * y


@pytest.fixture
def cheap(monkeypatch):
    """Compilations that are paid for by a few solves; f is looked at after one."""
    monkeypatch.setattr(account, "_PRICE", 1500)
    monkeypatch.setattr(account, "_LOOK", 10)


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def gradients(solver, net, y0=None):
    y0 = (start(4, 3) if y0 is None else y0).clone().requires_grad_()
    solution = solver(y0, TIMES)
    found = torch.autograd.grad(solution.ys.square().sum(), [y0, *net.first.parameters()])
    return [solution.ys.detach(), *found]


def assert_same(found, expected, rtol=1e-9):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol * float(theirs.abs().max()))


def entries(solver):
    return list(solver._engine.account.entries.values())


@pytest.mark.parametrize("way", WAYS)
def test_eager_first_and_compiled_then(way, cheap, interpreted, caplog):
    net = Net()
    eager = pnode.Solver(net, compile=False, **WAYS[way])
    solver = pnode.Solver(net, **WAYS[way])
    expected = gradients(eager, net)
    course = []
    with caplog.at_level(logging.INFO, "pnode"):
        for _ in range(12):
            before = dict(interpreted)
            found = gradients(solver, net)
            course.append(interpreted != before)
            if not course[-1]:  # to the last bit
                assert all(map(torch.equal, found, expected))
            assert_same(found, expected, 1e-8 if "adaptive" in way else 1e-9)
    assert course == sorted(course) and not course[0] and course[-1]
    lines = [record.getMessage() for record in caplog.records if record.name == "pnode"]
    assert len(lines) == 1 and lines[0].startswith("compiled ") and " s, after " in lines[0]
    assert "compiled='" in repr(solver) and "compiled" not in repr(eager)
    # The same again, however long things take.
    again = pnode.Solver(net, **WAYS[way])
    other = []
    for _ in course:
        before = dict(interpreted)
        time.sleep(0.01)
        gradients(again, net)
        other.append(interpreted != before)
    assert other == course


def test_machine_code(cheap):
    """The whole sweep of an implicit method, and back: before, at and after the switch."""

    class Decay(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first = torch.nn.Linear(1, 1).to(D)

        def forward(self, t, y):
            return -(self.first.weight[0, 0] ** 2 + 1.0) * y * y + self.first.bias[0]

    net = Decay()
    eager = pnode.Solver(net, method="cn", step_size=0.1, compile=False)
    solver = pnode.Solver(net, method="cn", step_size=0.1)
    y0 = torch.tensor([1.0, 0.5], dtype=D)
    expected = gradients(eager, net, y0)
    ways = []
    for _ in range(10):
        assert_same(gradients(solver, net, y0), expected)
        ways.append(entries(solver)[0].made)
    assert ways[0] == "" and ways[-1] == "whole sweeps"
    assert "compiled='whole sweeps'" in repr(solver)


def test_a_backward_sweep_is_that_of_its_forward_sweep(cheap, interpreted):
    """Also where the solver has switched in between."""
    net = Net()
    solver = pnode.Solver(net, method="bosh3", step_size=0.1)
    y0 = start(4, 3).requires_grad_()
    kept = solver(y0, TIMES).ys
    expected = torch.autograd.grad(kept.square().sum(), y0, retain_graph=True)[0]
    for _ in range(12):
        gradients(solver, net)
    assert entries(solver)[0].made
    assert torch.equal(torch.autograd.grad(kept.square().sum(), y0)[0], expected)


def test_below_the_price_nothing_happens(interpreted):
    """Nor is f evaluated more often than is counted."""
    calls = [0]

    def field(t, y):
        calls[0] += 1
        return -torch.sin(y)

    solver = pnode.Solver(field, method="bosh3", step_size=0.1)
    expected = 0
    for _ in range(5):
        solution = solver(start(3).requires_grad_(), TIMES)
        solution.ys.sum().backward()
        expected += solution.stats.rhs + solution.stats.backward.rhs
    assert calls[0] == expected
    assert not interpreted
    (entry,) = entries(solver)
    assert entry.calls > expected and not entry.bought


@pytest.mark.parametrize("count", [False, True])
def test_the_rule(count):
    """So many evaluations of so many operations, and no sooner."""
    entry = account.Entry(work=account.Work(6, 0, 0))
    needed = account._PRICE / (6 + account._BESIDES)
    entry.calls = int(needed) - (0 if count else 1)
    entry.decide(1.0)
    assert entry.bought is count
    assert account.Work(6, 0, 0).small and not account.Work(6, 10**9, 0).small


def test_networks_of_the_tables_in_the_docs():
    """Where machine code saves a third it is made, where it saves a tenth it is not."""

    def work(batch, width, hidden):
        products = 2 * 2 * batch * width * hidden
        return account.Work(5, products, batch * (2 * hidden + width))

    assert work(20, 2, 50).small and work(256, 64, 256).small
    assert not work(256, 512, 1024).small


@pytest.mark.parametrize(
    ("dtype", "gradient"), [("float32", True), ("float64", True), ("float64", False)]
)
def test_what_is_counted(monkeypatch, dtype, gradient):
    """A gradient has a sum for each parameter; single precision is twice as fast."""
    monkeypatch.setattr(account, "_LOOK", 10)
    net = Net().to(getattr(torch, dtype))
    net.first.bias.requires_grad_(False)
    y0 = start(4, 3).to(net.first.weight.dtype)
    solver = pnode.Solver(net, method="rk4", step_size=0.1)
    for _ in range(2):
        with torch.set_grad_enabled(gradient):
            solver(y0, TIMES.to(y0.dtype))
    (entry,) = entries(solver)
    assert entry.work.flops == 2 * 2 * 4 * 3 * 9 * y0.element_size() // 8
    results = 4 * (9 + 9 + 3 + 3 + 3) + 1
    assert entry.work.entries == results + gradient * (2 * 27 + 3)


def run_until_decided(solver, *arguments):
    for _ in range(12):
        solver(*arguments)
    return repr(solver)


def test_no_compiler(cheap, monkeypatch):
    asked = []

    def fail(name, function, examples):
        asked.append(name)
        raise inductor.CompilationFailed("InvalidCxxCompiler")

    monkeypatch.setattr(inductor, "compile_graph", fail)
    solver = pnode.Solver(Net(), method="bosh3", step_size=0.1)
    expected = pnode.Solver(Net(), method="bosh3", step_size=0.1, compile=False)(start(4, 3), TIMES)
    assert "not compiled: InvalidCxxCompiler" in run_until_decided(solver, start(4, 3), TIMES)
    assert len(asked) == 1  # and never again
    assert "not compiled: InvalidCxxCompiler" in run_until_decided(solver, start(4, 3), TIMES)
    assert len(asked) == 1
    assert torch.equal(solver(start(4, 3), TIMES).ys, expected.ys)


def test_an_unusable_cache(cheap, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("PNODE_CACHE_DIR", str(tmp_path / "cache"))
    solver = pnode.Solver(Net(), method="bosh3", step_size=0.1)
    text = run_until_decided(solver, start(4, 3), TIMES)
    assert "not compiled:" in text and len(solver.extra_repr()) < 200
    assert "not a folder" in entries(solver)[0].hindrance


class Counting(Net):
    """Counts its evaluations, as many do."""

    nfe = 0

    def forward(self, t, y):
        self.nfe += 1
        return super().forward(t, y)


def hooked(t, y):
    z = torch.sin(y)
    if z.requires_grad:
        z.register_hook(lambda g: 2.0 * g)
    return -z


def branching(t, y):
    return -y if y.sum() > 1e9 else -2.0 * y


WIDE = torch.ones(1500, 1500, dtype=D) / 1500


@pytest.mark.parametrize(("field", "says"), [
    (Counting(), "changes f"), (hooked, "hooks"), (branching, "values of tensors"),
    (lambda t, y: -(y.repeat(64, 500) @ WIDE)[0, :3], "arithmetic"),
])  # fmt: skip
def test_fields_that_stay_as_they_are(field, says, cheap, interpreted):
    shape = (4, 3) if isinstance(field, torch.nn.Module) else (3,)
    solver = pnode.Solver(field, method="bosh3", step_size=0.1)
    y0 = start(*shape).requires_grad_()
    assert "not compiled: " in run_until_decided(solver, y0, TIMES)
    assert says in entries(solver)[0].hindrance
    assert not interpreted


def test_counters_go_on(cheap, interpreted):
    net = Counting()
    solver = pnode.Solver(net, method="bosh3", step_size=0.1)
    run_until_decided(solver, start(4, 3), TIMES)
    before = net.nfe
    stats = solver(start(4, 3), TIMES).stats
    assert net.nfe - before == stats.rhs


def test_cost_integrals_and_residuals(cheap, interpreted):
    """A cost that changes from solve to solve is the new one, as a field is."""
    factor = [1.0]
    options = {"cost": lambda t, y: factor[0] * y.sum(), "method": "bosh3", "step_size": 0.1}
    solver, eager = (pnode.Solver(lambda t, y: -y, compile=c, **options) for c in ("auto", False))
    assert "compiled='steps'" in run_until_decided(solver, start(3), TIMES)
    assert interpreted
    for factor[0] in (1.0, 2.5):
        assert_same([solver(start(3), TIMES).costs], [eager(start(3), TIMES).costs])
    interpreted.clear()
    solver = pnode.Solver(residual=lambda t, y, yp: yp + y, method="beuler", step_size=0.02)
    assert "compiled='whole sweeps'" in run_until_decided(solver, start(3), TIMES)
    assert not interpreted


def test_a_field_that_changes_is_bought_anew(cheap, interpreted):
    """A number that changes in every solve is compiled three times at most, and always right."""
    factor = [1.0]

    def field(t, y):
        return -factor[0] * torch.sin(y)

    solver, eager = (
        pnode.Solver(field, method="bosh3", step_size=0.1, compile=c) for c in ("auto", False)
    )
    made = []
    for number in range(80):
        if number % 20 == 19 or number > 60:
            factor[0] += 1.0
        assert_same([solver(start(3), TIMES).ys], [eager(start(3), TIMES).ys])
        made.append(bool(entries(solver)[0].made))
    assert made.count(True) > 10
    assert sum(b and not a for a, b in pairwise(made)) <= 3
    factor[0] = 0.0
    assert_same([solver(start(3), TIMES).ys], [eager(start(3), TIMES).ys])


def test_odeint_stays_as_it_is(cheap, interpreted):
    """Each call has a solver of its own."""
    for _ in range(12):
        pnode.odeint(Net(), start(4, 3), TIMES, method="bosh3", options={"step_size": 0.1})
    assert not interpreted


@pytest.mark.parametrize("value", ["Auto", "", None, 1, 0, "yes"])
@pytest.mark.parametrize("call", [
    lambda **k: pnode.Solver(lambda t, y: -y, **k),
    lambda **k: pnode.odeint(lambda t, y: -y, torch.ones(1), torch.tensor([0.0, 1.0]), **k),
])  # fmt: skip
def test_other_values_are_refused(value, call):
    with pytest.raises(ConfigurationError, match=r"compile=.*give True or False, or 'auto'"):
        call(compile=value)

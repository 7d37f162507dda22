"""compile=True where sweeps are not compiled as a whole: the field's graphs behind any method."""

from __future__ import annotations

import pytest
import torch
from compile_cache import share_headers
from test_compiled import Net, assert_same, both, gradients, interpreted, no_warnings, start

import pnode
from pnode.errors import NonFiniteVectorField
from pnode.solvers.compiled import inductor

__all__ = ["interpreted", "no_warnings"]  # fixtures


pytestmark = pytest.mark.usefixtures("interpreted")


class Split(torch.nn.Module):
    """One part of a split right-hand side."""

    def __init__(self, stiff):
        super().__init__()
        torch.manual_seed(3 + stiff)
        self.layer = torch.nn.Linear(3, 3).double()
        self.rate = 20.0 if stiff else 1.0

    def forward(self, t, y):
        return torch.tanh(self.layer(y)) * torch.cos(t) - self.rate * y


METHODS = {
    "bdf, adaptive": {"method": "bdf", "rtol": 1e-6, "jacobian": "block"},
    "bdf3, sparse": {"method": "bdf3", "step_size": 0.1, "jacobian": "sparse"},
    "cn, adaptive": {"method": "cn", "rtol": 1e-3},
    "cn, blocks": {"method": "cn", "step_size": 0.1, "jacobian": "block"},
    "cn, sparse": {"method": "cn", "step_size": 0.1, "jacobian": "sparse"},
    "cn, matrix-free": {"method": "cn", "step_size": 0.1, "jacobian": "matrix-free"},
    "beuler, reuse": {"method": "beuler", "step_size": 0.1, "jacobian_reuse": "step"},
    "es325, dense output": {
        "method": "es325",
        "step_size": 0.2,
        "dense": True,
        "jacobian": "block",
    },
    "esdirk6, limit": {
        "method": "esdirk6",
        "step_size": 0.1,
        "checkpointing": "8KiB",
        "jacobian": "block",
    },
    "dopri5, pi": {"method": "dopri5", "rtol": 1e-6, "controller": "pi"},
}


@pytest.mark.parametrize("case", METHODS)
def test_same_numbers_and_counts(case, interpreted):
    """The field's own code runs once a solve, as a check."""
    net = Net()
    y0 = start(4, 3)
    # Newton's iterations end at a tolerance, where round-off decides on one more: within that.
    loose = case in ("bdf, adaptive", "beuler, reuse", "cn, adaptive")
    ledger, expected = both(net, y0, within=1e-7 if loose else 1e-9, **METHODS[case])
    assert (ledger.steps, ledger.rejected) == (expected.steps, expected.rejected)
    if not loose:
        ledger.tape_bytes = expected.tape_bytes  # other things are kept
        assert ledger == expected
    assert interpreted["value"] > 0 and interpreted["product"] > 0
    solver = pnode.Solver(net, compile=True, **METHODS[case])
    calls = []
    for _ in range(2):
        solution = solver(y0.clone().requires_grad_(), torch.tensor([0.0, 0.3, 1.0]))
        solution.ys.sum().backward()
        calls.append(net.calls)
    solver(y0, torch.tensor([0.0, 1.0]))
    assert net.calls - calls[1] == 1


def test_split_right_hand_side():
    parts = Split(True), Split(False)
    found = []
    for compiled in (False, True):
        y0 = start(4, 3).requires_grad_()
        solver = pnode.Solver(
            implicit=parts[0], explicit=parts[1], method="ark3", step_size=0.1, jacobian="block",
            compile=compiled,
        )  # fmt: skip
        solution = solver(y0, torch.tensor([0.0, 1.0]))
        tensors = [y0, *parts[0].parameters(), *parts[1].parameters()]
        found.append(
            [solution.ys.detach(), *torch.autograd.grad(solution.ys.square().sum(), tensors)]
        )
    assert_same(found[1], found[0], 1e-10)


@pytest.mark.parametrize(("jacobian", "reuse"), [("dense", "step"), ("matrix-free", "auto")])
def test_mass_matrix(jacobian, reuse):
    mass = torch.linspace(1.0, 2.0, 12, dtype=torch.float64)
    found, net = [], Net()
    for compiled in (False, True):
        solver = pnode.Solver(
            net, mass=mass, method="cn", step_size=0.1, jacobian=jacobian, jacobian_reuse=reuse,
            compile=compiled,
        )  # fmt: skip
        y0 = start(4, 3).requires_grad_()
        ys = solver(y0, [0.0, 1.0]).ys
        tensors = [y0, *net.first.parameters(), *net.second.parameters()]
        found.append([ys.detach(), *torch.autograd.grad(ys.square().sum(), tensors)])
    assert_same(found[1], found[0], 1e-9)


def test_float32_and_decreasing_times():
    net = Net(torch.float32)
    both(
        net, start(4, 3, dtype=torch.float32), torch.tensor([1.0, 0.3, 0.0]), within=2e-4,
        method="bdf2", step_size=0.1,
    )  # fmt: skip


def test_tuple_state():
    net = Net()

    def field(t, y):
        a, b = y
        return net(t, a), -b * a.sum()

    y0 = (start(4, 3), start(2))
    keywords = {"method": "trbdf2", "step_size": 0.1, "jacobian": "matrix-free"}
    both(field, y0, params=list(net.parameters()), within=1e-9, **keywords)


def test_changed_parameters_take_effect_and_changed_code_is_noticed(interpreted):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor, self.rate = 1.0, torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, t, y):
            return -self.factor * self.rate * y

    field = Scaled().double()
    solvers = [pnode.Solver(field, method="bdf2", step_size=0.1, compile=c) for c in (True, False)]
    for change in ("rate", "factor", None):
        found, expected = (solver(start(3), [0.0, 1.0]).ys for solver in solvers)
        assert_same([found.detach()], [expected.detach()])
        if change == "rate":
            field.rate.data.mul_(1.5)
        elif change == "factor":
            field.factor = 2.0
    assert len(solvers[0]._engine.compiler._codes) == 2


def test_exceptions_and_nan_come_through():
    def field(t, y):
        return torch.where(t > 0.5, torch.nan, 1.0) * -y

    solver = pnode.Solver(field, method="bdf2", step_size=0.1, compile=True)
    with pytest.raises(NonFiniteVectorField):
        solver(start(3), [0.0, 1.0])
    assert solver(start(3), [0.0, 0.4]).stats.steps == 4


def test_second_backward():
    net = Net()
    ys = pnode.Solver(net, compile=True, method="cn", rtol=1e-3)(start(4, 3), [0.0, 1.0]).ys
    first, second = (
        torch.autograd.grad(ys.square().sum(), list(net.first.parameters()), retain_graph=True)
        for _ in range(2)
    )
    assert_same(list(first), list(second), 1e-13)


@pytest.mark.parametrize(("keywords", "reason"), [
    (
        {"residual": lambda t, y, yp: yp + y, "method": "bdf", "jacobian": "matrix-free"},
        "'dense' alone.*a residual by itself",
    ),
    ({"rhs": lambda t, y: -y if float(t) < 2 else y, "method": "bdf"}, "torch.where"),
    (
        {"rhs": lambda t, y: -y, "method": "rodaspr", "jacobian": "matrix-free"},
        "jacobian='dense'.*differentiate it twice",
    ),
])  # fmt: skip
def test_one_warning_where_nothing_is_compiled(keywords, reason):
    solver = pnode.Solver(**keywords, compile=True)
    with pytest.warns(UserWarning, match=f"no effect.*{reason}") as caught:
        solver(start(3), [0.0, 1.0])
        solver(start(3), [0.0, 1.0])
    found = [warning for warning in caught if "compile=True" in str(warning.message)]
    assert len(found) == 1
    assert found[0].filename == __file__


def test_a_derivative_that_cannot_be_compiled_goes_on_uncompiled(monkeypatch):
    compile_graph = inductor.compile_graph

    def fail(name, function, examples):
        if name.startswith("derivative"):
            raise inductor.CompilationFailed("no room on disk")
        return compile_graph(name, function, examples)

    monkeypatch.setattr(inductor, "compile_graph", fail)
    keywords = METHODS["cn, matrix-free"]
    expected, _ = gradients(Net(), start(4, 3), **keywords)
    with pytest.warns(UserWarning, match="derivative of the field goes uncompiled.*no room"):
        found, _ = gradients(Net(), start(4, 3), compile=True, **keywords)
    assert_same(found, expected, 1e-9)


def test_machine_code(monkeypatch, tmp_path):
    """The real compiler once, and its results from the disk in another solver."""
    monkeypatch.undo()
    share_headers(tmp_path)
    monkeypatch.setenv("PNODE_CACHE_DIR", str(tmp_path))
    keywords = {"method": "bdf3", "step_size": 0.1, "jacobian_reuse": "step"}
    both(Net(), start(4, 3), within=1e-9, **keywords)
    files = sorted(tmp_path.glob("[!.]*"))
    assert [file.name.split("-")[0] for file in files] == ["product", "rows", "value"]
    stamps = [file.stat().st_mtime_ns for file in files]
    both(Net(), start(4, 3), within=1e-9, **keywords)
    assert [file.stat().st_mtime_ns for file in sorted(tmp_path.glob("[!.]*"))] == stamps


def test_rows_of_a_field_that_writes_into_an_open_slice(interpreted):
    """torch's vmap fails at the end that such a slice has."""

    def field(t, y):
        z = y.sin()
        z.view(-1)[1:] *= 2.0
        return z

    both(field, start(2, 3), method="cn", step_size=0.1, jacobian="block")
    assert "rows" in interpreted


def test_complex_slices_that_are_written_into(interpreted):
    """As in the derivative of irfft, which is differentiated once more for products."""

    def field(t, y):
        return torch.fft.irfft(2.0 * torch.fft.rfft(y), n=8).tanh()

    both(field, start(3, 8), method="cn", step_size=0.1, jacobian="matrix-free")
    assert "derivative" in interpreted


def test_rates_of_algebraic_unknowns():
    """Derivatives by times of outputs between steps, which want df/dt."""
    w = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(2, dtype=torch.float64)
    y0[1] = torch.sin(y0[0])

    def f(t, y):
        return torch.stack([y[1] * torch.cos(t) - w * y[0], y[1] - torch.sin(y[0])])

    found = []
    for compiled in (True, False):
        solver = pnode.Solver(
            f, params=[w], mass=torch.tensor([1.0, 0.0], dtype=torch.float64), method="bdf",
            rtol=1e-6, dense=True, jacobian="matrix-free", compile=compiled,
        )  # fmt: skip
        t = torch.tensor([0.0, 0.13, 0.4], dtype=torch.float64, requires_grad=True)
        found.append(torch.autograd.grad(solver(y0, t).ys[1].square().sum(), (w, t)))
        assert ("'the vector field'" in repr(solver)) == compiled
    for own, expected in zip(*found, strict=True):
        assert torch.allclose(own, expected, rtol=1e-9)


@pytest.mark.parametrize("method", ["beuler", "bdf2"])
def test_products_that_torch_batches_wrongly(method, interpreted):
    """``torch.vmap`` of the derivative of cdist gives each row the first one's; Newton bears it."""
    places = torch.tensor([[0.7], [-0.4], [1.3]], dtype=torch.float64)
    y0 = torch.tensor([0.3, -0.6, 0.45], dtype=torch.float64, requires_grad=True)
    w = torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64)
    found = []
    for field in (
        lambda t, y: 0.1 * torch.cdist(y[:, None], places).sum(1) - y,
        lambda t, y: 0.1 * (y[:, None] - places[:, 0]).abs().sum(1) - y,
    ):
        solver = pnode.Solver(field, method=method, step_size=0.25, compile=True)
        ys = solver(y0, torch.tensor([0.0, 1.0])).ys[-1]
        found.append(torch.autograd.grad(ys @ w, y0)[0])
    assert interpreted["product"] > 0
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)

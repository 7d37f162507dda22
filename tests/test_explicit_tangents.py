"""Tangents of compiled explicit steps: the transpose of their adjoint, and those of plain steps."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from test_compiled_stiff import difference
from test_compiled_tangents import compiled_alone, traces  # noqa: F401  fixtures
from torch.func import functional_call, jacfwd, jacrev, jvp, vmap

import pnode
from pnode.base.ledger import Ledger
from pnode.derivatives import stage_tangents
from pnode.field.vectorfield import vector_field
from pnode.solvers.compiled import account, inductor
from pnode.solvers.compiled.step_tangents import StepTangents
from pnode.solvers.compiled.steps import StepGraphs
from pnode.solvers.compiled.trace import trace_field
from pnode.solvers.methods import METHODS

D = torch.float64
TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=D)
EXPLICIT = [m for m in METHODS if m.scheme is not None and m.scheme.explicit]


class Flow(torch.nn.Module):
    """A network and decay at a rate, non-autonomous; one parameter stays unused."""

    def __init__(self, dtype=D):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape):
            return torch.nn.Parameter(
                0.5 * torch.randn(shape, generator=generator, dtype=D).to(dtype)
            )

        self.first, self.bias, self.unused = parameter(3, 5), parameter(5), parameter(2)
        self.last, self.rate = parameter(5, 3), parameter()

    def forward(self, t, y):
        hidden = torch.tanh(y @ self.first + self.bias * torch.cos(3.0 * t))
        return hidden @ self.last - self.rate * y * y.roll(1, -1)


START = torch.linspace(-1.0, 1.0, 12, dtype=D).view(4, 3)


class Scaled(torch.autograd.Function):
    """sin(x), with a derivative of its own that torch could not take forwards."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, w):
        (x,) = ctx.saved_tensors
        return w.detach() * x.cos()


class Own(Flow):
    def forward(self, t, y):
        return Scaled.apply(super().forward(t, y))


def made(field, start, method, adaptive, keeps, monkeypatch):
    """Return the graphs of steps, which torch runs itself, and those of their tangents."""

    def run_graph(name, function, examples):
        return lambda inputs: list(function(*inputs))

    monkeypatch.setattr(inductor, "compile_graph", run_graph)
    solver = pnode.Solver(field, method=method.name, step_size=0.1, compile=False)
    solution = solver(start.clone().requires_grad_(), TIMES)
    problem = solution.stage_sweep.solved()[1].problem
    graph = trace_field(vector_field(problem, Ledger()))
    scheme = method.scheme
    steps = StepGraphs(
        graph, scheme if adaptive else scheme.without_idle_stages(method.fsal),
        scheme.b_embedded if adaptive else None, method.fsal, start.numel(), start.dtype, keeps,
    )  # fmt: skip
    return steps, StepTangents(steps, 0.2, start)


@pytest.mark.parametrize("keeps", [True, False])
@pytest.mark.parametrize("method", EXPLICIT, ids=lambda method: method.name)
def test_a_step(method, keeps, monkeypatch):
    """Its tangents are the transpose of its adjoint: f, the steps and the checkpoint are theirs."""
    for field, start in ((Flow(), START), (Own(), START), (Flow(), START[0])):
        if field.__class__ is Own and method.name not in ("rk4", "dopri5"):
            continue
        adaptive = method.adaptive and keeps
        steps, tangents = made(field, start, method, adaptive, keeps, monkeypatch)
        torch.manual_seed(1)
        t, h = torch.tensor(0.3, dtype=D), torch.tensor(-0.2, dtype=D)
        u, read = start.reshape(-1), steps.traced.inputs()
        tolerances = [torch.full((), 1e-3, dtype=D)] * 2 if adaptive else []
        with torch.no_grad():
            slope, saved = steps.start(t, u)
            first, saved = ([slope], saved) if steps.fsal else ([], ())
            run = steps.compile_step(tolerances)
            results = run([t, h, u, *tolerances, *first, *read])
            checkpoint = steps.checkpoint(u, saved, results)
            w, du = torch.randn(len(u), dtype=D), torch.randn(3, len(u), dtype=D)
            v = torch.randn(3, tangents.entries, dtype=D)
            state, *mu = steps.adjoint([t, h, w, *checkpoint, *steps.zeros(), *read])
            gradients = dict(steps.gradients(mu))
            pulled = torch.cat([gradients[p.index].reshape(-1) for p in steps.traced.parameters])
            for number in (1, 3):
                given = [t, h, du[:number].reshape(-1)]
                moved = tangents.compiled(number, True)([*given, v[:number], *checkpoint, *read])
                alone = tangents.compiled(number, False)([*given, *checkpoint, *read])
                for found, expected in (
                    (moved, du @ state + v @ pulled), (alone, du @ state),
                ):  # fmt: skip
                    products = found[0].view(number, -1) @ w
                    assert (products - expected[:number]).abs().max() < 1e-13 * len(u)


def function(field, compile, times=TIMES, **keywords):
    """Return the outputs as a function of y0 and of all parameters by name."""
    solver = pnode.Solver(field, compile=compile, **keywords)
    parameters = {f"rhs.{name}": p.detach() for name, p in field.named_parameters()}

    def outputs(y0, parameters):
        return functional_call(solver, parameters, (y0, times)).ys

    return solver, outputs, parameters


@pytest.mark.parametrize(("keywords", "times"), [
    ({"method": "heun2", "step_size": 0.1}, TIMES),
    ({"method": "heun2", "step_size": 0.1}, -TIMES),
    ({"method": "bosh3", "rtol": 1e-5, "atol": 1e-7}, TIMES),
])  # fmt: skip
def test_whole_sweeps(keywords, times, compiled_alone):  # noqa: F811
    """All tangents are those of plain steps, and the transpose of the compiled adjoint."""
    field, found = Flow(), []
    for compile in (False, True):
        solver, outputs, parameters = function(field, compile, times, **keywords)
        with torch.no_grad():
            found.append(jacfwd(outputs, (0, 1))(START, parameters))
        assert ("compiled='whole sweeps'" in repr(solver)) == compile
    (eager_y0, eager), (by_y0, by_parameters) = found
    assert difference(by_y0, eager_y0) < 1e-12
    transposed = jacrev(outputs, (0, 1))(START, parameters)
    assert difference(by_y0, transposed[0]) < 1e-13
    for name, one in by_parameters.items():
        if name == "rhs.unused":
            assert not one.any()
        else:
            assert difference(one, eager[name]) < 1e-12
            assert difference(one, transposed[1][name]) < 1e-12


@pytest.mark.parametrize(
    ("method", "compile"), [("rk4", False), ("rk4", True), ("cn", False), ("rodaspr", False)]
)
def test_derivatives_that_torch_has_but_at_zero(method, compile):
    """The second of logcumsumexp is NaN where the first's cotangent is zero."""
    field = lambda t, y: torch.logcumsumexp(y, 0) - 2.0 * y  # noqa: E731
    solver = pnode.Solver(field, method=method, step_size=0.25, compile=compile)
    with torch.no_grad():
        found = jacfwd(lambda y: solver(y, TIMES).ys)(START[0])
    assert difference(found, jacrev(lambda y: solver(y, TIMES).ys)(START[0])) < 1e-13


def test_one_tangent_and_several(compiled_alone):  # noqa: F811
    """One of both is their sum; ten are two groups; after a backward sweep steps are repeated."""
    solver, outputs, parameters = function(Flow(), True, method="heun2", step_size=0.1)
    with torch.no_grad():
        by_y0, by_parameters = jacfwd(outputs, (0, 1))(START, parameters)
    torch.manual_seed(0)
    along = torch.randn_like(START), {n: torch.randn_like(p) for n, p in parameters.items()}
    with torch.no_grad():
        ys, one = jvp(outputs, (START, parameters), along)
        assert torch.equal(ys, solver(START, TIMES).ys)
    of_start = _contracted(by_y0, along[0])
    total = of_start + sum(_contracted(by_parameters[n], v) for n, v in along[1].items())
    assert difference(one, total) < 1e-13
    _, of_y0 = torch.func.linearize(lambda y0: solver(y0, TIMES).ys, START)
    assert difference(of_y0(along[0]), of_start) < 1e-13
    _, pull_back = torch.func.vjp(of_y0, along[0])
    assert difference(pull_back(ys)[0], torch.einsum("tbcij,tbc->ij", by_y0, ys)) < 1e-13
    assert difference(of_y0(along[0]), of_start) < 1e-13
    several = torch.randn(10, *START.shape, dtype=D)
    with torch.no_grad():
        rows = vmap(lambda v: jvp(lambda y: solver(y, TIMES).ys, (START,), (v,))[1])(several)
    expected = torch.einsum("tbcij,kij->ktbc", by_y0, several)
    assert difference(rows, expected) < 1e-13


def _contracted(jacobian, tangent):
    return (jacobian * tangent).reshape(*jacobian.shape[:3], -1).sum(-1)


def test_counts(compiled_alone):  # noqa: F811
    solver, stats = pnode.Solver(Flow(), compile=True, method="heun2", step_size=0.1), []

    def outputs(y0):
        solution = solver(y0, TIMES)
        stats.append(solution.stats)
        return solution.ys

    with torch.no_grad():
        jvp(outputs, (START,), (START,))
        jacfwd(outputs)(START)
    for found, number in zip(stats, (1, 12), strict=True):
        assert found.tangents.steps == found.steps == 10
        assert (found.tangents.jvp, found.tangents.rhs) == (number * 20, 0)


def test_single_precision(compiled_alone):  # noqa: F811
    """Products in float32, sums in float64, as the adjoint has them."""
    field, v = Flow(torch.float32), torch.randn_like(START, dtype=torch.float32)
    start, found = START.float(), []
    for compile in (False, True):
        solver = pnode.Solver(field, compile=compile, method="heun2", step_size=0.1)
        with torch.no_grad():
            found.append(jvp(lambda y, s=solver: s(y, TIMES).ys, (start,), (v,))[1])
    assert found[1].dtype is torch.float32
    assert difference(found[1], found[0]) < 1e-6


def test_lent_parameters_take_the_code_that_there_is(traces, compiled_alone):  # noqa: F811
    """With other numbers: neither traced nor solved step by step again, nor kept."""
    solver, outputs, parameters = function(Flow(), True, method="heun2", step_size=0.1)
    eager = function(Flow(), False, method="heun2", step_size=0.1)[1]
    solver(START, TIMES).ys.sum().backward()
    for factor in (1.1, 0.7, 1.1):
        other = {name: factor * p for name, p in parameters.items()}
        v = {name: torch.randn_like(p) for name, p in parameters.items()}
        with torch.no_grad():
            found, expected = (
                jvp(lambda p, f=f: f(START, p), (other,), (v,)) for f in (outputs, eager)
            )
        for one, same in zip(found, expected, strict=True):
            assert difference(one, same) < 1e-12
        slopes, expected = (
            torch.func.grad(lambda p, f=f: f(START, p).square().sum())(other)
            for f in (outputs, eager)
        )
        assert difference(slopes["rhs.first"], expected["rhs.first"]) < 1e-12
    alive = []
    for factor in (1.1, 0.9):
        lent = {n: (factor * p).detach().requires_grad_() for n, p in parameters.items()}
        ys = functional_call(solver, lent, (START, TIMES)).ys
        assert difference(ys, eager(START, lent)) < 1e-13
        alive += [weakref.ref(tensor) for tensor in lent.values()]
        del lent, ys
    gc.collect()
    assert len(traces) == 1 and not any(one() is not None for one in alive)


def test_a_field_whose_derivatives_torch_cannot_transpose(monkeypatch):
    """Then tangents take the steps again, with one warning, and are the same."""

    def refuse(*_):
        raise inductor.CompilationFailed("a reason")

    monkeypatch.setattr(StepTangents, "__init__", refuse)
    found = []
    for compile in (False, True):
        solver = pnode.Solver(Flow(), compile=compile, method="heun2", step_size=0.1)
        with torch.no_grad():
            if compile:
                with pytest.warns(RuntimeWarning, match="tangents of compiled steps.*a reason"):
                    jvp(lambda y, s=solver: s(y, TIMES).ys, (START,), (START,))
            found.append(jvp(lambda y, s=solver: s(y, TIMES).ys, (START,), (START,))[1])
    assert difference(found[1], found[0]) < 1e-12


def test_auto_makes_code_for_tangents_once_they_have_paid(monkeypatch):
    monkeypatch.setattr(account, "_PRICE", 1500)
    monkeypatch.setattr(account, "_LOOK", 10)
    again, uncompiled = [], stage_tangents.uncompiled
    monkeypatch.setattr(
        stage_tangents, "uncompiled", lambda *given: again.append(1) or uncompiled(*given)
    )
    solver = pnode.Solver(Flow(), compile="auto", method="heun2", step_size=0.1)
    found = []
    with torch.no_grad():
        for _ in range(12):
            found.append(jvp(lambda y: solver(y, TIMES).ys, (START,), (START,))[1])
    assert "compiled='whole sweeps'" in repr(solver)
    assert len(again) < 10
    assert max(difference(one, found[0]) for one in found) < 1e-12


@pytest.mark.parametrize(
    "transform", ["jvp", "jacfwd", "linearize", "sensitivities", "twice", "rows"]
)
def test_tangents_that_are_not_finite_are_refused(transform):
    """As gradients are: f is finite at y = 0, its derivative is not. NaN that is given passes."""

    def f(t, y):
        return (
            -torch.sqrt(y.prod(-1, keepdim=True)).expand(y.shape)
            if transform != "twice"
            else -(y.abs() ** 1.5)
        )

    samples = "independent" if transform == "rows" else "joint"
    solver = pnode.Solver(f, method="rk4", step_size=0.1, samples=samples)
    y0 = torch.tensor([0.0, 1.0], dtype=torch.float64)
    v = torch.tensor([1.0, 0.5], dtype=torch.float64)

    def end(y):
        return solver(y, [0.0, 0.3]).ys[-1]

    def along(y):
        return torch.func.jvp(end, (y,), (v,))[1]

    calls = {
        "jvp": lambda: along(y0),
        "jacfwd": lambda: torch.func.jacfwd(end)(y0),
        "linearize": lambda: torch.func.linearize(end, y0)[1](v),
        "sensitivities": lambda: pnode.sensitivities(solver, y0, [0.0, 0.3], mode="forward"),
        "rows": lambda: torch.func.jacfwd(end)(torch.stack([y0, y0 + 1.0])),
        "twice": lambda: torch.func.jvp(along, (y0,), (v,)),
    }
    with pytest.raises(pnode.errors.NonFiniteDerivative, match="NaN or infinite"):
        calls[transform]()
    if transform == "jvp":
        smooth = pnode.Solver(lambda t, y: -y, method="rk4", step_size=0.1)
        given = (torch.full_like(y0, torch.nan),)
        found = torch.func.jvp(lambda y: smooth(y, [0.0, 0.3]).ys, (y0,), given)[1]
        assert bool(found.isnan().all())

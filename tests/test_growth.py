"""Plain training does not grow: what is allocated stays the same from gradient to gradient.

Watched are the bytes that malloc has handed out, since graphs that only C++ refers to are not among
Python's objects, and the tensors that Python knows. States are large enough for a part of one that
stays behind to show. ``benchmarks/growth.py`` does the same over thousands of gradients.
"""

from __future__ import annotations

import gc
import inspect
import json
import sys
import types
import warnings
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import get_overridable_functions

import pnode
from pnode.solvers.methods import find_method

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))  # where Python looks when it runs a script of it

import growth  # noqa: E402
from growth import BLOCK, FAMILIES, FIXED, WAYS, WIDTH, Net, allocated, gradient_of  # noqa: E402

D = torch.float64
ROWS = 2048
STATE = 8 * ROWS * WIDTH
WARM_UP, GRADIENTS = 2, 4
#: What may be left of all these gradients together.
ALLOWED = STATE // 2
T = torch.tensor([0.0, 0.1, 0.2], dtype=D)


@pytest.fixture(autouse=True, scope="module")
def _objects_of_others():
    """Leave what exists already out of the collector's lists, which is most of its time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def tensors() -> int:
    """Return the number of tensors that Python's collector sees."""
    return sum(issubclass(type(item), torch.Tensor) for item in gc.get_objects())


def check(once):
    """Nothing is left of some repetitions, after a few others."""
    for _ in range(WARM_UP):
        once()
    gc.collect()
    before = allocated(), tensors()
    for _ in range(GRADIENTS):
        once()
    gc.collect()
    grown, more = allocated() - before[0], tensors() - before[1]
    each = grown / GRADIENTS
    assert grown < ALLOWED, f"{each:.0f} bytes, {each / STATE:.1f} states, a gradient"
    assert more == 0


def start():
    return torch.linspace(0.2, 0.6, ROWS * WIDTH, dtype=D).view(ROWS, WIDTH).requires_grad_()


def training(solver, times=T):
    """Return one step of plain training."""

    def once():
        solver.zero_grad(set_to_none=True)
        solver(start(), times).ys.square().sum().backward()

    return once


@pytest.mark.parametrize("name", [*FAMILIES, *WAYS])
def test_every_family(name, tmp_path):
    check(gradient_of(name, ROWS, str(tmp_path)))
    assert not list(tmp_path.iterdir())


def test_table_of_the_benchmark(monkeypatch, capsys, tmp_path):
    path = tmp_path / "growth.json"
    command = ["growth.py", "--gradients", "10", "--families", "cn", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", command)
    code = growth.main()
    (row,) = json.loads(path.read_text())["rows"]
    assert (row["family"], row["gradients"]) == ("cn", 10)
    assert code == (row["bytes_each"] > growth.ALLOWED)
    assert len(capsys.readouterr().out.splitlines()) == 3 + code


SITUATIONS = {
    "dense, fixed steps": {"dense": True, **FIXED},
    "event that does not come": {"event_fn": lambda t, y: t + 1.0},
    "budget, adaptive": {"checkpointing": 12 * STATE, "max_step": 0.02},
    "solutions": {"checkpointing": pnode.Checkpointing(10 * STATE, store="solutions"), **FIXED},
    "afresh": {"checkpointing": pnode.Checkpointing(reproducible=True)},
    "decreasing": {},
    "monitor": {"monitor": lambda step, t, y: None},
}  # fmt: skip


@pytest.mark.parametrize("name", SITUATIONS)
def test_situations(name):
    times = -T if name == "decreasing" else T
    check(training(pnode.Solver(Net(), method="dopri5", **SITUATIONS[name]), times))


@pytest.mark.parametrize("form", ["singular mass", "algebraic residual"])
@pytest.mark.parametrize("method", ["beuler", "bdf2"])
def test_algebraic_equations(form, method):
    field = Net()
    mass = torch.tensor([1.0, 0.0], dtype=D).repeat(ROWS, 1)
    problem = {"rhs": lambda t, y: field(t, y) - y, "mass": mass}
    if form == "algebraic residual":
        problem = {"residual": lambda t, y, yp: mass * yp - field(t, y) + y}
    solver = pnode.Solver(
        **problem, params=field.parameters(), method=method, consistent_start=True, **FIXED, **BLOCK
    )
    check(training(solver))


ENDINGS = ["no backward", "no grad", "twice", "create_graph", "one output", "only y0", "failure"]


@pytest.mark.parametrize("method", ["rk4", "dopri5", "cn", "rodaspr", "bdf2"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_ways_to_use_a_solution(ending, method):
    """Results that are let go of, used twice, in part, or not at all."""
    net, late = Net(), 9.9

    def field(t, y):
        if t > late:
            raise OverflowError
        return net(t, y)

    solver = pnode.Solver(
        field, params=net.parameters(), method=method, step_size=0.1,
        **(BLOCK if find_method(method).implicit else {}),
    )  # fmt: skip

    def once():
        nonlocal late
        net.zero_grad(set_to_none=True)
        y0 = start()
        if ending == "failure":
            late = 0.1
            with pytest.raises(OverflowError):
                solver(y0, T)
            late = 9.9
        if ending == "no grad":
            with torch.no_grad():
                solver(y0, T)
            return
        ys = solver(y0, T).ys
        total = ys.square().sum()
        if ending in ("twice", "failure"):
            total.backward(retain_graph=True)
            total.backward()
        elif ending == "create_graph":
            torch.autograd.grad(total, list(net.parameters()), create_graph=True)
        elif ending == "one output":
            ys[1].sum().backward()
        elif ending == "only y0":
            torch.autograd.grad(total, y0)

    check(once)


# ------------------------------------------------------------------------------- saved tensors

#: Arguments with both signs, and within the domains of roots, logarithms and inverse functions.
PROBES = [torch.linspace(-0.6, 0.4, 6, dtype=D), torch.linspace(0.2, 0.6, 6, dtype=D)]


def saving(function) -> bool:
    """Whether a function maps a tensor to one of its shape, differentiably, and saves tensors.

    The same one for the same argument: no dropout.
    """
    state = torch.get_rng_state()
    for probe in PROBES:
        saved: list[torch.Tensor] = []
        x = probe.view(3, 2).clone().requires_grad_()
        own = x * 1.0
        try:
            with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
                y = function(own)
            if (
                isinstance(y, torch.Tensor)
                and (y.shape, y.dtype, y.requires_grad) == (x.shape, x.dtype, True)
                and not torch.equal(y, x)
                and y.isfinite().all()
                and torch.equal(torch.get_rng_state(), state)
            ):
                return bool(saved)
        except Exception:  # wants other arguments
            pass
        finally:
            torch.set_rng_state(state)
    return False


def activations() -> dict[str, object]:
    """Find them in torch.nn.functional and torch, those that write into their argument left out.

    Of torch, only functions of tensors: among the others are those that set its state.
    """
    of_tensors = set(get_overridable_functions()[torch])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            f"{module.__name__}.{name}": getattr(module, name)
            for module in (F, torch)
            for name in sorted(dir(module))
            if not name.startswith("_") and not name.endswith("_")
            if inspect.isroutine(getattr(module, name))
            if module is F or getattr(module, name) in of_tensors
            if saving(getattr(module, name))
        }


ACTIVATIONS = activations()


def test_activations_are_found():
    expected = {"tanh", "sigmoid", "relu", "softmax", "log_softmax", "elu", "selu", "silu", "gelu"}
    assert {f"torch.nn.functional.{name}" for name in expected} <= set(ACTIVATIONS)
    assert {"torch.exp", "torch.sqrt", "torch.rsqrt", "torch.reciprocal"} <= set(ACTIVATIONS)


@pytest.mark.filterwarnings("ignore")
def test_every_activation():
    """Saved tensors that are the graph's own outputs must not tie it to itself."""
    weights = torch.tensor([0.9, 0.1], dtype=D, requires_grad=True)

    def check_with(chosen):
        def field(t, y):
            x = weights[0] * y
            return weights[1] * sum(function(x) for function in chosen) / len(chosen)

        check(training(pnode.Solver(field, params=[weights], method="rk4", step_size=0.2)))

    try:
        check_with(ACTIVATIONS.values())
    except AssertionError:
        for name, function in ACTIVATIONS.items():
            try:
                check_with([function])
            except AssertionError as error:
                raise AssertionError(name) from error
        raise


# ------------------------------------------------------------- a Module that keeps its own results


class Keeper(torch.nn.Module):
    """Owns f, and keeps what comes of solves of it."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.inner = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 2, dtype=D))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=D))
        self.register_buffer("scale", torch.tensor([0.5, 0.7], dtype=D))
        self.shift = 0.1
        self.kept = None
        self.history = []
        self.empty = torch.nn.Module()
        self.evaluations = 0
        self.apply_field = self.field

    def field(self, t, y):
        self.evaluations += 1
        return torch.tanh(self.inner(y)) * self.scale - self.shift * y

    def forward(self, t, y):
        return self.apply_field(t, y)


class Pair(torch.nn.Module):
    def __init__(self, first):
        super().__init__()
        self.first = first

    def forward(self, t, y):
        return self.first(t, y[0]), self.first(t, y[1]) - y[0]


def solve(f, y0, **keywords):
    return pnode.Solver(f, **{"method": "rk4", "step_size": 0.1} | keywords)(y0, T)


def keep_slice(net, y0, **keywords):
    net.kept = solve(net, y0, **keywords).ys[-1]
    return net.kept.square().sum()


def keep_attribute(net, y0):
    net.solver = pnode.Solver(net.field, params=net.inner.parameters(), method="rk4", step_size=0.1)
    net.kept = net.solver(y0, T).ys[1:]
    return net.kept.square().sum()


def keep_tuple(net, y0):
    net.kept = solve(Pair(net), (y0, y0 * y0)).ys
    return sum(part.square().sum() for part in net.kept)


def keep_loss(net, y0):
    net.kept = {"loss": solve(net, y0).ys.square().sum()}
    return net.kept["loss"] * 1.0


def keep_history(net, y0):
    net.history.append(solve(net, y0).ys[-1])
    return net.history[-1].square().sum()


def keep_inside(net, y0):
    """In what is empty when the function is taken down."""
    solution = solve(net, y0)
    net.empty.register_buffer("result", solution.ys[-1])
    net.empty.result_of = torch.nn.Module()
    net.empty.result_of.solution = solution
    return net.empty.result.square().sum()


def keep_solution(net, y0):
    net.kept = solve(net, y0, dense=True)
    return net.kept.ys.square().sum()


def keep_event(net, y0):
    net.kept = solve(net, y0, event_fn=lambda t, y: t - 0.15)
    return net.kept.ys[-1].square().sum()


def keep_imex(net, y0):
    net.kept = pnode.Solver(
        implicit=net.field, explicit=net, params=net.parameters(), method="ark3", step_size=0.1
    )(y0, T).ys[-1]
    return net.kept.sum()


def keep_residual(net, y0):
    net.residual = types.MethodType(lambda self, t, y, yp: yp - self(t, y), net)
    net.kept = pnode.Solver(
        residual=net.residual, params=net.parameters(), method="bdf2", step_size=0.1
    )(y0, T).ys[-1]
    return net.kept.sum()


WAYS_TO_KEEP = {
    "attribute": keep_attribute, "tuple": keep_tuple, "loss": keep_loss, "history": keep_history,
    "inside": keep_inside,
    "solution": keep_solution, "event": keep_event, "imex": keep_imex, "residual": keep_residual,
    **{
        f"slice, {name}": partial(keep_slice, **keywords)
        for name, keywords in {
            "rk4": {}, "dopri5": {"method": "dopri5"}, "cn": {"method": "cn"},
            "stages": {"checkpointing": pnode.Checkpointing(store="stages")},
            "repeated": {"checkpointing": 4 * 4 * 8}, "bdf": {"method": "bdf2"},
            "rosenbrock": {"method": "rodaspr"}, "esdirk": {"method": "es325"},
        }.items()
    },
}  # fmt: skip


def few():
    return torch.tensor([[0.3, -0.2]], dtype=D, requires_grad=True)


@pytest.mark.parametrize("way", WAYS_TO_KEEP)
@pytest.mark.parametrize("after", ["nothing", "backward"])
def test_module_that_keeps_results_is_freed(way, after):
    net = Keeper()
    for _ in range(2):
        loss = WAYS_TO_KEEP[way](net, few())
        if after == "backward":
            loss.backward()
        del loss
    alive = weakref.ref(net)
    del net
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("way", WAYS_TO_KEEP)
def test_gradients_of_a_module_that_is_gone(way):
    """Those of one that is still there, to the last bit; nothing done to it since matters."""

    def gradients(gone):
        net, y0 = Keeper(), few()
        WAYS_TO_KEEP[way](net, few())  # whose result is kept in the next
        loss = WAYS_TO_KEEP[way](net, y0)
        inputs = [y0, *net.parameters()]
        if gone:
            alive = weakref.ref(net)
            net.shift, net.scale = 7.0, torch.ones(2, dtype=D)
            net.eval()
            del net
            gc.collect()
            assert alive() is None
        found = torch.autograd.grad(loss, inputs, retain_graph=True)
        again = torch.autograd.grad(loss, inputs)
        assert all(map(torch.equal, found, again))
        return found

    assert all(map(torch.equal, gradients(False), gradients(True)))


def test_a_module_that_is_there_is_used_itself():
    """What is done to it before the gradient is taken is still told."""
    net = Keeper()
    loss = keep_slice(net, few(), checkpointing=pnode.Checkpointing(store="stages"))
    before = net.evaluations
    torch.autograd.grad(loss, list(net.parameters()), retain_graph=True)
    assert net.evaluations > before
    net.shift = 7.0
    with pytest.raises(pnode.BackwardError, match="not the one of the forward sweep"):
        loss.backward()


class Closing(Keeper):
    """With a finaliser, which is to run once."""

    closed = 0

    def __del__(self):
        Closing.closed += 1


@pytest.mark.parametrize("kind", ["finaliser", "closure", "slots", "script"])
def test_what_a_copy_might_not_stand_for_is_kept(kind):
    """The gradient is exact; the function lives as long as the graph."""
    if kind == "slots":
        net = type("Slotted", (Keeper,), {"__slots__": ("more",)})()
    else:
        net = Closing() if kind == "finaliser" else Keeper()
    f = partial(net) if kind == "closure" else net
    if kind == "script":
        layer = torch.nn.Sequential(torch.nn.Linear(2, 2, dtype=D), torch.nn.Tanh())
        scripted = torch.jit.script(layer)
        f = type("Calls", (torch.nn.Module,), {"forward": lambda self, t, y: self.inner(y)})()
        f.inner = scripted
    y0, parameters = few(), list(f.parameters() if kind == "script" else net.parameters())
    stages = pnode.Checkpointing(store="stages")
    loss = solve(f, y0, params=parameters, checkpointing=stages).ys.square().sum()
    expected = torch.autograd.grad(loss, [y0, *parameters], retain_graph=True)
    del net, f
    gc.collect()
    closed = Closing.closed
    found = torch.autograd.grad(loss, [y0, *parameters])
    assert all(map(torch.equal, found, expected))
    if kind == "finaliser":
        assert closed == 0
        del loss
        gc.collect()
        assert Closing.closed == 1


def test_work_vectors_of_an_explicit_solver():
    """Nothing stays of PETSc's own stages, which may lie in one block."""
    for size in (4, 2**17):  # the first time for what is made once
        y0 = torch.ones(size, dtype=torch.float64, requires_grad=True)
        gc.collect()
        before = growth.allocated()
        solve = pnode.Solver(
            lambda t, y: -y, method="rk4", step_size=0.5, compile=False,
            checkpointing=pnode.Checkpointing(store="stages"),
        )  # fmt: skip
        solve(y0, [0.0, 1.0]).ys[-1].sum().backward()
        y0.grad = None
        gc.collect()
        held = (growth.allocated() - before) / y0.nbytes
    # The solution, PETSc's copy of it at the start of a step, four slopes, two stages, and in the
    # adjoint one more; weights of what is noted of f's values are no vector.
    assert 8.9 < held < 9.5

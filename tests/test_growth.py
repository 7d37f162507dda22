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
import warnings
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
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name):
    """Saved tensors that are the graph's own outputs must not tie it to itself."""
    weights = torch.tensor([0.9, 0.1], dtype=D, requires_grad=True)
    solver = pnode.Solver(
        lambda t, y: weights[1] * ACTIVATIONS[name](weights[0] * y), params=[weights],
        method="rk4", step_size=0.2,
    )  # fmt: skip
    check(training(solver))

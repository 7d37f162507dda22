"""What a stage costs besides f, counted: no clock, so that no overhead creeps in unseen.

On the smallest problem worth training, where a microsecond counts. Counts are differences between
solves of 20 and of 10 steps, divided by the stages: what a solve costs once drops out.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pnode

STAGES = 6  # evaluations per step of dopri5


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(2, 50).double()
        self.outer = torch.nn.Linear(50, 2).double()

    def forward(self, t, y):
        return self.outer(torch.tanh(self.inner(y)))


class Operations(TorchDispatchMode):
    """Counts operations by name, and results in memory of their own."""

    def __init__(self):
        super().__init__()
        self.names = Counter()
        self.allocations = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names[function._schema.name.split("::")[1]] += 1
        results = result if isinstance(result, (tuple, list)) else [result]
        given = {x.untyped_storage().data_ptr() for x in tensors(args)}
        for tensor in tensors(results):
            self.allocations += tensor.untyped_storage().data_ptr() not in given
        return result


def tensors(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from tensors(value)


class Calls:
    """Counts calls of pnode's Python functions, in all threads."""

    def __init__(self):
        self.names = Counter()

    def __enter__(self):
        def profile(frame, event, argument):
            module, code = frame.f_globals.get("__name__", ""), frame.f_code
            # Comprehensions are functions in some versions of Python.
            if event == "call" and module.startswith("pnode") and not code.co_name[0] == "<":
                self.names[code.co_qualname] += 1

        threading.setprofile(profile)
        sys.setprofile(profile)
        return self

    def __exit__(self, *error):
        sys.setprofile(None)
        threading.setprofile(None)


def sweep(steps, store, counter, backward):
    """Count what the forward or the backward sweep does."""
    net = Net()
    y0 = torch.ones(20, 2, dtype=torch.float64, requires_grad=True)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    solver = pnode.Solver(
        net, method="dopri5", step_size=1.0 / steps, checkpointing=pnode.Checkpointing(store=store)
    )
    solver(y0, t).ys.sum().backward()  # sets up
    if backward:
        loss = solver(y0, t).ys.sum()
        with counter:
            loss.backward()
    else:
        with counter:
            solver(y0, t)
    return counter


def per_stage(kind, store, backward, count):
    few, many = (count(sweep(steps, store, kind(), backward)) for steps in (10, 20))
    return (many - few) / (10 * STAGES)


def of_field(graph):
    """Operations and allocations of f itself, or of its product, without pnode."""
    net, y = Net(), torch.ones(20, 2, dtype=torch.float64, requires_grad=True)
    with Operations() as forward:
        value = net(None, y)
    with Operations() as backward:
        torch.autograd.grad(value, (y, *net.parameters()), torch.ones_like(y))
    return backward if graph else forward


def total(operations):
    return sum(operations.names.values())


@pytest.mark.parametrize("store", ["stages", "auto"])
def test_torch_operations_and_allocations_of_a_forward_stage(store):
    """The stage is copied out of PETSc's vector, shaped, and f's result copied in."""
    extra = per_stage(Operations, store, False, total) - total(of_field(False))
    # clone, view, the time, detach, reshape, copy_, f's transposed weights; the value's projection
    # and its number, by which the backward sweep tells f; with graphs a shape without numbers.
    assert extra <= (10 if store == "stages" else 12)
    extra = per_stage(Operations, store, False, lambda o: o.allocations)
    extra -= of_field(False).allocations
    assert extra <= (3.5 if store == "stages" else 4.5)  # the stage, the time, the projection


def test_torch_operations_and_allocations_of_an_adjoint_stage():
    """A cotangent, f and its product, four parameters' sums, one row."""
    own = [of_field(False), of_field(True)]
    extra = per_stage(Operations, "stages", True, total) - sum(map(total, own))
    assert extra <= 14
    extra = per_stage(Operations, "auto", True, total) - total(own[1])
    assert extra <= 12
    extra = per_stage(Operations, "auto", True, lambda o: o.allocations) - own[1].allocations
    assert extra <= 1.5  # the cotangent; lambda once a step


@pytest.mark.parametrize(("store", "backward", "most"), [
    ("stages", False, 20), ("auto", False, 25), ("stages", True, 22), ("auto", True, 12),
])  # fmt: skip
def test_python_calls_per_stage(store, backward, most):
    """How often pnode's own functions are entered, those that serve a whole step included.

    Of these, two a step take down what the backward sweep tells f by.
    """
    found = per_stage(Calls, store, backward, lambda calls: sum(calls.names.values()))
    assert 1 < found <= most


def test_petsc_calls_back_once_per_stage_and_never_in_the_adjoint():
    def callbacks(calls):
        return sum(
            count for name, count in calls.names.items()
            if name.startswith(("Bridge.rhs_function", "JacobianShell", "ParameterJacobianShell"))
            or "jacobian" in name.lower()
        )  # fmt: skip

    assert per_stage(Calls, "stages", False, callbacks) == 1
    assert per_stage(Calls, "stages", True, callbacks) == 0
    assert per_stage(Calls, "auto", True, callbacks) == 0

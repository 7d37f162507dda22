"""Graphs kept from the forward sweep: the same bits, no second evaluation, within the budget."""

from __future__ import annotations

import pytest
import torch

import pnode
from pnode.adjoint.accounts import Account
from pnode.adjoint.store import CheckpointStore
from pnode.base.graphs import NODE_BYTES
from pnode.field.vectorfield import VectorField
from pnode.solvers.methods import Method, find_method

STATE = 8 * 40


class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(8, 32).double()
        self.outer = torch.nn.Linear(32, 8).double()

    def forward(self, t, y):
        return self.outer(torch.tanh(self.inner(y))) * (1 + 0.1 * torch.cos(t))


def solve(checkpointing, **keywords):
    field = Field()
    y0 = torch.linspace(-1, 1, 40, dtype=torch.float64).view(5, 8).requires_grad_()
    t = torch.tensor([0.0, 0.4, 1.0], dtype=torch.float64, requires_grad=True)
    keywords = {"method": "dopri5", "step_size": 0.05} | keywords
    solution = pnode.Solver(field, checkpointing=checkpointing, **keywords)(y0, t)
    solution.ys.square().sum().backward()
    return [y0.grad, t.grad, *(p.grad for p in field.parameters())], solution.stats


@pytest.mark.parametrize("method", ["rk4", "dopri5", "bosh3", "euler"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_same_gradient_and_nothing_is_evaluated_again(method, adaptive):
    if adaptive and method in ("rk4", "euler"):
        method = "fehlberg5"
    keywords = {"method": method}
    if adaptive:
        keywords |= {"step_size": None, "rtol": 1e-7, "first_step": 0.5}
    plain, stats = solve(pnode.Checkpointing(store="stages"), **keywords)
    taped, tape = solve(pnode.Checkpointing(store="tape"), **keywords)
    assert tape.rejected == stats.rejected
    assert adaptive == (stats.rejected > 0)
    for one, two in zip(plain, taped, strict=True):
        if adaptive:  # PETSc's time of an end and the next start's may differ in the last bit
            torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-15)
        else:
            assert torch.equal(one, two)
    assert tape.rhs == stats.rhs
    # The derivatives with respect to the three times evaluate f once each.
    assert tape.backward.rhs == 3
    assert stats.backward.rhs > 3
    assert tape.backward.vjp == stats.backward.vjp


def test_bytes_are_those_of_what_the_graphs_save():
    _, stats = solve(pnode.Checkpointing(store="stages"), method="rk4")
    _, tape = solve(pnode.Checkpointing(store="tape"), method="rk4")
    # Per evaluation: the nodes; tanh's output, which the product with the outer weights saves too,
    # and the factor. Not the result, which nothing needs; nor the state, which is the stage of the
    # checkpoint, even if f was given a copy of it at the first evaluation, which is measured.
    extra = tape.tape_bytes / (20 * 4)
    assert tape.ram_bytes == stats.ram_bytes
    assert extra == 12 * NODE_BYTES + 5 * 32 * 8 + 8


@pytest.fixture
def peak(monkeypatch):
    """Return what checkpoints and graphs held together at most, in all solves so far."""
    held = [0]

    def watch(owner, name):
        method = getattr(owner, name)

        def watched(self, *arguments):
            result = method(self, *arguments)
            account = getattr(self, "_ram", self)
            held[0] = max(held[0], account.bytes + account.graphs.bytes)
            return result

        monkeypatch.setattr(owner, name, watched)

    watch(Account, "count")
    watch(CheckpointStore, "keep_graphs")
    return held


@pytest.mark.parametrize("store", ["auto", "tape"])
@pytest.mark.parametrize("states", [7, 20, 60, 120, 200, 400, 800])
def test_budget_holds_with_the_same_bits(states, store, peak, monkeypatch):
    """Tapes take what the schedule leaves; where it repeats steps, the bits are those of that."""
    memory = states * STATE
    with monkeypatch.context() as patch:
        patch.setattr(Method, "keeps_graphs", False)
        plain, stats = solve(pnode.Checkpointing(memory=memory), method="rk4")
    taped, tape = solve(pnode.Checkpointing(memory=memory, store=store), method="rk4")
    assert all(map(torch.equal, plain, taped))
    assert 0 < peak[0] <= memory
    assert stats.tape_bytes == 0
    assert (tape.ram_bytes, tape.backward.ram_bytes) == (stats.ram_bytes, stats.backward.ram_bytes)
    assert tape.backward.recomputed == stats.backward.recomputed
    assert tape.backward.rhs <= stats.backward.rhs
    if states == 400:  # stages of all steps, and some graphs
        assert 3 < tape.backward.rhs < stats.backward.rhs
    everything, _ = solve(pnode.Checkpointing(store="stages"), method="rk4")
    assert all(map(torch.equal, everything, taped))


@pytest.mark.parametrize("method", ["rk4", "dopri5", "ssprk43"])
@pytest.mark.parametrize("steps", [0, 1, 3, 19, 20, 40])
def test_graphs_of_the_last_steps_only(method, steps, monkeypatch):
    """Without a limit graphs of so many bytes are kept, and hardly more are made."""
    _, everything = solve(None, method=method)
    assert everything.backward.rhs == 3  # for the times
    size = everything.tape_bytes // 20
    monkeypatch.setattr("pnode.problems.checkpointing.DEFAULT_GRAPHS", max(1, steps * size))
    made = []
    linearize = VectorField.linearize

    def counted(*arguments, **keywords):
        made.append(1)
        return linearize(*arguments, **keywords)

    monkeypatch.setattr(VectorField, "linearize", counted)
    gradient, stats = solve(None, method=method)
    kept = min(steps, 20)
    used = find_method(method).stages - find_method(method).fsal
    assert stats.tape_bytes == kept * size
    assert stats.backward.rhs == (20 - kept) * used + 3
    forward = len(made) - (20 - kept) * used
    assert kept * used <= forward <= min(20, kept + 2) * used + 1
    plain, _ = solve(pnode.Checkpointing(store="stages"), method=method)
    assert all(map(torch.equal, gradient, plain))


def test_unknown_number_of_steps_within_a_budget(peak, monkeypatch):
    keywords = {"step_size": None, "rtol": 1e-10}
    plain, _ = solve(None, **keywords)
    taped, tape = solve(pnode.Checkpointing(memory=150 * STATE, store="tape"), **keywords)
    assert tape.ram_bytes <= 150 * STATE
    for one, two in zip(plain, taped, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-15)


def test_second_backward_and_graph_of_a_tuple():
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def field(t, y):
        q, p = y
        return p * weight, -torch.sin(q)

    y0 = (torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    solver = pnode.Solver(
        field, params=[weight], method="rk4", step_size=0.1, checkpointing=pnode.Checkpointing(
            store="tape"
        ),
    )  # fmt: skip
    q, _ = solver(y0, torch.tensor([0.0, 1.0])).ys
    loss = q[-1].sum()
    first = torch.autograd.grad(loss, weight, retain_graph=True)[0]
    second = torch.autograd.grad(loss, weight)[0]
    assert torch.equal(first, second)


def test_a_parameter_changed_in_between_is_an_error():
    field = Field()
    y0 = torch.ones(5, 8, dtype=torch.float64)
    solver = pnode.Solver(
        field, method="rk4", step_size=0.1, checkpointing=pnode.Checkpointing(store="tape")
    )
    loss = solver(y0, torch.tensor([0.0, 1.0])).ys[-1].sum()
    with torch.no_grad():
        field.inner.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_methods_without_tape_say_so():
    with pytest.raises(pnode.ConfigurationError, match=r"store=.tape.*cn"):
        solve(pnode.Checkpointing(store="tape"), method="cn")


def test_a_solve_inside_the_field_counts_with_its_checkpoints():
    inner = pnode.Solver(lambda t, y: -y.sin(), method="rk4", step_size=0.1)
    kept = []

    def field(t, y):
        solution = inner(y, torch.tensor([0.0, 1.0]))
        kept.append(solution.stats.ram_bytes + solution.stats.tape_bytes)
        return solution.ys[-1] - y

    y0 = torch.ones(7, dtype=torch.float64, requires_grad=True)
    solution = pnode.Solver(field, method="rk4", step_size=0.25)(y0, torch.tensor([0.0, 1.0]))
    assert len(kept) == 16
    assert kept[0] >= 10 * 4 * 7 * 8
    assert solution.stats.tape_bytes >= sum(kept)
    solution.ys[-1].sum().backward()
    assert solution.stats.backward.rhs == 0

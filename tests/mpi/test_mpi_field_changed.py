"""A field that changes on one rank, or on all, is the same error on all."""

from __future__ import annotations

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode.errors import FieldChanged

D = torch.float64
TIMES = torch.tensor([0.0, 1.0], dtype=D)
CASES = (
    ("rk4", {"step_size": 0.1, "checkpointing": pnode.Checkpointing(store="stages")}),
    ("rk4", {"step_size": 0.1, "checkpointing": 600}), ("cn", {"step_size": 0.1}),
    ("es325", {}), ("bdf", {}), ("rodaspr", {}),
)  # fmt: skip


@pytest.mark.mpi
@pytest.mark.parametrize(("name", "keywords"), CASES)
def test_a_field_that_changes_is_the_same_error_on_all(name, keywords):
    seen, a = {"u": 2.0}, torch.tensor(1.0, dtype=D, requires_grad=True)

    def field(t, y, seen=seen, a=a):
        return -a * seen["u"] * y

    solver = pnode.Solver(field, params=[a], method=name, comm=comm, **keywords)

    def loss(solver=solver):
        return solver(torch.ones(3 + comm.rank, dtype=D), TIMES).ys[-1].sum()

    (expected,) = torch.autograd.grad(loss(), a)
    for everybody in (True, False):
        value = loss()
        if everybody or comm.rank == comm.size - 1:
            seen["u"] = 3.0
        try:
            torch.autograd.grad(value, a)
            found = None
        except pnode.PnodeError as error:
            found = error
        seen["u"] = 2.0
        checks.true(isinstance(found, FieldChanged), name, everybody, repr(found))
        checks.true(len(set(comm.allgather(str(found)))) == 1, name, "messages differ", found)
        (again,) = torch.autograd.grad(loss(), a)
        checks.true(torch.equal(again, expected), name, "works again", again, expected)

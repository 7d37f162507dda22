"""Compiled solvers of states that the ranks share, and what they give if nothing fails."""

from __future__ import annotations

from typing import Any

import torch
from ranks import checks, comm

import pnode
from pnode.parallel import total

D = torch.float64
BAD = comm.size - 1


class Trial:
    """A solver of machine code; a state below zero leaves the domain of f.

    Whole sweeps, but where cells have ghosts and a Jacobian is assembled.

    Attributes
    ----------
    field : Module
        f, with parameters ``w``.
    shared : dict
        Who shares the state: ``comm`` or ``layout``.
    """

    field: Any
    shared: dict[str, Any]

    def __init__(self, **options: Any) -> None:
        self.solver = pnode.Solver(self.field, compile=True, **self.shared, **options)
        self.good = self.gradient()
        whole = "layout" not in self.shared or "jacobian" not in options
        self.made = "'whole sweeps'" if whole else "'the vector field'"
        checks.true(self.made in repr(self.solver), self.solver)

    def start(self, lowest: float = 1.0) -> torch.Tensor:
        """This rank's part of y0, whose lowest entry is on the last one."""
        raise NotImplementedError

    def solve(self, lowest: float = 1.0, end: float = 0.5) -> pnode.Solution:
        """Solve."""
        return self.solver(self.start(lowest), torch.tensor([0.0, 0.5 * end, end], dtype=D))

    def gradient(self, **options: Any) -> torch.Tensor:
        """The derivative of a loss of all entries."""
        loss = total(self.solve(**options).ys[-1].square().sum(), comm)
        (gradient,) = torch.autograd.grad(loss, self.field.w)
        return gradient

    def expect(self, kind: type, text: str, found: BaseException | None, *what: Any) -> None:
        """Check an error, and that the solver works as before."""
        checks.true(type(found) is kind and text in str(found), *what, repr(found))
        checks.true(len(set(comm.allgather(self.solver.method))) == 1, *what)
        checks.true(torch.equal(self.gradient(), self.good), *what, "works again")

    def sweeps_again(self, y0: torch.Tensor, t: torch.Tensor, **options: Any) -> None:
        """Check two backward sweeps of a loss of one rank, beside steps taken from Python."""
        plain = pnode.Solver(self.field, compile=False, **self.shared, **options)
        y0.requires_grad_()
        found = []
        for solver in (self.solver, plain):
            solution = solver(y0, t)
            loss = total(solution.ys[-1].square().sum() * (comm.rank == BAD), comm)
            inputs = (self.field.w, y0)
            first = torch.autograd.grad(loss, inputs, retain_graph=True)
            second = torch.autograd.grad(loss, inputs)
            checks.true(all(map(torch.equal, first, second)), options, first, second)
            found.append((solution, *first))
        (one, *gradients), (other, *expected) = found
        counts = [(s.stats.steps, s.stats.rejected) for s in (one, other)]
        checks.true(counts[0] == counts[1], options, *counts)
        refused = "rtol" in options and options["method"] not in ("bdf", "radau5")
        checks.true(not refused or counts[0][1] > 0, options, *counts)
        for a, b in zip((one.ys, *gradients), (other.ys, *expected), strict=True):
            # The root at 0.01 and below makes round-off in y a hundred times as large in f.
            checks.true(torch.allclose(a, b, rtol=1e-11, atol=1e-13), options, a, b)


def caught(function: Any, *arguments: Any, **options: Any) -> BaseException | None:
    """What a call raises."""
    try:
        function(*arguments, **options)
    except BaseException as error:
        return error
    return None

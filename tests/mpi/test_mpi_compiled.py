"""Whole sweeps of machine code, of a batch that the ranks share."""

from __future__ import annotations

import signal
import warnings
from tempfile import gettempdir
from typing import Any

import pytest
import torch
from distributed import SELF, difference, results
from ranks import checks, comm
from trials import BAD, D, Trial, caught

import pnode
from pnode import errors
from pnode.parallel import total
from pnode.solvers.compiled import account

pytestmark = pytest.mark.mpi
EXACT = 1e-13  # sums over entries in another order
FIXED: dict[str, Any] = {"method": "rk4", "step_size": 0.03}
ADAPTIVE: dict[str, Any] = {"method": "dopri5", "rtol": 1e-7}
IMPLICIT: dict[str, Any] = {"method": "rodaspr", "rtol": 1e-6}
LIMITED: dict[str, Any] = ADAPTIVE | {"checkpointing": pnode.Checkpointing(memory=1200)}
SPARSE: dict[str, Any] = {"jacobian": "sparse"}
# Newton's method to round-off.
TIGHT: dict[str, Any] = {"petsc_options": {"snes_rtol": 1e-13, "snes_stol": 1e-15}}
NEWTON: dict[str, Any] = {"method": "es325", "rtol": 1e-4} | TIGHT
STOL: dict[str, Any] = {"petsc_options": {"snes_stol": 1e-14}}
BDF: dict[str, Any] = {"method": "bdf", "rtol": 1e-3} | STOL
COUPLED: dict[str, Any] = {"method": "radau5", "rtol": 1e-5} | STOL
THETA: dict[str, Any] = {"method": "cn", "step_size": 0.03, "jacobian": "block"} | TIGHT


class Field(torch.nn.Module):
    """Samples that move on their own; those below zero leave the domain of f."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.8, 1.1], dtype=D))
        self.fault: BaseException | None = None
        self.factor, self.scale = 1.0, torch.ones((), dtype=D)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Fall, slower the lower."""
        if self.fault is not None:
            raise self.fault
        return -self.factor * self.scale * self.w[0] * torch.sqrt(y) - 0.1 * torch.sin(
            self.w[1] * y
        )


class Batch(Trial):
    """Samples."""

    def __init__(self, **options: Any) -> None:
        self.field, self.shared = Field(), {"comm": comm}
        super().__init__(**options)

    def start(self, lowest: float = 1.0) -> torch.Tensor:
        """Samples of this rank."""
        y0 = torch.linspace(2.0, 3.0, 2 + comm.rank, dtype=D)
        if comm.rank == BAD:
            y0[0] = lowest
        return y0


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("rhs", FIXED), ("cost", ADAPTIVE), ("rhs", LIMITED), ("rhs", IMPLICIT),
        ("rhs", {"method": "ra34pw2", "step_size": 0.04} | SPARSE), ("cost", IMPLICIT),
        ("cost", NEWTON), ("cost", {"method": "bdf3", "step_size": 0.04} | STOL), ("rhs", THETA),
        ("rhs", {"method": "gauss4", "step_size": 0.05} | STOL),
    ],
)  # fmt: skip
def test_ranks_against_one(form: str, options: dict[str, Any]) -> None:
    """Outputs, steps and gradients are those of one rank, and of steps taken from Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, stats = results("batch", comm, form=form, compile=True, **options)
    for other, compiled in ((SELF, False), (comm, False)):
        expected, steps = results("batch", other if other is comm else None, form=form,
                                  compile=compiled, **options)  # fmt: skip
        off, what = difference(found, expected)
        checks.below(off, EXACT, form, options, what)
        checks.true((stats.steps, stats.rejected) == (steps.steps, steps.rejected), stats, steps)
    if options is LIMITED:  # the last one's ranks are the same, and so is what they keep
        repeated = stats.backward.recomputed, steps.backward.recomputed
        checks.true(repeated[0] == repeated[1] > 0, repeated)


@pytest.mark.parametrize(
    "options",
    [FIXED, ADAPTIVE | {"first_step": 1.0}, IMPLICIT | {"rtol": 1e-3},
     NEWTON | {"rtol": 1e-5, "first_step": 1.0}, BDF | {"first_step": 1.0}, THETA,
     COUPLED | {"first_step": 1.0}],
)  # fmt: skip
def test_sweeps_again(options: dict[str, Any]) -> None:
    """Attempts that leave the domain on one rank, second sweeps, and losses of some ranks alone."""
    t = torch.tensor([0.0, 0.2], dtype=D)
    y0 = torch.linspace(2.0, 3.0, 2 + comm.rank, dtype=D)
    if comm.rank == BAD and "rtol" in options:
        y0[0] = 0.01  # gone at 0.25, and in the first attempt
    Batch(**options).sweeps_again(y0, t, **options)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("options", [FIXED, ADAPTIVE, IMPLICIT, NEWTON, BDF, THETA, COUPLED])
def test_failures(options: dict[str, Any]) -> None:
    """What fails on one rank, before, in and after the sweep, is the same error on all."""
    trial = Batch(**options)
    where = f"rank {BAD}"

    error = caught(trial.solve, end=4.0)
    # Of theta and coupled methods Newton's residual tells it, which is one of all ranks.
    seen = "returned NaN" if options in (THETA, COUPLED) else where
    trial.expect(errors.NonFiniteVectorField, seen, error, options, "in the sweep")
    if comm.rank == BAD:
        trial.field.fault = ValueError("boom")
    error = caught(trial.solve)
    trial.field.fault = None
    trial.expect(errors.RankError, "boom", error, options, "before it")
    if comm.rank == BAD:
        trial.field.fault = KeyboardInterrupt()
    error = caught(trial.solve)
    trial.field.fault = None
    kind = KeyboardInterrupt if comm.rank == BAD else errors.RankError
    trial.expect(kind, "", error, options, "interrupted before it")

    loss = total(trial.solve().ys[-1].square().sum(), comm)
    if comm.rank == BAD:
        trial.field.scale += 1.0
    error = caught(torch.autograd.grad, loss, trial.field.w)
    trial.field.scale = torch.ones((), dtype=D)
    trial.expect(errors.FieldChanged, where, error, options, "after it")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("options", [{"method": "rk4", "step_size": 2e-6},
                                     {"method": "dopri5", "max_step": 2e-6},
                                     {"method": "bdf2", "step_size": 2e-6}])  # fmt: skip
@pytest.mark.parametrize("everybody", [False, True])
def test_interrupts(options: dict[str, Any], everybody: bool) -> None:
    """A signal on one rank ends the sweep of all, and so does one on each of them."""
    field = Field()
    solver = pnode.Solver(field, comm=comm, compile=True, **options)
    y0, here = torch.ones(2, dtype=D), everybody or comm.rank == BAD

    def solve(end: float) -> pnode.Solution:
        with torch.no_grad():
            return solver(y0, torch.tensor([0.0, end], dtype=D))

    good = solve(1e-4).ys
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    if here:
        signal.setitimer(signal.ITIMER_REAL, 0.5 + 0.2 * comm.rank)
    try:
        error = caught(solve, 1.9)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    kinds = (KeyboardInterrupt,) if here else (errors.RankError,)
    if everybody:  # who hears of it before its own signal does not get it any more
        kinds = (KeyboardInterrupt, errors.RankError)
    checks.true(isinstance(error, kinds), options, everybody, repr(error))
    checks.true(torch.equal(solve(1e-4).ys, good), options, "works again")


@pytest.mark.mpi(min_size=2)
def test_what_has_no_sweeps() -> None:
    """A monitor of one rank, checkpoints on a disk: the field alone, on all ranks, and right.

    So are Newton's methods that some ranks would have in other ways than others, for their size.
    """
    trial = Batch(**FIXED)
    seen: list[int] = []
    others = {
        "monitor": {
            "monitor": (lambda step, t, y: seen.append(step)) if comm.rank == BAD else None
        },
        "disk": {"checkpointing": pnode.Checkpointing(4000, gettempdir())},
    }
    for what, more in others.items():
        solver = pnode.Solver(trial.field, comm=comm, compile=True, **FIXED, **more)
        given, trial.solver = trial.solver, solver
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            gradient = trial.gradient()
        trial.solver = given
        checks.true("'the vector field'" in repr(solver), what, solver)
        off = float((gradient - trial.good).norm() / trial.good.norm())
        checks.below(off, EXACT, what)
    checks.true(bool(seen) == (comm.rank == BAD), "monitor", seen)


@pytest.mark.mpi(min_size=2)
def test_a_field_that_changes_on_one_rank() -> None:
    """A number that differs is traced anew where it does, and the others go on."""
    trial = Batch(**FIXED)
    trial.field.factor = 1.5 if comm.rank == BAD else 1.0
    found = trial.gradient()
    plain = pnode.Solver(trial.field, comm=comm, compile=False, **FIXED)
    trial.solver, given = plain, trial.solver
    expected = trial.gradient()
    trial.solver, trial.field.factor = given, 1.0
    checks.below(float((found - expected).norm() / expected.norm()), EXACT)
    checks.true(torch.equal(trial.gradient(), trial.good), "as before")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("options", [FIXED, IMPLICIT])
def test_auto(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    """All ranks compile in the same solve, whatever their parts, products and failures."""
    monkeypatch.setattr(account, "_LOOK", 100)
    monkeypatch.setattr(account, "_PRICE", 4000)
    field = Field()
    solver = pnode.Solver(field, comm=comm, **options)
    made = []
    for number in range(12):
        y0 = torch.linspace(2.0, 3.0, 2 + comm.rank, dtype=D)
        ys = solver(y0, torch.tensor([0.0, 0.3], dtype=D)).ys[-1]
        loss = total(ys.square().sum() * (comm.rank == number % comm.size), comm)
        torch.autograd.grad(loss, field.w)
        made.append("'whole sweeps'" in repr(solver))
    checks.true(not made[1] and made[-1], made)
    checks.true(len(set(comm.allgather(made.index(True)))) == 1, made)

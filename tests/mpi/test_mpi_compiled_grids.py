"""Whole sweeps of machine code, of states with ghost cells."""

from __future__ import annotations

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
from pnode.adjoint import numbered
from pnode.parallel import Grid, total
from pnode.solvers.compiled import account, driver

pytestmark = pytest.mark.mpi
EXACT = 1e-13  # sums in another order
FIXED: dict[str, Any] = {"method": "rk4", "step_size": 0.03}
FSAL: dict[str, Any] = {"method": "bosh3", "step_size": 0.05}
ADAPTIVE: dict[str, Any] = {"method": "dopri5", "rtol": 1e-7}
# Of the ring's cells 18 states, or 15 with an integral.
MEMORY = 18 * 8 * -(-13 // comm.size)
LIMIT: dict[str, Any] = {"checkpointing": pnode.Checkpointing(memory=MEMORY)}
FRESH: dict[str, Any] = {"checkpointing": pnode.Checkpointing(memory=MEMORY, reproducible=True)}
OTHER: dict[str, Any] = {"method": "heun3", "step_size": 0.04}
IMPLICIT: dict[str, Any] = {"method": "es325", "rtol": 1e-5}
SPARSE: dict[str, Any] = {"jacobian": "sparse"}
CN: dict[str, Any] = {"method": "cn", "step_size": 0.05}
BDF: dict[str, Any] = {"method": "bdf", "rtol": 1e-5}
BLOCK: dict[str, Any] = {"jacobian": "block", "rtol": 1e-5}
SHARED = pytest.mark.mpi(min_size=2)  # one process by itself has whole sweeps


class Field(torch.nn.Module):
    """Cells that fall, and are moved by their neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.tensor([0.8, 0.1], dtype=D))
        self.fault: BaseException | None = None
        self.scale = torch.ones((), dtype=D)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """Cells below zero leave the domain of f."""
        if self.fault is not None:
            raise self.fault
        here = u[1:-1]
        moved = self.w[1] * (u[2:] - 2.0 * here + u[:-2])
        return -self.scale * self.w[0] * torch.sqrt(here) + moved * torch.cos(t)


class Cells(Trial):
    """Cells with ghost cells."""

    def __init__(self, **options: Any) -> None:
        self.field, self.grid = Field(), Grid((4 * comm.size + 1,), comm=comm)
        self.shared = {"layout": self.grid}
        super().__init__(**options)

    def start(self, lowest: float = 1.0) -> torch.Tensor:
        """Cells of this rank."""
        y0 = torch.linspace(2.0, 3.0, self.grid.size, dtype=D)
        if comm.rank == BAD:
            y0[-1] = lowest
        return y0


@pytest.mark.parametrize(
    ("name", "form", "options"),
    [
        ("ring", "rhs", FIXED), ("ring", "cost", ADAPTIVE), ("plane", "rhs", FSAL),
        ("plane", "rhs", ADAPTIVE), ("graph", "rhs", OTHER), ("ring", "cost", FSAL),
        ("ring", "rhs", FIXED | LIMIT), ("ring", "rhs", ADAPTIVE | LIMIT),
        ("ring", "cost", FSAL | FRESH),
    ],
)  # fmt: skip
def test_ranks_against_one(name: str, form: str, options: dict[str, Any]) -> None:
    """Outputs, steps and gradients are those of a field without ghost cells, and of Python's."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, stats = results(name, comm, form=form, compile=True, **options)
    for other, compiled in ((SELF, False), (comm, False)):
        expected, steps = results(name, None if other is SELF else comm, form=form,
                                  compile=compiled, **options)  # fmt: skip
        off, what = difference(found, expected)
        checks.below(off, EXACT, name, form, options, what)
        checks.true((stats.steps, stats.rejected) == (steps.steps, steps.rejected), stats, steps)
    repeated = stats.backward.recomputed, steps.backward.recomputed
    checks.true(repeated[0] == repeated[1], options, repeated)
    held = stats.ram_bytes, steps.ram_bytes
    if "checkpointing" in options:
        checks.true(repeated[0] > 0 and held[0] == held[1] <= MEMORY, options, repeated, held)


@pytest.mark.parametrize(
    ("name", "form", "options"),
    [
        ("ring", "mass", {"method": "bdf", "rtol": 1e-5} | SPARSE),
        ("plane", "rhs", IMPLICIT | {"jacobian": "matrix-free", "preconditioner": "sparse"}),
        ("plane", "rhs", CN | SPARSE),
        ("plane", "rhs", FSAL | {"dense": True}),
        ("graph", "rhs", {"method": "radau5", "rtol": 1e-5}),
        pytest.param("batch", "imex", BLOCK | {"method": "ark3"}, marks=SHARED),
        pytest.param("batch", "rhs", IMPLICIT | {"dense": True}, marks=SHARED),
    ],
)
def test_the_field_alone(name: str, form: str, options: dict[str, Any]) -> None:
    """Outputs, work and gradients are those of f itself, where sweeps are not compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # as there is where nothing is compiled
        found, stats = results(name, comm, form=form, compile=True, **options)
    expected, plain = results(name, comm, form=form, compile=False, **options)
    off, what = difference(found, expected)
    checks.below(off, 1e-11, name, form, options, what)  # round-off, in what Newton's method leaves
    for own in ("steps", "rejected", "newton", "krylov"):
        checks.true(getattr(stats, own) == getattr(plain, own), own, stats, plain)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plane", CN), ("graph", IMPLICIT), ("ring", BDF), ("ring", BDF | {"method": "sdirk2"}),
        ("ring", {"form": "imex", "method": "ark3", "rtol": 1e-5}),
        ("ring", CN | LIMIT | {"step_size": 0.01}), ("ring", IMPLICIT | FRESH),
        ("ring", CN | LIMIT | {"step_size": 0.02, "form": "cost"}),
        ("ring", BDF | {"form": "cost"}),
    ],
)  # fmt: skip
def test_implicit_sweeps(name: str, options: dict[str, Any]) -> None:
    """Outputs, work and gradients are those of Python's steps, and of one process."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, stats = results(name, comm, compile=True, **options)
    expected, plain = results(name, comm, compile=False, **options)
    off, what = difference(found, expected)
    checks.below(off, 1e-12, name, options, what)  # round-off, some tens of iterations on
    same = ["steps", "rejected", "newton"]
    if options.get("form") != "cost":  # beside which Python's steps count systems of both
        same += ["krylov", "jacobians", "factorizations"]
    for own in same:
        for one, other in ((stats, plain), (stats.backward, plain.backward)):
            checks.true(getattr(one, own) == getattr(other, own), own, one, other)
    repeated = stats.backward.recomputed, plain.backward.recomputed
    checks.true(repeated[0] == repeated[1], options, repeated)
    if "checkpointing" in options:
        checks.true(repeated[0] > 0 and stats.ram_bytes <= MEMORY, options, repeated, stats)
    expected, steps = results(name, SELF, compile=True, **options)
    off, what = difference(found, expected)
    checks.below(off, 1e-12, name, options, what)
    checks.true((stats.steps, stats.rejected) == (steps.steps, steps.rejected), stats, steps)


def test_long_krylov_bases_stay_orthogonal() -> None:
    """Transposed systems of some 50 iterations take as many as PETSc's GMRES needs."""
    cells = 240
    grid = Grid((cells,), comm=comm)
    p = torch.tensor(200.0, dtype=D, requires_grad=True)
    rough = torch.linspace(0.0, 400.0, cells, dtype=D).sin()[grid.owned]

    def diffusion(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return p * (u[2:] - 2.0 * u[1:-1] + u[:-2]) - u[1:-1] ** 3

    found = []
    for compile_ in (True, False):
        solver = pnode.Solver(
            diffusion, params=[p], layout=grid, method="cn", step_size=0.1, compile=compile_
        )
        y0 = (1.0 + 0.5 * rough).requires_grad_()
        solution = solver(y0, [0.0, 0.2])
        loss = total((solution.ys[-1] * rough).sum(), comm)
        gradients = torch.autograd.grad(loss, (y0, p))
        found.append((solution.stats.backward.krylov, gradients))
    (mine, one), (petsc, other) = found
    checks.true(petsc > 2 * 25, petsc)
    checks.true(abs(mine - petsc) <= 2, mine, petsc)
    for a, b in zip(one, other, strict=True):
        checks.below(float((a - b).abs().max() / b.abs().max()), 1e-9)  # systems to 1e-12


def test_parameters_of_one_rank() -> None:
    """A parameter that f reads on one rank alone, such as one of a boundary, has its gradient."""
    grid = Grid((2 * comm.size + 1,), comm=comm)
    p = torch.tensor(0.7, dtype=D, requires_grad=True)
    y0 = torch.linspace(1.0, 2.0, grid.size, dtype=D)

    def decay(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return -p * u[1:-1] ** 2 if comm.rank == BAD else -u[1:-1]

    def diffusion(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return 5.0 * (u[2:] - 2.0 * u[1:-1] + u[:-2]) + torch.cos(t) * decay(t, u)

    found = []
    for compile_ in (True, False):
        solver = pnode.Solver(
            implicit=diffusion, explicit=decay, params=[p], layout=grid, method="ark3",
            step_size=0.1, compile=compile_,
        )  # fmt: skip
        loss = total(solver(y0, torch.tensor([0.0, 0.2], dtype=D)).ys[-1].square().sum(), comm)
        found += torch.autograd.grad(loss, p)
        checks.true(("'whole sweeps'" in repr(solver)) == compile_, solver)
    checks.true(torch.allclose(*found, rtol=1e-12, atol=0.0), found)


@pytest.mark.parametrize("options", [FSAL, ADAPTIVE | {"first_step": 1.0}, CN, BDF])
def test_sweeps_again(options: dict[str, Any]) -> None:
    """Attempts that leave the domain on one rank, second sweeps, and losses of some ranks alone."""
    trial, adaptive = Cells(**options), "first_step" in options
    y0 = trial.start(0.01 if adaptive else 1.0)  # in the adaptive case gone in the first attempt
    trial.sweeps_again(y0, torch.tensor([0.0, 0.1, 0.2], dtype=D), **options)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("options", [FIXED, ADAPTIVE, IMPLICIT, CN, BDF, IMPLICIT | SPARSE])
def test_failures(options: dict[str, Any]) -> None:
    """What fails on one rank, before, in and after the sweep, is the same error on all."""
    trial = Cells(**options)
    where = f"rank {BAD}"
    error = caught(trial.solve, lowest=0.2, end=4.0)
    trial.expect(errors.NonFiniteVectorField, where, error, options, "in the sweep")
    for fault in (ValueError("boom"), KeyboardInterrupt()):
        trial.field.fault = fault if comm.rank == BAD else None
        error = caught(trial.solve)
        trial.field.fault = None
        interrupted = isinstance(fault, KeyboardInterrupt) and comm.rank == BAD
        kind = KeyboardInterrupt if interrupted else errors.RankError
        trial.expect(kind, str(fault), error, options, "before it")
    loss = total(trial.solve().ys[-1].square().sum(), comm)
    if comm.rank == BAD:
        trial.field.scale += 1.0
    error = caught(torch.autograd.grad, loss, trial.field.w)
    trial.field.scale = torch.ones((), dtype=D)
    trial.expect(errors.FieldChanged, where, error, options, "after it")


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("options", [FIXED, ADAPTIVE | LIMIT, CN, IMPLICIT | LIMIT])
@pytest.mark.parametrize("when", ["forwards", "backwards", "again", "at the end", "ordering"])
def test_interrupts(options: dict[str, Any], when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One between two steps of one rank ends the sweep of all.

    "again": repeated steps; "ordering": while Python works out what the next steps keep.
    """
    trial = Cells(**(options | LIMIT if when == "ordering" else options))
    calls, goes_on, extend = [], driver.CompiledSweep._goes_on, numbered._extend
    loss = total(trial.solve().ys[-1].square().sum(), comm)
    if when == "again":
        torch.autograd.grad(loss, trial.field.w, retain_graph=True)

    def interrupted(self: Any, status: int) -> bool:
        calls.append(status)
        if comm.rank == BAD and (status == 0 if when == "at the end" else len(calls) == 3):
            raise KeyboardInterrupt
        return goes_on(self, status)

    def interrupted_extend(*given: Any) -> None:
        calls.append(0)
        if comm.rank == BAD and len(calls) == 9:
            raise KeyboardInterrupt
        extend(*given)

    with monkeypatch.context() as patched:
        patched.setattr(driver, "PATIENCE", 0.0)  # a call is a step
        if when == "ordering":
            patched.setattr(numbered, "_FIRST", 2)
            patched.setattr(numbered, "_extend", interrupted_extend)
        else:
            patched.setattr(driver.CompiledSweep, "_goes_on", interrupted)
        if when in ("forwards", "ordering"):
            error = caught(trial.solve)
        else:
            error = caught(torch.autograd.grad, loss, trial.field.w, retain_graph=True)
    kind = KeyboardInterrupt if comm.rank == BAD else errors.RankError
    trial.expect(kind, "", error, options, when)
    (gradient,) = torch.autograd.grad(loss, trial.field.w)
    checks.true(torch.equal(gradient, trial.good), options, when, "the same graph again")


class Halved(Grid):
    """Cells that are more than copies of owned ones."""

    def _gather(self, owned: torch.Tensor) -> torch.Tensor:
        return 0.5 * super()._gather(owned)

    def _scatter(self, ghosted: torch.Tensor) -> torch.Tensor:
        return 0.5 * super()._scatter(ghosted)


def test_why_sweeps_stay_uncompiled() -> None:
    """Disks, float32, other exchanges: with a compiled field; Rosenbrock methods without."""
    trial = Cells(**FIXED)
    for more, kind, why in (
        ({"checkpointing": pnode.Checkpointing(4000, gettempdir())}, D, "only whole sweeps are"),
        ({}, torch.float32, "float64 only"),
        ({"layout": Halved((4 * comm.size + 1,), comm=comm)}, D, "more than to copy entries"),
        ({"method": "rodas3", "step_size": 0.05}, D, "products of Rosenbrock methods"),
    ):
        y0 = trial.start().to(kind)
        field = Field().to(kind)
        field.scale = field.scale.to(kind)
        found = []
        for compile_ in (True, False):
            given: dict[str, Any] = {**FIXED, "layout": trial.grid, **more}
            solver = pnode.Solver(field, compile=compile_, **given)
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                loss = total(solver(y0, torch.tensor([0.0, 0.3], dtype=D)).ys[-1].sum(), comm)
                found += torch.autograd.grad(loss, field.w)
            text = [str(one.message) for one in told if "compile=True" in str(one.message)]
            made = "'the vector field'" in repr(solver)
            checks.true(len(text) + made == compile_, more, *text, solver)
            checks.true(not compile_ or why in "".join(text) + repr(solver), more, *text, solver)
        close = torch.allclose(*found, rtol=EXACT if kind is D else 1e-5, atol=0.0)
        checks.true(close, more, *found)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("options", "price"), [(FIXED, 4000), (CN | {"step_size": 0.01}, 12000)]
)  # fmt: skip
def test_auto(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], price: int) -> None:
    """All ranks compile in the same solve, and go on with the same numbers."""
    monkeypatch.setattr(account, "_LOOK", 100)
    monkeypatch.setattr(account, "_PRICE", price)
    trial = Cells(**options)
    trial.solver = pnode.Solver(trial.field, layout=trial.grid, **options)
    made = []
    for _ in range(10):
        off = float((trial.gradient() - trial.good).norm() / trial.good.norm())
        checks.below(off, EXACT)
        made.append(trial.made in repr(trial.solver))
    checks.true(not made[1] and made[-1], made)
    checks.true(len(set(comm.allgather(made.index(True)))) == 1, made)

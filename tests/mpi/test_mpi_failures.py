"""What fails on one rank is the same error on all, and the solver goes on."""

from __future__ import annotations

import gc
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode import errors
from pnode.parallel import Grid, total

D = torch.float64
BAD = comm.size - 1


class Cancelled(BaseException):
    """As some libraries cancel what is under way."""


class Field:
    """Diffusion of cells or decay of samples, which fails on one rank when told to."""

    def __init__(self, mode: str) -> None:
        self.w = torch.tensor([0.8, 1.1, 0.5], dtype=D, requires_grad=True)
        self.ghosts = mode == "grid"
        self.fault = self.others = ""  # of the bad rank, and of the others
        self.everybody = False

    def __call__(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        own = u[1:-1] if self.ghosts else u
        here = comm.rank == BAD or self.everybody
        if self.others and comm.rank != BAD and 0.1 < t.item() < 0.2:
            own = own * torch.nan
        if self.fault and here and 0.1 < t.item() < 0.2:
            if self.fault == "raise":
                raise ValueError("boom")
            if self.fault in INTERRUPTS:
                raise INTERRUPTS[self.fault]
            if self.fault == "shape":
                return own[:-1]
            if self.fault == "nan":
                own = own * torch.nan
        if self.fault == "newton" and comm.rank == BAD and t.item() > 0.1:
            own = own + 1e4 * (1.0 + own**2)  # has no solution at the end of a step
        spread = u[2:] - 2.0 * own + u[:-2] if self.ghosts else -own
        return spread * self.w[0] + torch.tanh(self.w[1] * own) * self.w[2]


class Trial:
    """One solver, which is made to fail in several ways."""

    def __init__(self, mode: str, **options: Any) -> None:
        self.mode, self.options = mode, options
        self.field = Field(mode)
        self.monitor_fails = False
        if mode == "grid":
            grid = Grid((4 * comm.size + 1,), boundary="replicate", comm=comm)
            options["layout"], shape = grid, grid.shape
        else:
            options["comm"], shape = comm, (3 + comm.rank,)
        # Without graphs from the forward sweep f is evaluated, and can fail, on the way back.
        options.setdefault("checkpointing", pnode.Checkpointing(store="stages"))
        self.y0 = torch.linspace(0.1, 1.0, *shape, dtype=D)
        self.solver = pnode.Solver(
            self.field, params=[self.field.w], monitor=self.monitor, **options
        )
        self.good = self.gradient()

    def monitor(self, step: int, t: float, y: torch.Tensor) -> None:
        if self.field.fault == "monitor" and comm.rank == BAD and t > 0.1:
            raise KeyboardInterrupt
        if self.monitor_fails and comm.rank == BAD and t > 0.1:
            raise OSError("the disk of the user's monitor is full")

    def forward(self) -> torch.Tensor:
        solution = self.solver(self.y0, torch.tensor([0.0, 0.3], dtype=D))
        return total(solution.ys[-1].sum(), comm)

    def gradient(self, before_backward: Any = None) -> torch.Tensor:
        loss = self.forward()
        if before_backward is not None:
            before_backward()
        return torch.autograd.grad(loss, self.field.w)[0]

    def fails(
        self, what: str, attempt: Any, kinds: tuple[type, ...], where: bool = True,
        cause: type | None = None,
    ) -> None:  # fmt: skip
        """Expect the same error on all ranks; then the solver is to work as before."""
        name = (what, self.mode, self.options.get("method"), self.options.get("step_size"))
        try:
            attempt()
            found: BaseException | None = None
        except Exception as error:
            found = error
        self.field.fault, self.field.others, self.monitor_fails = "", "", False
        message = f"{type(found).__name__}: {found}"
        seen = comm.allgather(message)
        checks.true(len(set(seen)) == 1, *name, "messages differ:", *set(seen))
        checks.true(isinstance(found, kinds), *name, message)
        if where and isinstance(found, errors.SolveError):
            checks.true(found.rank == BAD and f"rank {BAD}" in message, *name, message)
            checks.true(found.step is not None and found.time is not None, *name, message)
            checks.true(found.method == self.solver.method, *name, message)
        if cause is not None and comm.rank == BAD:
            checks.true(isinstance(found.__cause__, cause), *name, repr(found.__cause__))
        again = self.gradient()
        close = bool(((again - self.good).abs() <= 1e-12 * self.good.abs()).all())
        checks.true(close, *name, "works again", again, self.good)

    def interrupted(self, fault: str, kind: type[BaseException], backward: bool = False) -> None:
        """Expect an interrupt on its own rank alone; then the solver is to work as before."""
        name = (fault, backward, self.mode, *self.options.items())
        found: BaseException | None = None
        try:
            if backward:
                self.gradient(lambda: setattr(self.field, "fault", fault))
            else:
                self.field.fault = fault
                self.forward()
        except BaseException as error:
            found = error
        here = comm.rank == BAD or (self.field.everybody and fault != "monitor")
        checks.true(type(found) is (kind if here else errors.RankError), *name, repr(found))
        if not here:
            checks.true(kind.__name__ in str(found), *name, found)
        self.field.fault, self.field.others, self.field.everybody = "", "", False
        again = self.gradient()
        close = bool(((again - self.good).abs() <= 1e-12 * self.good.abs()).all())
        checks.true(close, *name, "works again", again, self.good)

    def forward_fault(self, fault: str, *arguments: Any, **options: Any) -> None:
        """Fail in the forward sweep."""
        self.field.fault = fault
        self.fails(f"forward {fault}", self.forward, *arguments, **options)

    def backward_fault(self, fault: str, *arguments: Any, **options: Any) -> None:
        """Fail in the backward sweep."""

        def attempt() -> None:
            self.gradient(lambda: setattr(self.field, "fault", fault))

        self.fails(f"backward {fault}", attempt, *arguments, **options)


CHOICES = (
    {"method": "rk4", "step_size": 0.03},
    {"method": "dopri5", "rtol": 1e-4, "min_step": 1e-3},
    {"method": "cn", "step_size": 0.03},
    {"method": "es325", "rtol": 1e-3, "min_step": 1e-3},
    {"method": "rodaspr", "rtol": 1e-3, "min_step": 1e-3},
    {"method": "bdf", "rtol": 1e-3, "min_step": 1e-3},
    {"method": "bdf2", "step_size": 0.03},
    {"method": "ssprk43", "step_size": 0.03},
    {"method": "dopri5", "rtol": 1e-6, "dense": True},
)


def sweeps(mode: str, options: dict[str, Any]) -> None:
    """Every kind of failure, forward and backward."""
    trial = Trial(mode, **options)
    trial.forward_fault("raise", (errors.RankError,), cause=ValueError)
    trial.forward_fault("shape", (errors.VectorFieldError,))
    trial.forward_fault("nan", (errors.NonFiniteVectorField, errors.StepSizeUnderflow))
    trial.monitor_fails = True
    trial.fails("monitor", trial.forward, (errors.RankError,), cause=OSError)
    trial.backward_fault("raise", (errors.RankError,), cause=ValueError)
    trial.backward_fault("shape", (errors.VectorFieldError,))
    if options["method"] in ("cn", "es325", "bdf2"):
        kinds = (errors.NonlinearSolveFailed, errors.StepSizeUnderflow)
        kinds += (errors.NonFiniteVectorField,)  # iterates may overflow
        trial.forward_fault("newton", kinds, where=False)


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize(
    ("mode", "options"),
    [(mode, options) for mode in ("batch", "grid") for options in CHOICES
     if mode == "grid" or options["method"] in ("rk4", "bdf")],
)  # fmt: skip
def test_failures_on_one_of_two(mode: str, options: dict[str, Any]) -> None:
    sweeps(mode, options)


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize(
    ("mode", "options"),
    [("batch", CHOICES[1]), ("batch", CHOICES[8]), ("grid", CHOICES[0]), ("grid", CHOICES[2])],
)
def test_failures_on_one_of_three(mode: str, options: dict[str, Any]) -> None:
    sweeps(mode, options)


INTERRUPTS = {"interrupt": KeyboardInterrupt, "exit": SystemExit, "cancel": Cancelled}


STOPPED = (
    {"method": "dopri5", "step_size": 0.06},
    {"method": "dopri5", "rtol": 1e-3, "dense": True},
    {"method": "cn", "step_size": 0.06, "checkpointing": pnode.Checkpointing(memory=400)},
    {"method": "es325", "rtol": 1e-2, "jacobian": "matrix-free"},
    {"method": "rodaspr", "rtol": 1e-2},
    {"method": "bdf", "rtol": 1e-2},
    {"method": "bdf3", "step_size": 0.06},
)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("number", range(len(STOPPED)))
def test_interrupts(number: int) -> None:
    """An interrupt of f or the monitor stays one on its rank, and is an error on the others."""
    faults = list(INTERRUPTS.items())
    trial = Trial("grid" if comm.size == 2 else "batch", **STOPPED[number])
    trial.interrupted(*faults[number % 3])
    trial.interrupted("monitor", KeyboardInterrupt)
    trial.interrupted(*faults[(number + 1) % 3], backward=True)
    trial.field.everybody = number % 2 == 0
    trial.interrupted(*faults[(number + 2) % 3], backward=number % 4 < 2)


@pytest.mark.mpi(min_size=3)
@pytest.mark.parametrize(("method", "rtol"), [("dopri5", 1e-4), ("es325", 1e-3)])
def test_interrupts_before_other_failures(method: str, rtol: float) -> None:
    """An interrupt is not passed over for what fails on another rank in the same step."""
    trial = Trial("batch", method=method, rtol=rtol)
    trial.field.others = "nan"
    trial.interrupted("interrupt", KeyboardInterrupt)
    trial.field.others = "nan"
    trial.forward_fault("raise", (errors.RankError,), cause=ValueError)


@pytest.mark.mpi(min_size=2, max_size=2)
@pytest.mark.parametrize("method", ["rk4", "cn"])
def test_damaged_files(method: str, shared_folder: Path) -> None:
    """A file of checkpoints that is damaged, or gone, on one rank."""
    own = shared_folder / f"rank{comm.rank}"
    own.mkdir()
    limits = pnode.Checkpointing(memory=400, disk=own)
    trial = Trial("grid", method=method, step_size=0.01, checkpointing=limits)

    def damage() -> None:
        if comm.rank == BAD:
            files = [path for path in own.rglob("*") if path.is_file()]
            assert files
            for path in files:
                os.truncate(path, path.stat().st_size // 2)

    attempt = partial(trial.gradient, damage)
    trial.fails("damaged file", attempt, (errors.CheckpointError,))
    gc.collect()  # tracebacks of the error
    checks.true(not list(own.iterdir()), "files are left", method, *own.iterdir())


@pytest.mark.mpi(min_size=2)
def test_mismatches() -> None:
    """Arguments that differ between the ranks are named, with what each was given."""
    y0, t = torch.ones(3, dtype=D), torch.tensor([0.0, 0.1])
    w = torch.ones(3, dtype=D, requires_grad=True)
    bad = comm.rank == BAD

    def refused(text: str, **changes: Any) -> None:
        given = {"y0": y0, "t": t, "method": "rk4", "step_size": 0.05, "params": [w]}
        given |= changes if bad else {}
        y0_, t_ = given.pop("y0"), given.pop("t")
        grad = given.pop("grad", True)
        try:
            with torch.set_grad_enabled(grad):
                pnode.Solver(lambda t, y: -y * w[0].detach(), comm=comm, **given)(y0_, t_)
            message = "accepted"
        except errors.ConfigurationError as error:
            message = str(error)
        seen = comm.allgather(message)
        checks.true(len(set(seen)) == 1, "mismatch", text, *seen)
        checks.true(text in message and f"rank {BAD}" in message, "mismatch", text, message)

    refused("t differs", t=torch.tensor([0.0, 0.11]))
    refused("method differs", method="dopri5")
    refused("step_size differs", step_size=0.04)
    refused("the number of parameters differs", params=[w, w.detach().clone().requires_grad_()])
    refused("the shapes of the parameters", params=[torch.ones(4, dtype=D, requires_grad=True)])
    refused("the dtype of y0 differs", y0=y0.float())
    refused("(torch.no_grad) differs", grad=False, params=[])
    refused("requires_grad of y0", y0=y0.clone().requires_grad_())
    refused("contains NaN", y0=y0 * torch.nan)
    refused("rtol differs", rtol=1e-3)
    refused("checkpointing differs", checkpointing="1MiB")
    refused("dense differs", dense=True)
    refused("max_steps differs", max_steps=9)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("samples", ["joint", "independent"])
def test_the_end_of_a_step_with_an_output_inside(samples: str) -> None:
    """f that is not finite there, on one rank, is an error of all."""

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(t < 1.0, -y, (torch.nan if comm.rank == BAD else -1.0) * y)

    solver = pnode.Solver(
        field, method="midpoint", step_size=0.25, dense=True, samples=samples, comm=comm
    )
    message = ""
    try:
        solver(torch.ones(2, 1, dtype=D), torch.tensor([0.0, 0.6, 0.9, 1.0], dtype=D))
    except errors.NonFiniteVectorField as error:
        message = str(error)
    seen = comm.allgather(message)
    checks.true(all("lies in: end the solve before" in each for each in seen), samples, *seen)


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize(
    ("method", "step_size"),
    [("cn", 0.06), ("es122", 0.06), ("radau5", 0.06), ("radau5", None), ("rodaspr", None)],
)
@pytest.mark.parametrize("fault", ["value", "derivative"])
def test_a_rank_is_named(method: str, step_size: float | None, fault: str) -> None:
    """Where Newton's method has a matrix of each rank's own, too, and at the first step."""
    bad = comm.rank == BAD

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if bad and fault == "value":
            return -y * torch.nan
        return -y + 0.1 * (y * float(not bad)).sqrt()

    steps = {"step_size": step_size} if step_size else {"rtol": 1e-3, "min_step": 1e-3}
    solver = pnode.Solver(field, method=method, jacobian="dense", comm=comm, **steps)
    found: Exception | None = None
    try:
        solver(torch.ones(2, 1, dtype=D), torch.tensor([0.0, 0.3], dtype=D))
    except errors.NonFiniteVectorField as error:
        found = error
    rank = getattr(found, "rank", None)
    checks.true(len(set(comm.allgather(str(found)))) == 1 and rank == BAD, rank, found)
    checks.true((fault == "value") != isinstance(found, errors.NonFiniteDerivative), repr(found))

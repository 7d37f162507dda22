"""Independent samples on ranks: each rank's rows are what they are in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import joined
from ranks import checks, comm

import pnode
from pnode.base.options import PETSc, log_stage
from pnode.parallel import total

D = torch.float64
SAMPLES = 7
FIRST, LAST = (k * SAMPLES // comm.size for k in (comm.rank, comm.rank + 1))
MINE = slice(FIRST, LAST)
ALL = slice(0, SAMPLES)


def start() -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(SAMPLES, 2, generator=generator, dtype=D)


class Pendulum(torch.nn.Module):
    """With a damping, and a parameter that nothing depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.damping = torch.nn.Parameter(torch.tensor([0.3, 0.1], dtype=D))
        self.idle = torch.nn.Parameter(torch.tensor(1.0, dtype=D))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x, v = y[:, :1], y[:, 1:]
        return torch.cat([v, -4.0 * torch.sin(x) + torch.cos(t)], dim=1) - self.damping * y


def solved(rows: slice, ranks: Any, own_times: bool, **options: Any) -> dict[str, torch.Tensor]:
    """Outputs and gradients of some of the rows."""
    f, y0 = Pendulum(), start()[rows].requires_grad_()
    t = torch.tensor([0.0, 0.4, 1.5], dtype=D)
    if own_times:
        t = t * torch.linspace(0.5, 1.0, SAMPLES, dtype=D)[rows, None]
    t.requires_grad_()
    solution = pnode.Solver(f, samples="independent", comm=ranks, **options)(y0, t)
    loss = (solution.ys**2 * torch.tensor([1.0, -0.3], dtype=D)).sum()
    if solution.path is not None:
        loss = loss + (solution(0.3 * t[..., -1:] if own_times else 0.3 * t[-1]) ** 3).sum()
    if solution.costs is not None:
        loss = loss + (solution.costs**2).sum()
    if ranks is not None:
        loss = total(loss, ranks)
    loss.backward()
    assert f.idle.grad is None and t.grad is not None and f.damping.grad is not None
    steps = torch.tensor([float(solution.stats.steps), float(solution.stats.rejected)])
    return {
        "ys": solution.ys.detach(), "by_y0": y0.grad, "by_t": t.grad, "by_f": f.damping.grad,
        "steps": steps,
    }  # fmt: skip


CASES: list[dict[str, Any]] = [
    {"method": "dopri5"}, {"method": "rk4", "step_size": 0.05},
    {"method": "es325", "rtol": 1e-4}, {"method": "tsit5", "cost": lambda t, y: y.prod(dim=1)},
    {"method": "rodaspr", "checkpointing": 20_000},
    {"method": "verner7", "dense": True},
]  # fmt: skip


@pytest.mark.mpi(max_size=3)
@pytest.mark.parametrize("own_times", [False, True])
@pytest.mark.parametrize("options", CASES, ids=lambda case: case["method"])
def test_rows_are_those_of_one_process(options: dict[str, Any], own_times: bool) -> None:
    found, whole = solved(MINE, comm, own_times, **options), solved(ALL, None, own_times, **options)
    each = {"ys": whole["ys"][:, MINE], "by_y0": whole["by_y0"][MINE], "by_f": whole["by_f"]}
    each["by_t"] = whole["by_t"][MINE] if own_times else whole["by_t"]
    for name, expected in each.items():
        scale = 1.0 + float(expected.abs().max())
        checks.below(float((found[name] - expected).abs().max()) / scale, 1e-12, name)
    same = joined(comm, found["by_f"]).view(comm.size, -1)
    checks.true(bool((same == same[0]).all()), "gradients of parameters differ between ranks")
    steps = joined(comm, found["steps"]).view(comm.size, -1).sum(dim=0)
    checks.true(torch.equal(steps, whole["steps"]), "steps", steps, whole["steps"])


@pytest.mark.mpi(min_size=2, max_size=3)
def test_machine_code() -> None:
    """Rows of all ranks are those of one process, by the same program."""
    options: dict[str, Any] = {"method": "dopri5", "compile": True}
    found, whole = solved(MINE, comm, True, **options), solved(ALL, None, True, **options)
    checks.below(float((found["ys"] - whole["ys"][:, MINE]).abs().max()), 1e-12, "ys")
    checks.below(float((found["by_f"] - whole["by_f"]).abs().max()), 1e-11, "by_f")


def blow_up(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return y * y


@pytest.mark.mpi(min_size=2, max_size=3)
def test_a_row_that_fails_is_an_error_on_all_ranks() -> None:
    """By the row and the rank; with ``on_failure="nan"`` the others do not notice."""
    y0 = torch.full((2, 1), -1.0, dtype=D)
    if comm.rank == 1:
        y0[1] = 2.0
    y0.requires_grad_()
    t = torch.tensor([0.0, 1.0], dtype=D)
    solver = pnode.Solver(blow_up, samples="independent", comm=comm)
    try:
        solver(y0, t)
        checks.true(False, "nothing was raised")
    except pnode.SolveError as error:
        checks.true(error.rank == 1, "rank", error.rank)
        checks.true("row 1 of y0" in str(error), str(error))
    kept = pnode.Solver(blow_up, samples="independent", comm=comm, on_failure="nan")(y0, t)
    lost = kept.ys[-1].isnan().any(dim=1)
    checks.true(lost.tolist() == [False, comm.rank == 1], lost)
    (found,) = torch.autograd.grad(total(kept.ys[-1][~lost].sum(), comm), y0)
    checks.below(float((found[~lost] - 0.25).abs().max()), 1e-5, "gradient of the others")


@pytest.mark.mpi(min_size=2, max_size=3)
def test_what_fails_backwards_is_an_error_on_all_ranks() -> None:
    factor = [1.0]
    y0 = torch.ones(2, 1, dtype=D, requires_grad=True)
    rate = torch.tensor(1.0, dtype=D, requires_grad=True)
    solver = pnode.Solver(
        lambda t, y: -factor[0] * rate * y, params=[rate], samples="independent", comm=comm
    )
    for tensors in ((y0, rate), (y0,)):
        factor[0] = 1.0
        ys = solver(y0, torch.tensor([0.0, 1.0])).ys
        if comm.rank == 0:
            factor[0] = 2.0
        try:
            torch.autograd.grad(total(ys.sum(), comm), tensors)
            checks.true(False, "nothing was raised")
        except pnode.errors.FieldChanged as error:
            checks.true("rank" in str(error) or error.rank == 0, str(error))
    factor[0] = 1.0
    (found,) = torch.autograd.grad(total(solver(y0, torch.tensor([0.0, 1.0])).ys[-1].sum(), comm),
                                   rate)  # fmt: skip
    checks.below(abs(float(found) + 2 * comm.size * torch.tensor(-1.0).exp().item()), 1e-5)


@pytest.mark.mpi(min_size=2, max_size=3)
def test_what_ranks_must_be_given_alike() -> None:
    """Refused on all ranks: other shared times, times of its own on one, bad arguments on one."""
    solver = pnode.Solver(blow_up, samples="independent", comm=comm)
    y0, zero = torch.full((2, 1), -1.0, dtype=D), comm.rank == 0
    last = 1.0 if zero else 2.0
    for t, named in (
        (torch.tensor([0.0, last]), "t differs"),
        (torch.tensor([0.0, 1.0]).expand(2, 2) if zero else torch.tensor([0.0, 1.0]), "t differs"),
        (torch.tensor([0.0, 0.0]) if zero else torch.tensor([0.0, 1.0]), "strictly"),
    ):
        try:
            solver(y0, t)
            checks.true(False, "nothing was raised", named)
        except pnode.ConfigurationError as error:
            checks.true(named in str(error), str(error))
    own = torch.linspace(0.0, 1.0, 2 + comm.rank, dtype=D).expand(2, -1)  # of each rank's number
    checks.true(solver(y0, own).ys.shape == (2 + comm.rank, 2, 1), "own times")


@pytest.mark.mpi(min_size=2, max_size=3)
def test_log_of_ranks_with_other_numbers_of_steps(tmp_path: Any) -> None:
    """PETSc's log has both stages on all ranks, and its view, a collective one, their times."""
    PETSc.Log.begin()
    stages = [log_stage("pnode forward"), log_stage("pnode adjoint")]
    before = [stage.id for stage in stages]
    y0 = torch.full((1 + comm.rank, 1), -1.0 - 9.0 * comm.rank, dtype=D, requires_grad=True)
    solution = pnode.Solver(blow_up, samples="independent", comm=comm)(y0, torch.tensor([0.0, 2.0]))
    total(solution.ys.sum(), comm).backward()
    checks.true(before == [log_stage(name).id for name in ("pnode forward", "pnode adjoint")])
    path = comm.bcast(str(tmp_path / "log.txt"))
    viewer = PETSc.Viewer().createASCII(path, comm=comm)
    PETSc.Log.view(viewer)
    viewer.destroy()
    comm.barrier()
    text = Path(path).read_text()
    for name in ("pnode forward", "pnode adjoint"):
        checks.true(name in text, name, "is not in the log")
    steps = comm.allgather(solution.stats.steps)
    checks.true(len(set(steps)) == comm.size, steps)

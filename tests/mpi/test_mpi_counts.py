"""Messages and reductions of solves, in benchmarks/counting.py's environment.

Everything is counted in whole numbers and compared with the ledger: no tolerance.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import checks, comm

import pnode
from pnode.parallel import GhostLayout, Grid, total

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
from counting import Counter, Counts, is_counting

pytestmark = [
    pytest.mark.mpi, pytest.mark.skipif(not is_counting(), reason="needs tools/run_ranks.py"),
]  # fmt: skip
counter = Counter() if is_counting() else None
D = torch.float64
FIELDS, WIDTH = 2, 2
NEIGHBOURS = min(comm.size - 1, 2)  # of a rank on a ring


def solver_and_state(mode: str, w: torch.Tensor, options: dict[str, Any]) -> Any:
    """A solver for a ring, a graph like a ring, or a batch, and its initial state."""
    if mode == "grid":
        grid = Grid((12,), fields=FIELDS, width=WIDTH, comm=comm)

        def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return w[0] * (u[:, :-4] - 2.0 * u[:, 2:-2] + u[:, 4:])

        y0, arguments = 1.0 + 0.1 * grid.coordinates() * torch.ones(grid.shape), {"layout": grid}
    elif mode == "graph":
        own, first = 12 // comm.size, comm.rank * (12 // comm.size)
        ghosts = [(first - 1) % 12, (first + own) % 12]
        layout = GhostLayout(own, ghosts, fields=FIELDS, comm=comm)

        def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return -w[0] * u[:own] + u[own:].sum(0)

        y0, arguments = torch.ones(layout.shape), {"layout": layout}
    else:

        def field(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
            return -w[0] * u**3

        y0, arguments = torch.ones(3 + comm.rank, 3), {"comm": comm}
    return pnode.Solver(field, params=[w], **arguments, **options), y0.to(D)


def measure(mode: str, end: float, **options: Any) -> tuple[Any, Counts, Counts]:
    """Ledger and counts of a forward sweep and of a backward one, without making objects."""
    w = torch.tensor([0.7, 0.0], dtype=D, requires_grad=True)
    solver, y0 = solver_and_state(mode, w, options)
    t = torch.tensor([0.0, end])
    solver(y0, t).ys.sum().backward()
    solution, forward = counter.count(lambda: solver(y0, t))
    loss = total(solution.ys.sum(), comm)
    _, backward = counter.count(loss.backward)
    if mode != "batch":  # evaluations and products exchange once with each neighbour
        ledger, back = solution.stats, solution.stats.backward
        what = (mode, options, "messages", ledger)
        # Products with a sparse matrix are PETSc's, one per Krylov iteration.
        sparse = options.get("jacobian") == "sparse"
        least = ledger.rhs + ledger.jvp + sparse * ledger.krylov
        least += options.get("compile", False)  # f where the solve begins, beside its graph
        back_least = back.rhs + back.jvp + back.vjp + sparse * back.krylov
        # Points whose evaluation is shared were exchanged all the same: one per Newton iterate and
        # step, two per adjoint step. A second derivative exchanges both its arguments.
        shared = ledger.newton + ledger.steps if ledger.newton else 0
        back_shared = 2 * back.steps if ledger.newton else 0
        back_shared += back.vjp if options["method"] == "rodaspr" else 0
        each, found, back_found = NEIGHBOURS or 1, forward.sends, backward.sends
        several = bool(NEIGHBOURS)
        checks.true(least * several <= found / each <= (least + shared) * several, *what, forward)
        checks.true(
            back_least * several <= back_found / each <= (back_least + back_shared) * several,
            *what, backward,
        )  # fmt: skip
        checks.true(forward.receives == forward.sends, *what)
        checks.true(backward.receives == backward.sends, *what)
        width = WIDTH if mode == "grid" else 1
        both_sides = 8 * FIELDS * 2 * width
        checks.true(forward.sent == found / each * both_sides, *what, "bytes")
        checks.true(backward.sent == back_found / each * both_sides, *what, "bytes")
    else:
        checks.true(forward.sends == backward.sends == 0, mode, options, "messages")
    return solution.stats, forward, backward


def report(mode: str, options: dict[str, Any], forward: Counts, backward: Counts) -> None:
    """Print counts per step."""
    if comm.rank == 0:
        print(f"{mode:6s} {options}\n  forward  {forward}\n  backward {backward}", flush=True)


def test_explicit_steps() -> None:
    """No reduction per step; one for the parameters per backward."""
    stages = {"rk4": 4, "dopri5": 6, "ssprk43": 4}
    for mode in ("grid", "graph", "batch"):
        for method, number in stages.items():
            options = {"method": method, "step_size": 0.1}
            stats, *one = measure(mode, 1.0, **options)
            twice, *two = measure(mode, 2.0, **options)
            steps = twice.steps - stats.steps
            forward, backward = ((b - a).per(steps) for a, b in zip(one, two, strict=True))
            what = (mode, method, forward, backward)
            checks.true(steps == 10 and forward.reductions == backward.reductions == 0.0, *what)
            # Of arguments (2), parameters and failures (1 each); of the gradient and a mark.
            several = comm.size > 1
            checks.true(one[0].reductions == 4 * several, *what, one)
            checks.true(one[1].reductions == 1 * several, *what, one)
            checks.true(one[1].reduced == 8 * (1 + 1 + 2) * several, *what, one)
            if mode != "batch":
                checks.true(forward.sends == number * NEIGHBOURS, *what)
                checks.true(backward.sends == 2 * number * NEIGHBOURS, *what)
            report(mode, options, forward, backward)


def test_adaptive_steps() -> None:
    """One reduction per attempt, PETSc's error norm, and none backward."""
    several = comm.size > 1
    for mode in ("grid", "batch"):
        for method in ("dopri5", "bosh3"):
            options = {"method": method, "rtol": 1e-6}
            stats, *one = measure(mode, 1.0, **options)
            twice, *two = measure(mode, 2.0, **options)
            attempts = twice.steps + twice.rejected - stats.steps - stats.rejected
            forward, backward = ((b - a).per(attempts) for a, b in zip(one, two, strict=True))
            what = (mode, method, forward, backward)
            checks.true(attempts > 2 and forward.reductions == 1.0 * several, *what)
            checks.true(one[1].reductions == two[1].reductions == 1 * several, *what)
            report(mode, options, forward, backward)


_FIXED, _ADAPTIVE, _IMPLICIT = (
    {"method": "rk4", "step_size": 0.1}, {"method": "dopri5", "rtol": 1e-6},
    {"method": "rodaspr", "rtol": 1e-5},
)  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "options"),
    [("batch", _FIXED), ("batch", _ADAPTIVE), ("batch", _IMPLICIT), ("grid", _FIXED),
     ("grid", _ADAPTIVE)],
)  # fmt: skip
def test_compiled_sweeps(options: dict[str, Any], mode: str) -> None:
    """As many as step by step, and two a sweep: whether all compile, and come to the end.

    With ghost cells one more backward: whether all begin.
    """
    several, adaptive, sends = comm.size > 1, "rtol" in options, []
    for end in (1.0, 2.0):
        stats, forward, backward = measure(mode, end, compile=True, **options)
        attempts = stats.steps + stats.rejected
        # Of arguments (2), parameters and failures (1 each); for the first adaptive step (3).
        once = 6 + 3 * adaptive
        checks.true(forward.reductions == (once + adaptive * attempts) * several, options, forward)
        checks.true(backward.reductions == (1 + (mode == "grid")) * several, options, backward)
        sends.append((attempts, stats.steps, forward.sends, backward.sends))
    if mode == "grid":
        stages = 6 if adaptive else 4
        more, steps, forwards, backwards = (b - a for a, b in zip(*sends, strict=True))
        checks.true(forwards == stages * more * NEIGHBOURS, options, forwards, more)
        checks.true(backwards == stages * steps * NEIGHBOURS, options, backwards, steps)
    report(mode, options, forward.per(attempts), backward.per(attempts))


def test_implicit_steps() -> None:
    """GMRES takes two reductions per iteration and one per solve; Newton two per iterate and one.

    Modified Gram-Schmidt would take more: PETSc's default is the classical one.
    """
    several = comm.size > 1
    for end in (1.0, 2.0):
        options = {"method": "cn", "step_size": 0.1, "jacobian": "matrix-free"}
        stats, forward, backward = measure("grid", end, **options)
        expected = 2 * stats.krylov + stats.newton + 2 * stats.newton + stats.steps
        checks.true(forward.reductions == (4 + expected) * several, options, forward, stats)
        expected = 2 * stats.backward.krylov + stats.backward.steps
        checks.true(backward.reductions == (1 + expected) * several, options, backward, stats)
    report("grid", options, forward.per(stats.steps), backward.per(stats.steps))
    for mode, method, jacobian in (
        ("grid", "cn", "sparse"), ("grid", "rodaspr", "auto"), ("grid", "bdf2", "auto"),
        ("batch", "cn", "auto"), ("batch", "rodaspr", "auto"), ("batch", "bdf2", "auto"),
    ):  # fmt: skip
        options = {"method": method, "step_size": 0.1, "jacobian": jacobian}
        stats, forward, backward = measure(mode, 1.0, **options)
        report(mode, options, forward.per(stats.steps), backward.per(stats.steps))
        # No more than for a norm or product of PETSc's own: five per Newton or Krylov iteration.
        work = stats.newton + stats.krylov + stats.steps
        checks.true(forward.reductions <= 4 + 5 * work, options, forward, stats)

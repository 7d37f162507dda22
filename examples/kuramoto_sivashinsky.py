"""A neural term in the Kuramoto-Sivashinsky equation, stiff part implicit, on several ranks.

Flame fronts and thin films obey::

    u_t = -u u_x - u_xx - u_xxxx,    periodic in x with period 22

which is chaotic at this length; 64 cells, finite differences of second order. The linear part is
known and stiff: its fastest mode decays at a rate of 1,100, that of the chaos is 0.05. A network of
three neighbours is to stand for -u u_x, and learns it from states 0.2 apart. This is the test of
the semi-implicit neural ODE (H. Zhang, Y. Liu & R. Maulik, "Semi-implicit neural ordinary
differential equations", SINODE, 2024): the linear part is integrated implicitly, with one constant
matrix, factorized once, and the network explicitly, without any Jacobian.

Run it (a minute on one core), on any number of ranks, which share the cells::

    python examples/kuramoto_sivashinsky.py
    mpirun -n 2 python examples/kuramoto_sivashinsky.py

Measured with pnode 0.2.0 on 2026-11-30, seed 0 (42 s of CPU in all): one gradient of 16
trajectories over one time unit, after the training. The error is that of the final states, from
those of ark4 in steps of 0.01 with the same network; "f" counts evaluations of both parts and both
sweeps. CPU times and resident memory are of single calls, relative to ark3's 0.12 s and 15 MiB:

=======  ======  =====  =====  ==========  ==============  ========  ======  =====
method   step    steps  f      Jacobians   factorizations  error     CPU     MiB
=======  ======  =====  =====  ==========  ==============  ========  ======  =====
ark3     0.2     5      82     2           2               7.2e-4    1       1
ark4     0.2     5      122    2           2               3.9e-5    1.2     1.0
cn       0.2     5      43     10          10              3.6e-4    3.0     5.9
rk4      0.002   500    4000   0           0               1.0e-8    44      7.0
rk4      0.005                                             blows up
=======  ======  =====  =====  ==========  ==============  ========  ======  =====

So 44 times less CPU time than the explicit method near its limit of stability, and 3 times less
than the fully implicit one, whose Jacobian has the network's in it. There is one factorization in
each direction. From 8 states that were not learned from, forecasts stay within half the size of u
until t = 12.1 on average (5.6 to 19.0), about half a Lyapunov time. On 1 and 2 ranks the losses
agree to 3e-15 (five updates). What did not work: to forecast for several Lyapunov times. The mean
squared error of what is learned from falls from 0.074 to 0.001 in 200 updates, which is not enough
for it; nothing but more updates was left to try, and was not tried.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import network
from gallery_common import (
    Outcome,
    arguments,
    figure,
    launch,
    measure,
    say,
    train,
)
from mpi4py import MPI

import pnode
from pnode.parallel import Grid, total

LENGTH, CELLS, WIDTH = 22.0, 64, 2
STEP, FINE = 0.2, 0.02
SEEN, UNSEEN = 16, 8  # trajectories
SPIN_UP, KNOWN, FORECAST = 40.0, 5, 150  # time; states to learn from; steps of the forecast
WRONG = 0.5  # relative error at which a forecast is over
DX = LENGTH / CELLS
Part = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


# ----------------------------------------------------------------------------------- the system


def linear(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """-u_xx - u_xxxx, from the cells with two ghosts on each side to the cells."""
    second = (u[..., 2:] - 2 * u[..., 1:-1] + u[..., :-2]) / DX**2
    fourth = (second[..., 2:] - 2 * second[..., 1:-1] + second[..., :-2]) / DX**2
    return -second[..., 1:-1] - fourth


def transport(t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """-u u_x, in a form that conserves energy."""
    left, right = u[..., 1:-2], u[..., 2:-1]
    return -((left * left + left * right + right * right) / 6).diff(dim=-1) / DX


class Learned(torch.nn.Module):
    """The network that is to stand for -u u_x."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.net = network(3, 24, generator)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        stencil = torch.stack([u[..., 1:-3], u[..., 2:-2], u[..., 3:-1]], dim=-1)
        values: torch.Tensor = self.net(stencil)
        return values.squeeze(-1)


def make_solver(part: Part, grid: Grid, method: str, step: float) -> pnode.Solver:
    """The linear part implicitly, with one matrix; an explicit or implicit method takes the sum."""
    (row,) = (row for row in pnode.methods() if row.name == method)
    common: dict[str, Any] = {"method": method, "step_size": step, "layout": grid}
    matrix: dict[str, Any] = {
        "jacobian": "sparse",
        "linear_solver": {"ksp_type": "preonly", "pc_type": "lu"},
    }
    if grid.comm.size > 1:
        matrix["linear_solver"] = {"ksp_type": "gmres", "pc_type": "bjacobi", "ksp_rtol": 1e-13}
    if row.kind == "imex":
        return pnode.Solver(
            implicit=linear, explicit=part, jacobian_reuse="constant", **common, **matrix
        )
    both = Sum(part)
    return pnode.Solver(both, **common, **(matrix if row.kind == "implicit" else {}))


class Sum(torch.nn.Module):
    """Both parts together."""

    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return linear(t, u) + self.part(t, u)


def trajectories(
    generator: torch.Generator, spin_up: float, steps: int, comm: MPI.Intracomm
) -> torch.Tensor:
    """Solve the true equation, on rank 0 alone as it is chaotic; (times, trajectories, cells)."""
    number = SEEN + UNSEEN
    found = None
    start = torch.randn(number, CELLS, generator=generator, dtype=torch.float64)
    if comm.rank == 0:
        grid = Grid((CELLS,), fields=number, width=WIDTH, comm=MPI.COMM_SELF)
        with torch.no_grad():
            start = start - start.mean(1, keepdim=True)
            quick = make_solver(transport, grid, "ark3", 0.1)
            start = quick(start, torch.tensor([0.0, spin_up], dtype=torch.float64)).ys[-1]
            solver = make_solver(transport, grid, "ark4", FINE)
            found = solver(start, times(steps)).ys
    result: torch.Tensor = comm.bcast(found)
    return result


def times(steps: int) -> torch.Tensor:
    """Return output times, ``STEP`` apart."""
    return STEP * torch.arange(steps + 1, dtype=torch.float64)


# -------------------------------------------------------------------------------- measurements


def cost(
    part: Learned, data: torch.Tensor, comm: MPI.Intracomm, quick: bool
) -> list[dict[str, Any]]:
    """Return for each method what one gradient over the known states takes, and its error."""
    cases = [("ark3", STEP), ("ark4", STEP), ("cn", STEP), ("rk4", 0.002), ("rk4", 0.005)]
    grid = Grid((CELLS,), fields=SEEN, width=WIDTH, comm=comm)
    own = grid.part(data)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        exact = make_solver(part, grid, "ark4", 0.01)(own[0], times(KNOWN)).ys[-1]
    for method, step in cases[:2] if quick else cases:
        row: dict[str, Any] = {"method": method, "step": step}
        rows.append(row)
        solver = make_solver(part, grid, method, step)

        def gradient(solver: pnode.Solver = solver) -> pnode.Solution:
            solution = solver(own[0], times(KNOWN))
            total((solution.ys[1:] - own[1:]).square().sum(), comm).backward()
            return solution

        try:
            measured = measure(gradient, warm_up=True)
        except pnode.SolveError as error:
            row["failed"] = type(error).__name__
            continue
        stats, back = measured.value.stats, measured.value.stats.backward
        squares = total((measured.value.ys[-1].detach() - exact).square().sum(), comm)
        row |= {
            "steps": stats.steps, "evaluations": stats.rhs + back.rhs, "vjp": back.vjp + stats.vjp,
            "Jacobians": stats.jacobians + back.jacobians,
            "factorizations": stats.factorizations + back.factorizations,
            "error": math.sqrt(float(squares) / (SEEN * CELLS)),
            "CPU s": measured.cpu_seconds, "MiB": measured.peak_mib,
        }  # fmt: skip
    return rows


def valid_times(forecast: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return for each trajectory until when the relative error is small."""
    errors = (forecast - truth).norm(dim=-1) / truth.square().sum(-1).mean().sqrt()
    right: torch.Tensor = (errors < WRONG).cumprod(0)
    return STEP * (right.sum(0) - 1.0)


# ----------------------------------------------------------------------------------- the program


def draw(truth: torch.Tensor, forecast: torch.Tensor, losses: list[float], valid: float) -> Any:
    """Draw one trajectory in space and time, the forecast, their difference, and the training."""
    drawn, axes = figure(
        1, 4, "Kuramoto-Sivashinsky: a network for $-u u_x$, learned with a semi-implicit method",
        figsize=(13.0, 4.4),
    )  # fmt: skip
    extent = (0.0, LENGTH, 0.0, STEP * (len(truth) - 1))
    panels = (
        ("truth", truth),
        ("forecast, learned term", forecast),
        ("difference", forecast - truth),
    )
    for axis, (title, values) in zip(axes[0, :3], panels, strict=True):
        image = axis.imshow(
            values, origin="lower", aspect="auto", extent=extent, cmap="RdBu", vmin=-3.5, vmax=3.5
        )
        axis.axhline(valid, color="black", ls=":", lw=1.2)
        axis.set(xlabel="x", ylabel="time t")
        axis.set_title(title, fontsize=10)
        axis.grid(False)
    drawn.colorbar(image, ax=axes[0, 2], label="u")
    axis = axes[0, 3]
    axis.semilogy(losses, color="C3")
    axis.set(xlabel="iteration", ylabel="loss (mean squared error)")
    axis.set_title("training (dotted: forecast valid until)", fontsize=10)
    return drawn


def run(options: argparse.Namespace) -> Outcome:
    """Learn the term, forecast, and compare the methods. Collective."""
    comm = MPI.COMM_WORLD
    generator = torch.Generator().manual_seed(options.seed)
    learned = Learned(generator)
    spin_up, steps = (10.0, 10) if options.quick else (SPIN_UP, FORECAST)
    data = trajectories(generator, spin_up, steps, comm)
    seen, unseen = data[: KNOWN + 1, :SEEN], data[:, SEEN:]
    grid = Grid((CELLS,), fields=SEEN, width=WIDTH, comm=comm)
    own, solver = grid.part(seen), make_solver(learned, grid, options.method, STEP)

    def loss() -> torch.Tensor:
        squares = (solver(own[0], times(KNOWN)).ys[1:] - own[1:]).square().sum()
        return total(squares, comm) / seen[1:].numel()

    training = train(learned, loss, options, rate=1e-2)
    grid = Grid((CELLS,), fields=UNSEEN, width=WIDTH, comm=comm)
    with torch.no_grad():
        solver = make_solver(learned, grid, options.method, STEP)
        forecast = grid.whole(solver(grid.part(unseen[0]), times(steps)).ys)
    valid = valid_times(forecast, unseen)
    say(comm, f"forecasts are valid until t = {float(valid.mean()):.1f} on average")
    rows = cost(learned, seen, comm, options.quick)
    numbers = {"losses": training.losses, "valid": valid, "mean valid time": float(valid.mean())}
    shown = int(valid.argsort()[len(valid) // 2])
    return Outcome(
        numbers, rows,
        lambda: draw(unseen[:, shown], forecast[:, shown], training.losses, float(valid[shown])),
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this example's own options."""
    imex = [row.name for row in pnode.methods() if row.kind == "imex"]
    parser.add_argument(
        "--method", choices=imex, default="ark3", metavar="NAME", help="an IMEX method (ark3)"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    return arguments(
        "kuramoto_sivashinsky", __doc__, argv, iterations=200, quick={"iterations": 5},
        add=add_options,
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code. Collective."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

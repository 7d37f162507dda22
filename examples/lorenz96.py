"""Learn what the fast variables of the two-scale Lorenz 96 system do to the slow ones.

The slow variables X_k sit on a ring; each has J fast ones, which sit on one long ring::

    dX_k / dt = -X_{k-1} (X_{k-2} - X_{k+1}) - X_k + F - (h c / b) sum_j Y_{j,k}
    dY_j / dt = -c b Y_{j+1} (Y_{j+2} - Y_{j-1}) - c Y_j + (h c / b) X_k

(E. N. Lorenz, "Predictability - a problem partly solved", 1996). A forecast that knows the slow
equation but not the fast variables lacks the last term of the first line. A network of X_k is
to stand for it::

    dX_k / dt = -X_{k-1} (X_{k-2} - X_{k+1}) - X_k + F + closure(X_k)

What it learns from is states of the slow variables alone: forecasts with the closure, over 0.3
time units, shall end where the two-scale system does. Several ranks may share the ring::

    python examples/lorenz96.py
    mpirun -n 2 python examples/lorenz96.py

It is then to forecast, over one time unit, from states that it has not learned from. No function of
X_k can be exact, as equal X_k meet different fast variables: the figure shows them, their mean,
and what was learned.

Measured with pnode 0.2.0 and torchdiffeq 0.2.5 on 2026-11-30, seed 0, 150 updates (41 s of CPU in
all):

====================================  ============  ===============
what                                  with closure  without closure
====================================  ============  ===============
error of other forecasts at time 0.3  0.226         1.07
error of other forecasts at time 1    2.16          8.14
====================================  ============  ===============

The closure explains 82.3 % of the variance of the missing term; no function of X_k can explain more
than 83.4 %. One gradient of the training's loss afterwards, on one rank, CPU time and memory
relative to pnode's 132 ms and 47 MiB; most of the error is that of steps of 0.01, the gradient
being small by then:

==========================  ======  ===  ====  ====
gradient by                 error   f    CPU   MiB
==========================  ======  ===  ====  ====
pnode, not compiled         4.5e-3  120  1     1
pnode, compiled             4.5e-3  120  0.26  0.62
torchdiffeq odeint          5.5e-3  124  0.84  1.04
torchdiffeq odeint_adjoint  5.5e-3  248  1.3   0.04
==========================  ======  ===  ====  ====

(The fourth-order method with fixed steps of each: torchdiffeq's is the 3/8 rule. The compiled row's
CPU time and memory are from a run of 10 updates, where torchdiffeq's took 0.57 and 0.98.)

**Ranks.** Each has its part of the ring, of all forecasts; pnode brings the two neighbours on each
side that the slow equation looks at. The loss is summed over the ranks by ``pnode.parallel.total``;
parameters and their gradients are the same on all ranks, and so each makes the same updates. The
two-scale system is chaotic: over the 4 time units of a run, round-off would grow to order one. So
rank 0 solves it alone, and the data are the same for any number of ranks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from common import network
from gallery_common import LEARNED, Outcome, arguments, at_least, figure, launch, train
from gallery_physics import compare_gradients
from mpi4py import MPI

import pnode
from pnode.parallel import Grid, total

WIDTH = 2  # neighbours on each side that the slow equation looks at
FORCING, COUPLING, SPEED, RATIO = 18.0, 1.0, 10.0, 10.0  # F, h, c, b
FAST = 16  # fast variables for each slow one, J
SEEN, UNSEEN = 48, 16  # runs to learn from and to forecast
SPIN_UP, END = 3.0, 1.0  # time before the data begin, and length of the runs
OUTPUT = 0.1  # time between the states of a run
KNOWN = 3  # how many of them a forecast is compared with in training
FAST_STEP, STEP = 0.002, 0.01
SCALE = 10.0  # the size of X


# ----------------------------------------------------------------------------------- the models


def slow_part(x: torch.Tensor) -> torch.Tensor:
    """The slow equation without the fast variables; from (..., cells + 4) to (..., cells)."""
    here, before, before_that, after = x[..., 2:-2], x[..., 1:-3], x[..., :-4], x[..., 3:-1]
    return -before * (before_that - after) - here + FORCING


def two_scales(t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
    """The two-scale system: X and its J fast variables, as 1 + J fields of each run.

    From (runs * (1 + J), cells + 4) to (runs * (1 + J), cells).
    """
    fields = state.unflatten(0, (-1, 1 + FAST))
    x, fast = fields[:, 0], fields[:, 1:, 1:-1]
    # The long ring with J more on each side than wanted.
    ring = fast.transpose(1, 2).flatten(1)
    here, before = ring[:, FAST:-FAST], ring[:, FAST - 1 : -FAST - 1]
    after, after_that = ring[:, FAST + 1 : -FAST + 1], ring[:, FAST + 2 : -FAST + 2]
    strength = COUPLING * SPEED / RATIO
    d_fast = -SPEED * RATIO * after * (after_that - before) - SPEED * here
    d_fast = d_fast.unflatten(1, (-1, FAST)).transpose(1, 2) + strength * x[:, None, 2:-2]
    d_slow = slow_part(x) - strength * fields[:, 1:, 2:-2].sum(1)
    return torch.cat([d_slow[:, None], d_fast], dim=1).flatten(0, 1)


class Hybrid(torch.nn.Module):
    """The slow equation with a closure; zero before it is trained."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.net = network(1, 16, generator)

    def closure(self, x: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = self.net(x[..., None] / SCALE).squeeze(-1)
        return SCALE * scaled

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """From (runs, cells + 4) to (runs, cells)."""
        return slow_part(x) + self.closure(x[..., 2:-2])


# ------------------------------------------------------------------------------------- the data


def reference(
    cells: int, generator: torch.Generator, comm: MPI.Intracomm
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Solve the two-scale system on rank 0.

    Returns
    -------
    times : Tensor
        Shape (T,).
    slow, effect : Tensor
        X, and the term of the fast variables in its equation; shape (T, runs, cells).
    """
    times = torch.linspace(0.0, END, round(END / OUTPUT) + 1, dtype=torch.float64)
    runs = SEEN + UNSEEN
    slow = effect = None
    if comm.rank == 0:
        grid = Grid((cells,), fields=runs * (1 + FAST), width=WIDTH)
        solver = pnode.Solver(two_scales, method="rk4", step_size=FAST_STEP, layout=grid)
        start = torch.randn(runs, 1 + FAST, cells, generator=generator, dtype=torch.float64)
        start[:, 0] = 3.0 + 5.0 * start[:, 0]
        start[:, 1:] *= 0.1
        with torch.no_grad():
            start = solver(start.flatten(0, 1), torch.tensor([-SPIN_UP, 0.0])).ys[-1]
            states = solver(start, times).ys.unflatten(1, (runs, 1 + FAST))
        slow = states[:, :, 0].clone()
        effect = -(COUPLING * SPEED / RATIO) * states[:, :, 1:].sum(2)
    return (times, *comm.bcast((slow, effect)))


# --------------------------------------------------------------------------------- the training


def make_solver(field: Hybrid, grid: Grid, method: str) -> pnode.Solver:
    """Fixed steps: all forecasts of a training take the same."""
    return pnode.Solver(field, method=method, step_size=STEP, layout=grid)


def forecast_errors(
    solver: pnode.Solver, grid: Grid, times: torch.Tensor, data: torch.Tensor
) -> torch.Tensor:
    """Forecast from the first of the data; return the mean squared errors at the other times."""
    own = grid.part(data)
    squares = (solver(own[0], times).ys[1:] - own[1:]).square().sum((1, 2))
    return total(squares, grid.comm) / data[0].numel()


class Ring(torch.nn.Module):
    """The hybrid model of a whole ring, for solvers that know no ghost cells."""

    def __init__(self, hybrid: Hybrid) -> None:
        super().__init__()
        self.hybrid = hybrid

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ghosts = torch.cat([x[..., -WIDTH:], x, x[..., :WIDTH]], dim=-1)
        result: torch.Tensor = self.hybrid(t, ghosts)
        return result


def beside(
    options: argparse.Namespace, hybrid: Hybrid, times: torch.Tensor, data: torch.Tensor,
    comm: MPI.Intracomm,
) -> list[dict[str, Any]]:  # fmt: skip
    """Measure one gradient of the training's loss, by pnode and by torchdiffeq, on one rank."""
    if options.quick or comm.size > 1:
        return []
    return compare_gradients(
        Ring(hybrid), lambda solve: (solve(data[0], times)[1:] - data[1:]).square().mean(),
        list(hybrid.parameters()), method="rk4", step_size=STEP,
    )  # fmt: skip


def binned(x: torch.Tensor, values: torch.Tensor, bins: int = 40) -> torch.Tensor:
    """Group the values by x, equally many in each group; return means of both, shape (2, bins)."""
    order = x.argsort()
    groups = [part[order].tensor_split(bins) for part in (x, values)]
    return torch.stack([torch.stack([group.mean() for group in part]) for part in groups])


def explained(values: torch.Tensor, estimate: torch.Tensor) -> float:
    """Return the share of the variance of the values that an estimate explains."""
    return 1.0 - float((values - estimate).square().mean() / values.var(correction=0))


def learn(
    options: argparse.Namespace, comm: MPI.Intracomm
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor, Hybrid]:
    """Train, forecast and compare; return numbers, and X and the effect of other forecasts."""
    generator = torch.Generator().manual_seed(options.seed)
    hybrid = Hybrid(generator)
    times, slow, effect = reference(options.cells, generator, comm)
    seen, unseen = slow.split((SEEN, UNSEEN), dim=1)

    grid = Grid((options.cells,), fields=SEEN, width=WIDTH, comm=comm)
    solver = make_solver(hybrid, grid, options.method)
    known = slice(KNOWN + 1)

    def loss() -> torch.Tensor:
        return forecast_errors(solver, grid, times[known], seen[known]).mean()

    training = train(hybrid, loss, options, rate=0.02, comm=comm)
    grid = Grid((options.cells,), fields=UNSEEN, width=WIDTH, comm=comm)
    x, values = unseen.flatten(), effect[:, SEEN:].flatten()
    centers, means = binned(x, values)
    with torch.no_grad():
        without, learned = (  # one is not trained: its closure is zero
            forecast_errors(make_solver(field, grid, options.method), grid, times, unseen).sqrt()
            for field in (Hybrid(generator), hybrid)
        )
        numbers = {
            "times": times[1:].tolist(), "without": without.tolist(),
            "with_closure": learned.tolist(), "explained": explained(values, hybrid.closure(x)),
            # by the mean for each X: the most that a function of X can
            "explainable": explained(values, means[(x[:, None] - centers).abs().argmin(1)]),
            "losses": [*training.losses, loss().item()],
        }  # fmt: skip
    numbers["gradients"] = beside(options, hybrid, times[known], seen[known], comm)
    return numbers, x, values, hybrid


def draw(numbers: dict[str, Any], x: torch.Tensor, values: torch.Tensor, hybrid: Hybrid) -> Any:
    """Draw the closure, the errors of the forecasts, and how training went."""
    drawn, axes = figure(
        1, 3, f"Lorenz 96, slow variables with {FAST} fast ones for each",
        figsize=(12.0, 4.2), width_ratios=(1.5, 1.0, 1.0),
    )  # fmt: skip
    closure, error, loss = axes[0]
    closure.plot(x, values, ",", color="0.6", zorder=0)
    closure.plot(*binned(x, values), "o", ms=4.5, mfc="white", mec="black", label="their mean")
    line = torch.linspace(float(x.min()), float(x.max()), 200, dtype=torch.float64)
    with torch.no_grad():
        closure.plot(line, hybrid.closure(line), **LEARNED)
    closure.set(xlabel="$X_k$", ylabel="effect on $dX_k/dt$", title="the fast variables (dots)")
    for name, style in (
        ("without", {"color": "C0", "label": "no closure"}), ("with_closure", LEARNED),
    ):  # fmt: skip
        error.plot([0.0, *numbers["times"]], [0.0, *numbers[name]], **style)
    error.axvline(numbers["times"][KNOWN - 1], color="0.5", ls=":", lw=1.0)
    error.set(xlabel="time (trained for the dotted line)", ylabel="error (RMS)")
    error.set_title("forecasts not learned from")
    loss.semilogy(numbers["losses"], color="C3")
    loss.set(xlabel="iteration", ylabel="loss (mean squared error)", title="training")
    for axis in (closure, error):
        axis.legend(frameon=False)
    return drawn


# ---------------------------------------------------------------------------------- the program


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""

    def add(options: argparse.ArgumentParser) -> None:
        options.add_argument(
            "--cells", type=at_least(int, 8), default=16, help="slow variables (16)"
        )
        explicit = [
            row.name for row in pnode.methods() if row.kind == "explicit" and "rhs" in row.forms
        ]
        options.add_argument(
            "--method", choices=explicit, default="rk4", metavar="NAME",
            help="an explicit method (rk4)",
        )  # fmt: skip

    quick = {"cells": 8, "iterations": 20}
    return arguments("lorenz96", __doc__, argv, iterations=150, quick=quick, add=add)


def run(options: argparse.Namespace) -> Outcome:
    """Learn the closure. Collective."""
    numbers, x, effect, hybrid = learn(options, MPI.COMM_WORLD)
    rows: list[dict[str, Any]] = [
        {
            "what": f"error of other forecasts at time {numbers['times'][index]:.1f}",
            "learned": numbers["with_closure"][index], "beside": numbers["without"][index],
            "which is": "without closure",
        }
        for index in (KNOWN - 1, len(numbers["times"]) - 1)
    ]  # fmt: skip
    rows.append({
        "what": "share of the effect's variance", "learned": numbers["explained"],
        "beside": numbers["explainable"], "which is": "the most that a function of X can explain",
    })  # fmt: skip
    rows += numbers["gradients"]
    return Outcome(numbers, rows, lambda: draw(numbers, x, effect, hybrid))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code. Collective."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

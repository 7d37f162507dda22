"""Learn a viscosity and a sub-grid closure for Burgers' equation from a finer grid.

    u_t + (u^2 / 2)_x = nu u_xx    on a ring of length 1

is solved on few cells, which several ranks may share::

    python examples/burgers.py
    mpirun -n 2 python examples/burgers.py

What is learned from is the solution on 8 or 16 times as many cells, averaged to the coarse ones:

1. *The viscosity*, where the coarse cells resolve the shocks (nu = 0.02): one unknown number.
2. *A closure*, where they do not (nu = 0.002). The averages then obey

       d u_i / dt = -(F(u) + tau)_{i+1/2} / dx + (F(u) + tau)_{i-1/2} / dx + diffusion,

   F being the coarse flux and tau what it lacks. A small network of the three differences around a
   face is to stand for tau: of differences alone, as Burgers' equation is the same for an
   observer who moves along, and the same for a stencil read backwards, as it is the same for
   x -> -x, u -> -u. It is a flux, so nothing it does can change the sum of u.

The first learns from 8 solutions until t = 0.25. The second does too, and is then to predict 8
others until t = 0.5, with and without closure.

Measured with pnode 0.2.0 on 2026-11-30, seed 0 (61 s of CPU in all): the viscosity found is 0.0203,
where the truth is 0.02; the error of the other solutions is 0.017 with the closure, 0.056 without.
One gradient through the closure on 512 cells, two solutions until t = 0.025; errors are those of
the final states, "f" counts evaluations of both parts and both sweeps, CPU time and memory are
relative to ark3's 0.27 s and 5.3 MiB:

========  ======  =======  =====  ====  =========  ==========  ====  ====
nu        method  step     steps  f     Jacobians  error       CPU   MiB
========  ======  =======  =====  ====  =========  ==========  ====  ====
8e-4      ark3    1.6e-3   16     258   2          1.1e-6      1     1
8e-4      ark4    1.6e-3   16     386   2          1.0e-8      1.5   1.3
8e-4      cn      1.6e-3   16     114   32         7.2e-5      2.0   3.3
8e-4      rk4     1.6e-3   16     128   0          8.5e-8      0.87  0.9
0.02      ark3    1.6e-3   16     258   2          1.6e-6      1.1   1.0
0.02      ark4    1.6e-3   16     386   2          1.8e-8      1.7   1.1
0.02      cn      1.6e-3   16     111   32         2.9e-5      1.5   2.9
0.02      rk4     1.6e-3                           blows up
0.02      rk4     1.2e-4   216    1728  0          2.5e-12     12    3.2
========  ======  =======  =====  ====  =========  ==========  ====  ====

What did not work: viscosity 8e-4, the one of the semi-implicit neural ODE's test (see
``kuramoto_sivashinsky.py``), on 512 cells. Its fastest rate is then 4 nu / dx^2 = 840, that of the
transport max(u) / dx = 800: nothing is stiff, and rk4 takes the same steps for less. Nor is there
anything to learn, as such cells resolve the shocks: without a closure the error at t = 0.5 is
0.0014. So the closure is learned on few cells, and IMEX pays at the larger viscosity.

**IMEX.** Diffusion is linear and stiff on fine grids (its rates grow like 1 / dx^2): it is treated
implicitly, with one matrix for the whole solve (``jacobian_reuse="constant"``). Transport and the
network are treated explicitly: no step solves an equation with the network in it.

**Ranks.** Each has its cells of all solutions, and pnode brings the ghost cells. The loss is
summed over the ranks by ``pnode.parallel.total``; parameters and their gradients are the same on
all ranks, and so each makes the same updates. The numbers do not depend on how many there are.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from common import network
from gallery_common import (
    LEARNED,
    TRUTH,
    Outcome,
    Training,
    arguments,
    at_least,
    figure,
    launch,
    measure,
    say,
    train,
)  # fmt: skip
from mpi4py import MPI

import pnode
from pnode.parallel import Grid, total

WIDTH = 2  # ghost cells: how far the closure looks beyond a rank's cells
SOLUTIONS = 8  # to learn from, and as many to predict
END = 0.25  # of what is learned from
OUTPUTS = 5  # until then
VISCOUS, THIN = 0.02, 0.002  # the two viscosities
FINER = {VISCOUS: 8, THIN: 16}  # fine cells in a coarse one
FIRST_GUESS = 2.0 * VISCOUS
COURANT = 0.8  # step / dx
MANY, SHORT = 8, 0.025  # what one gradient takes is measured on so many more cells, until then
THINNER = 8e-4  # for a viscosity that they resolve just so, and for the larger one
# The implicit systems are solved to round-off, for numbers that do not depend on the ranks.
LINEAR_SOLVER = {"ksp_rtol": 1e-13}


# ------------------------------------------------------------------------------------ the model


class Diffusion(torch.nn.Module):
    """The viscous part nu u_xx. The parameter is log(nu), so that nu stays positive."""

    def __init__(self, dx: float, viscosity: float) -> None:
        super().__init__()
        self.dx = dx
        self.log_viscosity = torch.nn.Parameter(
            torch.tensor(math.log(viscosity), dtype=torch.float64)
        )

    @property
    def viscosity(self) -> float:
        return math.exp(self.log_viscosity.item())

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """From the cells with two ghosts on each side to the cells."""
        second = u[..., 1:-3] - 2.0 * u[..., 2:-2] + u[..., 3:-1]
        return self.log_viscosity.exp() / self.dx**2 * second


class Closure(torch.nn.Module):
    """The flux through each face that the coarse flux lacks; zero before it is trained."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.net = network(2 * WIDTH - 1, 16, generator)

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        stencils = u.diff(dim=-1).unfold(-1, 2 * WIDTH - 1, 1)
        both: torch.Tensor = self.net(stencils) + self.net(stencils.flip(-1))
        return 0.5 * both.squeeze(-1)


class Transport(torch.nn.Module):
    """The part -(u^2 / 2)_x, by a flux that conserves energy, with or without closure."""

    def __init__(self, dx: float, closure: Closure | None = None) -> None:
        super().__init__()
        self.dx, self.closure = dx, closure

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """From the cells with two ghosts on each side to the cells."""
        flux = coarse_flux(u[..., 1:-1])
        if self.closure is not None:
            flux = flux + self.closure(u)
        return -flux.diff(dim=-1) / self.dx


class Both(torch.nn.Module):
    """Transport and diffusion together."""

    def __init__(self, transport: Transport, diffusion: Diffusion) -> None:
        super().__init__()
        self.transport, self.diffusion = transport, diffusion

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.transport(t, u) + self.diffusion(t, u)
        return result


def coarse_flux(u: torch.Tensor) -> torch.Tensor:
    """Return the flux through the faces between cells."""
    left, right = u[..., :-1], u[..., 1:]
    return (left * left + left * right + right * right) / 6.0


# ------------------------------------------------------------------------------------- the data


@dataclass
class Reference:
    """Solutions on a fine grid, the same on all ranks.

    Attributes
    ----------
    times : Tensor
        Shape (T,).
    averages : Tensor
        Over each coarse cell; shape (T, solutions, cells).
    missing : Tensor
        The flux through the upper face of each coarse cell, less the one that the averages would
        have there; shape (T, solutions, cells).
    """

    times: torch.Tensor
    averages: torch.Tensor
    missing: torch.Tensor


def initial_states(number: int, cells: int, generator: torch.Generator) -> torch.Tensor:
    """Random waves of four lengths with a root mean square of 0.7, shape (number, cells)."""
    wave = torch.arange(1, 5, dtype=torch.float64)
    amplitudes = torch.randn(number, 4, generator=generator, dtype=torch.float64) / wave.sqrt()
    phases = torch.rand(number, 4, generator=generator, dtype=torch.float64)
    x = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    waves = torch.sin(2.0 * torch.pi * (wave[:, None] * x + phases[..., None]))
    states = (amplitudes[..., None] * waves).sum(1)
    return 0.7 * states / states.square().mean(1, keepdim=True).sqrt()


def reference(
    cells: int, viscosity: float, end: float, generator: torch.Generator, comm: MPI.Intracomm
) -> Reference:
    """Solve on the fine grid, by rk4 in steps that are stable for both parts."""
    finer = FINER[viscosity]
    grid = Grid((finer * cells,), fields=2 * SOLUTIONS, width=WIDTH, comm=comm)
    dx = 1.0 / (finer * cells)
    start = initial_states(2 * SOLUTIONS, finer * cells, generator)
    solver = pnode.Solver(
        Both(Transport(dx), Diffusion(dx, viscosity)),
        method="rk4",
        step_size=0.6 * min(dx / float(start.abs().max()), 2.7 * dx**2 / (4.0 * viscosity)),
        layout=grid,
    )
    times = torch.linspace(0.0, end, round(OUTPUTS * end / END) + 1, dtype=torch.float64)
    with torch.no_grad():
        fine = grid.whole(solver(grid.part(start), times).ys)
    averages = fine.unflatten(-1, (cells, finer)).mean(-1)
    missing = total_flux(fine, viscosity, dx)[..., finer - 1 :: finer]
    missing = missing - total_flux(averages, viscosity, finer * dx)
    return Reference(times, averages, missing)


def total_flux(u: torch.Tensor, viscosity: float, dx: float) -> torch.Tensor:
    """Return the flux, transport and diffusion, through the upper face of each cell of a ring."""
    ring = torch.cat([u, u[..., :1]], dim=-1)
    return coarse_flux(ring) - viscosity / dx * ring.diff(dim=-1)


# --------------------------------------------------------------------------------- the training


def make_solver(
    grid: Grid, diffusion: Diffusion, method: str, closure: Closure | None = None,
    step: float | None = None,
) -> pnode.Solver:  # fmt: skip
    """Diffusion implicitly, with one matrix; everything else explicitly.

    An explicit or implicit method takes the sum.
    """
    cells = grid.global_shape[0]
    transport = Transport(1.0 / cells, closure)
    (kind,) = (row.kind for row in pnode.methods() if row.name == method)
    common: dict[str, Any] = {
        "method": method, "step_size": step or COURANT / cells, "layout": grid,
    }  # fmt: skip
    matrix: dict[str, Any] = {"jacobian": "sparse", "linear_solver": LINEAR_SOLVER}
    if kind == "imex":
        return pnode.Solver(
            implicit=diffusion, explicit=transport, jacobian_reuse="constant", **common, **matrix
        )
    return pnode.Solver(
        Both(transport, diffusion), **common, **(matrix if kind == "implicit" else {})
    )


def mean_square_error(
    solver: pnode.Solver, grid: Grid, times: torch.Tensor, data: torch.Tensor
) -> torch.Tensor:
    """Solve from the first of the data and compare with the others, over all ranks' cells."""
    own = grid.part(data)
    squares = (solver(own[0], times).ys[1:] - own[1:]).square().sum()
    return total(squares, grid.comm) / data[1:].numel()


def learn_viscosity(
    options: argparse.Namespace, generator: torch.Generator, comm: MPI.Intracomm
) -> tuple[float, Training]:
    """Learn one number, by L-BFGS."""
    truth = reference(options.cells, VISCOUS, END, generator, comm)
    data = truth.averages[:, :SOLUTIONS]
    grid = Grid((options.cells,), fields=SOLUTIONS, width=WIDTH, comm=comm)
    diffusion = Diffusion(1.0 / options.cells, FIRST_GUESS)
    solver = make_solver(grid, diffusion, options.method)
    training = train(
        diffusion, lambda: mean_square_error(solver, grid, truth.times, data), options,
        iterations=min(options.iterations, 10), label="viscosity", constant=True, comm=comm,
        optimizer=partial(torch.optim.LBFGS, max_iter=1, line_search_fn="strong_wolfe"),
    )  # fmt: skip
    return diffusion.viscosity, training


def learn_closure(
    options: argparse.Namespace, generator: torch.Generator, comm: MPI.Intracomm
) -> tuple[Reference, list[torch.Tensor], Closure, list[float]]:
    """Learn the flux; return truth, predictions without and with it, the flux, and the losses."""
    truth = reference(options.cells, THIN, 2.0 * END, generator, comm)
    seen, unseen = truth.averages.split(SOLUTIONS, dim=1)
    grid = Grid((options.cells,), fields=SOLUTIONS, width=WIDTH, comm=comm)
    diffusion = Diffusion(1.0 / options.cells, THIN).requires_grad_(False)
    closure = Closure(generator)
    plain = make_solver(grid, diffusion, options.method)
    hybrid = make_solver(grid, diffusion, options.method, closure)
    known = slice(OUTPUTS + 1)

    def loss() -> torch.Tensor:
        return mean_square_error(hybrid, grid, truth.times[known], seen[known])

    training = train(closure, loss, options, rate=0.02, label="closure", comm=comm)
    with torch.no_grad():
        predictions = [
            grid.whole(solver(grid.part(unseen[0]), truth.times).ys) for solver in (plain, hybrid)
        ]
        return truth, predictions, closure, [*training.losses, loss().item()]


def beside(
    options: argparse.Namespace, closure: Closure, comm: MPI.Intracomm
) -> list[dict[str, Any]]:
    """Measure one gradient on many cells by IMEX, implicit and explicit methods, on one rank."""
    rows: list[dict[str, Any]] = []
    if options.quick or comm.size > 1:
        return rows
    cells, times = MANY * options.cells, torch.tensor([0.0, SHORT], dtype=torch.float64)
    grid = Grid((cells,), fields=2, width=WIDTH, comm=comm)
    start = initial_states(2, cells, torch.Generator().manual_seed(options.seed))
    for viscosity in (THINNER, VISCOUS):
        diffusion = Diffusion(1.0 / cells, viscosity).requires_grad_(False)
        stable = 0.9 * 2.7 / (4.0 * viscosity * cells**2)  # for rk4
        cases = [(method, COURANT / cells) for method in ("ark3", "ark4", "cn", "rk4")]
        with torch.no_grad():
            fine = make_solver(grid, diffusion, "ark4", closure, 0.1 * COURANT / cells)
            exact = fine(start, times).ys[-1]
        for method, step in cases + [("rk4", stable)] * (stable < COURANT / cells):
            row: dict[str, Any] = {"what": f"nu = {viscosity:g}, {method}", "step": step}
            rows.append(row)
            solver = make_solver(grid, diffusion, method, closure, step)

            def gradient(solver: pnode.Solver = solver) -> pnode.Solution:
                solution = solver(start, times)
                solution.ys[-1].square().mean().backward()
                return solution

            try:
                measured = measure(gradient, warm_up=True)
            except pnode.SolveError as error:
                row["failed"] = type(error).__name__
                continue
            stats, back = measured.value.stats, measured.value.stats.backward
            row |= {
                "steps": stats.steps, "f": stats.rhs + back.rhs,
                "Jacobians": stats.jacobians + back.jacobians,
                "error": float((measured.value.ys[-1].detach() - exact).square().mean().sqrt()),
                "CPU s": measured.cpu_seconds, "MiB": measured.peak_mib,
            }  # fmt: skip
    return rows


def draw(
    numbers: dict[str, Any], truth: Reference, predictions: list[torch.Tensor], closure: Closure
) -> Any:
    """Draw a solution that was not learned from, its closure, and how training went."""
    cells = truth.averages.shape[-1]
    drawn, axes = figure(
        2, 2,
        f"Burgers, {cells} cells: viscosity {numbers['viscosity']:.5f} (truth {VISCOUS}), "
        f"error with closure {numbers['with_closure']:.4f} (without {numbers['without']:.4f})",
    )  # fmt: skip
    x = (torch.arange(cells) + 0.5) / cells
    unseen = truth.averages[:, SOLUTIONS:]
    styles = (
        (predictions[0], {"color": "C0", "lw": 1.2, "label": "no closure"}),
        (predictions[1], {**LEARNED, "label": "learned closure"}),
    )
    # The solution for which the closure does most, at the end of what is learned from.
    index = int((predictions[0] - unseen)[OUTPUTS].square().sum(-1).argmax())
    state = unseen[OUTPUTS, index]
    # Stencils of the upper faces, on the ring; a constant flux has no effect, and uniform flow
    # needs no closure: that is where both are zero.
    ring = torch.cat([state[-1:], state, state[:2]])
    with torch.no_grad():
        learned = closure(ring) - closure(torch.zeros(4, dtype=torch.float64))

    (one, flux), (error, loss) = axes
    one.plot(x, state, **TRUTH)
    for states, style in styles:
        one.plot(x, states[OUTPUTS, index], **style)
        error.plot(truth.times, (states - unseen).square().mean((1, 2)).sqrt(), **style)
    one.set(xlabel="x", ylabel=f"u at t = {END}", title="a solution that was not learned from")
    flux.plot(x, truth.missing[OUTPUTS, SOLUTIONS + index], **TRUTH)
    flux.plot(x, learned, **LEARNED)
    flux.set(xlabel="x", ylabel="missing flux", title="the closure for this solution")
    error.axvline(END, color="0.5", ls=":", lw=1.0)
    error.set(xlabel="t (learned from solutions until the dotted line)", ylabel="error (RMS)")
    error.set_title(f"error of {SOLUTIONS} solutions that were not learned from")
    loss.semilogy(numbers["closure_losses"], color="C3", label="closure")
    loss.semilogy(numbers["viscosity_losses"], "o-", ms=3, color="C2", label="viscosity")
    loss.set(xlabel="update", ylabel="loss (mean squared error)", title="training")
    for axis in axes.flat:
        axis.legend(frameon=False)
    return drawn


# ---------------------------------------------------------------------------------- the program


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""

    def add(options: argparse.ArgumentParser) -> None:
        options.add_argument("--cells", type=at_least(int, 8), default=64, help="coarse cells (64)")
        imex = [row.name for row in pnode.methods() if row.kind == "imex"]
        options.add_argument(
            "--method", choices=imex, default="ark3", metavar="NAME", help="an IMEX method (ark3)"
        )

    quick = {"cells": 32, "iterations": 12}
    return arguments("burgers", __doc__, argv, iterations=120, quick=quick, add=add)


def run(options: argparse.Namespace) -> Outcome:
    """Learn both. Collective."""
    comm, generator = MPI.COMM_WORLD, torch.Generator().manual_seed(options.seed)
    finer = {nu: f"from {ratio * options.cells} cells" for nu, ratio in FINER.items()}
    say(comm, f"viscosity, {finer[VISCOUS]} on {options.cells}")
    viscosity, training = learn_viscosity(options, generator, comm)
    say(comm, f"closure, {finer[THIN]} on {options.cells}")
    truth, predictions, closure, losses = learn_closure(options, generator, comm)
    unseen = truth.averages[1:, SOLUTIONS:]
    errors = [(states[1:] - unseen).square().mean().sqrt().item() for states in predictions]
    numbers = {
        "viscosity": viscosity, "viscosity_losses": training.losses, "without": errors[0],
        "with_closure": errors[1], "closure_losses": losses,
    }  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"what": "viscosity", "found": viscosity, "beside": VISCOUS, "which is": "the truth"},
        {
            "what": "error of other solutions", "found": errors[1], "beside": errors[0],
            "which is": "without closure",
        },
    ]  # fmt: skip
    rows += beside(options, closure, comm)
    return Outcome(numbers, rows, lambda: draw(numbers, truth, predictions, closure))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code. Collective."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

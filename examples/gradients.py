"""Why discrete adjoints: gradients of a swing behind a fast actuator.

A damped swing is pushed by an actuator, which follows a given signal at a rate r::

    y1' = -a y1 - w y2 + k y3,    y2' = w y1 - a y2,    y3' = r (cos(2 t) - y3)

or y' = A y + b cos(2 t), a spiral with a = 0.05, w = 1, k = 0.3 and r = 2; 16 initial states, and
the loss is half the mean squared distance from given final states at t = T. Wanted are its
derivatives by all entries of A and b.

The continuous adjoint of the neural ODE paper (R. T. Q. Chen, Y. Rubanova, J. Bettencourt &
D. Duvenaud, 2018) keeps nothing and integrates y backwards beside its adjoint. Backwards, y3 is
unstable: an error made on the way grows like exp(r T), however smooth the solution is, and pushes
the swing. The discrete adjoint (H. Zhang & W. Zhao, "A memory-efficient neural ODE framework based
on high-level adjoint differentiation", 2022, the PNODE of which this package has its name) goes
back over the steps that were taken: its gradient is that of the numbers which the solve returned,
whatever the tolerance. Both claims can be checked here. The true gradient comes from torch's matrix
exponential (with cos and sin as two more states, the system is linear), that of the numbers from
autograd through dopri5's formula at the times of the steps that were taken.

Run it (about a minute on one core)::

    python examples/gradients.py

Measured with pnode 0.2.0 and torchdiffeq 0.2.5 on 2026-11-30, dopri5, rtol = atol: relative errors
of the gradient, against the truth and (last column) against the gradient of the numbers that the
solve itself returned. CPU times of single calls, on a busy computer:

========================  ====  ======  =========  ============  ======  ==============
adjoint                   T     rtol    error      evaluations   CPU ms  to its numbers
========================  ====  ======  =========  ============  ======  ==============
pnode, discrete           5     1e-6    4.7e-7     401           65      5e-16
pnode, discrete, 8 kB     5     1e-6    4.7e-7     808           120     5e-16
pnode, continuous         5     1e-6    3.6e-4     595           82      3.6e-4
torchdiffeq, backprop     5     1e-6    6.7e-7                   82
torchdiffeq, continuous   5     1e-6    8.4e-4                   162
pnode, discrete           13    1e-6    1.0e-6     995           270     4e-16
pnode, continuous         13    1e-6    691        1591          314     691
torchdiffeq, backprop     13    1e-6    1.7e-6                   209
torchdiffeq, continuous   13    1e-6    917                      471
pnode, discrete           5     1e-2    5.7e-4     94            23      7e-16
pnode, continuous         5     1e-2    0.92       118           23      0.92
torchdiffeq, continuous   5     1e-2    10.9                     54
========================  ====  ======  =========  ============  ======  ==============

("evaluations" has those of f and products with its Jacobian.) Twelve coefficients learned by BFGS
at a tolerance of 1e-3: after 40 iterations the loss is 4e-10 by the discrete adjoint and 1.4e-4 by
the continuous one, whose line search finds nothing better. With ``--rate 50`` the backward solve of
the continuous adjoint overflows. What did not work: a spiral without the signal. There the
continuous adjoint does well, since a Runge-Kutta method keeps the slow plane of a linear autonomous
system exactly, and nothing but round-off is there to grow. And a small loss is not yet the truth:
the coefficients are still 7 % off, as final states say little about the actuator's first moments.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from operator import itemgetter
from typing import Any

import torch
from gallery_common import (
    Outcome,
    arguments,
    at_least,
    figure,
    launch,
    measure,
    peer,
    train,
)

import pnode

DAMPING, SPEED, PUSH, FREQUENCY = 0.05, 1.0, 0.3, 2.0  # a, w, k
STATES = 16
TOLERANCE, HORIZON = 1e-6, 5.0  # where the other one is varied
LOOSE = 1e-3  # tolerance of the training
NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1)  # Dormand & Prince's method
STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
)
WEIGHTS = (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84)


# ------------------------------------------------------------------------------------ the system


def swing(rate: float) -> torch.Tensor:
    """Return A and, in a fourth column, b."""
    return torch.tensor(
        [
            [-DAMPING, -SPEED, PUSH, 0.0],
            [SPEED, -DAMPING, 0.0, 0.0],
            [0.0, 0.0, -rate, rate],
        ],
        dtype=torch.float64,
    )


class Field(torch.nn.Module):
    """y' = A y + b cos(2 t) for every row of the state."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix.clone())

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y @ self.matrix[:, :3].T + self.matrix[:, 3] * torch.cos(FREQUENCY * t)


class Problem:
    """Initial states, and where they are to be at the end."""

    def __init__(self, generator: torch.Generator) -> None:
        self.start = torch.randn(STATES, 3, generator=generator, dtype=torch.float64)
        self.target = torch.randn(STATES, 3, generator=generator, dtype=torch.float64)

    def loss(self, end: torch.Tensor) -> torch.Tensor:
        """Return the loss of the final states."""
        return 0.5 * (end - self.target).square().mean()


# ------------------------------------------------------------------------------------- gradients


def span(horizon: float) -> torch.Tensor:
    """Return the two output times."""
    return torch.tensor([0.0, horizon], dtype=torch.float64)


def exact_end(problem: Problem, matrix: torch.Tensor, horizon: float) -> torch.Tensor:
    """The final states of the linear system of y, cos(2 t) and sin(2 t), differentiably."""
    clock = torch.zeros(2, 5, dtype=torch.float64)
    clock[0, 4], clock[1, 3] = -FREQUENCY, FREQUENCY
    whole = torch.cat([torch.cat([matrix, torch.zeros(3, 1, dtype=torch.float64)], dim=1), clock])
    signal = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(STATES, 2)
    begin = torch.cat([problem.start, signal], dim=1)
    end: torch.Tensor = begin @ torch.linalg.matrix_exp(horizon * whole).T
    return end[:, :3]


def true_gradient(problem: Problem, matrix: torch.Tensor, horizon: float) -> torch.Tensor:
    """The gradient of the exact solution."""
    leaf = matrix.clone().requires_grad_()
    return torch.autograd.grad(problem.loss(exact_end(problem, leaf, horizon)), leaf)[0]


def replayed_gradient(problem: Problem, matrix: torch.Tensor, times: list[float]) -> torch.Tensor:
    """Autograd through the steps of dopri5 between given times."""
    field, y = Field(matrix), problem.start
    for before, after in pairwise(times):
        step, slopes = after - before, list[torch.Tensor]()
        for node, row in zip(NODES, STAGES, strict=True):
            stage = y + step * sum(a * k for a, k in zip(row, slopes, strict=True))
            slopes.append(field(torch.tensor(before + node * step, dtype=torch.float64), stage))
        y = y + step * sum(weight * k for weight, k in zip(WEIGHTS, slopes, strict=True))
    return torch.autograd.grad(problem.loss(y), field.matrix)[0]


def pnode_solver(field: Field, rtol: float, **more: Any) -> pnode.Solver:
    """Return dopri5 with a tolerance."""
    steps = pnode.Steps(rtol=rtol, atol=rtol, max_steps=20_000)
    return pnode.Solver(field, method="dopri5", steps=steps, compile=False, **more)


def pnode_gradient(
    problem: Problem, matrix: torch.Tensor, horizon: float, rtol: float, **more: Any
) -> tuple[torch.Tensor, pnode.Stats, list[float]]:
    """Return pnode's gradient, what it took, and the times between the steps of the solve."""
    field, times = Field(matrix), list[float]()
    solver = pnode_solver(field, rtol, monitor=lambda step, t, y: times.append(t), **more)
    solution = solver(problem.start, span(horizon))
    grid = sorted({0.0, *times})  # the continuous adjoint is a solve with steps of its own
    problem.loss(solution.ys[-1]).backward()
    assert field.matrix.grad is not None
    return field.matrix.grad, solution.stats, grid


def torchdiffeq_gradient(
    solve: Any, problem: Problem, matrix: torch.Tensor, horizon: float, rtol: float
) -> torch.Tensor:
    """The gradient of torchdiffeq: ``odeint`` backpropagates, ``odeint_adjoint`` integrates."""
    field = Field(matrix)
    ys = solve(field, problem.start, span(horizon), method="dopri5", rtol=rtol, atol=rtol)
    problem.loss(ys[-1]).backward()
    assert field.matrix.grad is not None
    return field.matrix.grad


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error of a gradient."""
    return float((found - expected).norm() / expected.norm())


def compare(
    problem: Problem, matrix: torch.Tensor, horizon: float, rtol: float, package: Any
) -> list[dict[str, Any]]:
    """Return a row for each way to the gradient."""
    truth = true_gradient(problem, matrix, horizon)
    rows: list[dict[str, Any]] = []
    setting = {"T": horizon, "rtol": rtol}
    small = pnode.Checkpointing(memory="8kB")
    ways: dict[str, dict[str, Any]] = {
        "pnode, discrete": {}, "pnode, discrete, 8 kB": {"checkpointing": small},
        "pnode, continuous": {"gradient": "continuous"},
    }  # fmt: skip
    for name, more in ways.items():
        row: dict[str, Any] = {"adjoint": name, **setting}
        rows.append(row)
        try:
            measured = measure(partial(pnode_gradient, problem, matrix, horizon, rtol, **more))
        except pnode.SolveError as error:
            row["failed"] = type(error).__name__
            continue
        found, stats, times = measured.value
        row["error"] = difference(found, truth)
        row["from its numbers'"] = difference(found, replayed_gradient(problem, matrix, times))
        row["f and products"] = stats.rhs + stats.backward.rhs + stats.backward.vjp
        row["CPU ms"] = 1e3 * measured.cpu_seconds
    for name, solve in (("backprop", "odeint"), ("continuous", "odeint_adjoint")):
        if package is not None:
            call = partial(torchdiffeq_gradient, getattr(package, solve))
            measured = measure(partial(call, problem, matrix, horizon, rtol))
            found, cpu = measured.value, 1e3 * measured.cpu_seconds
            rows.append(
                {
                    "adjoint": f"torchdiffeq, {name}",
                    **setting,
                    "error": difference(found, truth),
                    "CPU ms": cpu,
                }
            )
    return rows


# --------------------------------------------------------------------------------- the training


def learn(
    problem: Problem, matrix: torch.Tensor, kind: str, options: argparse.Namespace
) -> tuple[list[float], float]:
    """Fit A and b to final states by BFGS at a loose tolerance; return losses, and the error."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    noise = torch.randn(matrix.shape, generator=generator, dtype=torch.float64)
    field = Field(matrix + 0.2 * noise)
    solver = pnode_solver(field, LOOSE, gradient=kind)
    found = train(
        field,
        lambda: problem.loss(solver(problem.start, span(HORIZON)).ys[-1]),
        options,
        label=kind,
        constant=True,
        optimizer=lambda tensors: torch.optim.LBFGS(
            tensors,
            lr=1.0,
            max_iter=1,
            max_eval=25,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        ),
    )
    return found.losses, difference(field.matrix.detach(), matrix)


# ----------------------------------------------------------------------------------- the program


def backwards(problem: Problem, matrix: torch.Tensor, horizon: float) -> dict[str, torch.Tensor]:
    """Return y3 of one solution, forwards and integrated back from its end."""
    times = torch.linspace(0.0, horizon, 241, dtype=torch.float64)
    with torch.no_grad():
        solver = pnode_solver(Field(matrix), TOLERANCE)
        forward = solver(problem.start, times).ys
        back = solver(forward[-1], times.flip(0)).ys.flip(0)
    return {"t": times, "forward": forward[:, 0, 2], "back": back[:, 0, 2]}


def draw(numbers: dict[str, Any], rows: list[dict[str, Any]], path: dict[str, torch.Tensor]) -> Any:
    """Draw the path backwards, the errors, and the two trainings."""
    drawn, axes = figure(
        2, 2, "Gradients through a contracting system: what the continuous adjoint costs"
    )
    axis = axes[0, 0]
    axis.plot(path["t"], path["forward"], color="0.75", lw=5, label="forward solution")
    axis.plot(path["t"], path["back"], color="C0", lw=1.5, label="integrated back from its end")
    axis.set(xlabel="time t", ylabel="actuator $y_3$", ylim=(-3, 3))
    axis.set_title(f"what the continuous adjoint sees (tolerance {TOLERANCE:g})")
    axis.legend(fontsize=8, loc="lower right")
    styles = {
        "pnode, continuous": ("C0", "o-"), "torchdiffeq, continuous": ("C1", "s--"),
        "pnode, discrete": ("C3", "o-"),
    }  # fmt: skip
    for axis, name, fixed, value in (
        (axes[0, 1], "T", "rtol", TOLERANCE), (axes[1, 0], "rtol", "T", HORIZON),
    ):  # fmt: skip
        for adjoint, (color, style) in styles.items():
            chosen = [row for row in rows if row["adjoint"] == adjoint and row[fixed] == value]
            chosen = sorted((row for row in chosen if "error" in row), key=itemgetter(name))
            points = [row[name] for row in chosen]
            keywords = {"color": color, "ms": 3.5}
            axis.plot(points, [row["error"] for row in chosen], style, label=adjoint, **keywords)
            if adjoint == "pnode, discrete":
                own = [row["from its numbers'"] for row in chosen]
                label = "pnode, discrete, from the gradient\nof the numbers it returned"
                axis.plot(points, own, "v:", label=label, **keywords)
        axis.set_yscale("log")
        axis.axhline(1.0, color="0.3", lw=0.8)
        axis.set_ylim(1e-17, 1e8)
        axis.set_ylabel("relative error of the gradient")
    axes[0, 1].set(xlabel="final time T", title=f"error against T, tolerance {TOLERANCE:g}")
    axes[1, 0].set(
        xlabel="tolerance", xscale="log", title=f"error against tolerance, T = {HORIZON:g}"
    )
    axes[0, 1].legend(fontsize=7, loc="center right", bbox_to_anchor=(1.0, 0.27))
    axis = axes[1, 1]
    for kind, color in (("continuous", "C0"), ("discrete", "C3")):
        axis.semilogy(numbers["losses"][kind], color=color, label=f"{kind} adjoint")
    axis.set(xlabel="iteration of BFGS", ylabel="loss")
    axis.set_title(f"12 coefficients learned, tolerance {LOOSE:g}, T = {HORIZON:g}")
    axis.legend(fontsize=8)
    for axis in axes.flat:
        axis.title.set_fontsize(10)
    return drawn


def run(options: argparse.Namespace) -> Outcome:
    """Compare the gradients, and train by both."""
    problem = Problem(torch.Generator().manual_seed(options.seed))
    matrix, package = swing(options.rate), peer("torchdiffeq")
    measure(lambda: compare(problem, matrix, 1.0, 1e-2, package))  # imports what is needed
    settings = [(float(end), TOLERANCE) for end in ((1, 12) if options.quick else range(1, 17))]
    tolerances = [10.0**-digits for digits in ((2, 4) if options.quick else range(2, 11))]
    settings += [(HORIZON, rtol) for rtol in tolerances if (HORIZON, rtol) not in settings]
    rows = [row for each in settings for row in compare(problem, matrix, *each, package)]

    problem.target = exact_end(problem, matrix, HORIZON)
    losses, found = {}, {}
    for kind in ("discrete", "continuous"):
        try:
            losses[kind], found[kind] = learn(problem, matrix, kind, options)
        except pnode.SolveError as error:
            print(f"training with the {kind} adjoint failed: {error}")
            losses[kind], found[kind] = [], math.nan
    numbers = {"losses": losses, "error of A and b": found, "gradients": rows}
    shown = [row for row in rows if (row["T"], row["rtol"]) in settings[::4]]
    path = backwards(problem, matrix, 12.0)
    return Outcome(numbers, shown, lambda: draw(numbers, rows, path))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this example's own options."""
    parser.add_argument(
        "--rate", type=at_least(float, 0), default=2.0, help="how fast the actuator is (2)"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    return arguments(
        "gradients", __doc__, argv, iterations=40, quick={"iterations": 8}, add=add_options
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

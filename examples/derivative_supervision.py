"""Supervision by derivatives, and a low-order step that is learned.

Neural differential operators (Gong, Meng, Wang & Liu, "Incorporating NODE with pre-trained neural
differential operator for learning dynamics", Neurocomputing 2023) add derivatives to the loss of a
neural ODE. Here a stiff linear system is learned from noisy states

::

    y' = A y,   A = R diag(-1, -200) R^-1,   loss = |y - data|^2 + weight |W y - derivatives|^2

by a matrix W, with radau3 and steps of 0.1, from output to output. The states say nothing of the
fast rate, which is over after the first step; the slopes at the outputs do.

The second part is in the spirit of Taylor-Lagrange networks (Djeumou et al., "Taylor-Lagrange
neural ordinary differential equations", IJCAI 2022): a step of low order whose remainder is learned
for one problem and one step size. The explicit step of two evaluations

::

    y + h ((1 - b) f(y) + b f(y + a h f(y)))

has order 1 for all a and b, and order 2 where 2 a b = 1. a and b are learned from pairs of states
of a pendulum, registered by ``pnode.tableau`` as a method of one's own, and then solve, with the
exact adjoint, beside midpoint and heun2, on starts that were not learned from.

Run it (three quarters of a minute of CPU time on one core)::

    python examples/derivative_supervision.py

The peer of the first part is torchdiffeq's dopri5 at rtol = 1e-6 with the same loss, as neural
differential operators are trained; the baseline a regression of the derivatives on the noisy states
as they are, without any solve. Measured with pnode 0.2.0 and torchdiffeq 0.2.5 on 2026-11-30, seed
0, 60 iterations of L-BFGS from rates of -2 and -20; f, time and memory are those of one gradient at
the end, relative to pnode's 75 ms and 0.05 MiB:

===================================  =========  =========  ====  ====  ===
supervised by                        slow rate  fast rate  f     CPU   MiB
===================================  =========  =========  ====  ====  ===
truth                                -1         -200
regression, no solve                 -0.996     -182
states alone, pnode                  -0.997     -32.9      140   1     1
states and derivatives, pnode        -0.996     -199.6     140   1     1
states alone, torchdiffeq            -0.997     -86.7      494   2.1   79
states and derivatives, torchdiffeq  -0.997     -199.9     1004  4.8   141
===================================  =========  =========  ====  ====  ===

(Nor is the fast rate that dopri5 finds in the states alone that of the system: either is where the
iterations ended. Training takes 3.9 s with pnode, 11.4 with torchdiffeq.)

The learned step has a = 1.318, b = 0.381 (2 a b = 1.004). Root mean square errors of 100 fresh
pendulums at t = 8, by the step size; it was learned for 0.4:

============  =====  ======  ======  ======
method        0.8    0.4     0.2     0.1
============  =====  ======  ======  ======
midpoint      0.303  0.0812  0.0216  0.0056
heun2         0.284  0.0715  0.0191  0.0050
learned step  0.309  0.0667  0.0182  0.0050
============  =====  ======  ======  ======

What did not work: two coefficients are few. The error is 7 % below heun2's at the step that was
learned, and not below it at twice that; the error of the gradient is 10 % larger there. A network
for the remainder, as in the paper, would not be a Runge-Kutta method, and ``pnode.tableau`` has
none of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gallery_common import (
    DATA,
    LEARNED,
    TRUTH,
    Outcome,
    arguments,
    at_least,
    figure,
    launch,
    measure,
    peer,
    train,
)
from gallery_physics import Counted

import pnode

DOUBLE = torch.float64
SLOW, FAST, STEP = -1.0, -200.0, 0.1
NOISE = 0.01  # of states, and of derivatives relative to their size
TIMES = torch.linspace(0.0, 2.0, 21, dtype=DOUBLE)
COARSE = 0.4  # step size of the learned step
TOLERANCE = {"rtol": 1e-6, "atol": 1e-8}  # of torchdiffeq's dopri5


DIRECTIONS = torch.tensor([[1.0, 1.0], [0.5, -1.0]], dtype=DOUBLE)  # columns: slow and fast


def system() -> torch.Tensor:
    """Return A."""
    rates = torch.diag(torch.tensor([SLOW, FAST], dtype=DOUBLE))
    result: torch.Tensor = DIRECTIONS @ rates @ torch.linalg.inv(DIRECTIONS)
    return result


class Linear(torch.nn.Module):
    """y' = W y for rows y of the state."""

    def __init__(self, matrix: torch.Tensor) -> None:
        super().__init__()
        self.matrix = torch.nn.Parameter(matrix.clone())

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y @ self.matrix.T

    def rates(self) -> list[float]:
        """Return the eigenvalues, the slow one first."""
        values = torch.linalg.eigvals(self.matrix.detach()).real.sort(descending=True).values
        result: list[float] = values.tolist()
        return result


class Measurements:
    """Noisy states (T, N, 2) of the system at TIMES and noisy derivatives."""

    def __init__(self, generator: torch.Generator) -> None:
        exact = system()
        parts = torch.randn((8, 2), generator=generator, dtype=DOUBLE)
        near = parts * torch.tensor([1.0, 0.1], dtype=DOUBLE)  # the slow direction
        self.starts = near @ DIRECTIONS.T
        states = torch.stack(
            [self.starts @ torch.linalg.matrix_exp(time * exact).T for time in TIMES]
        )
        slopes = states @ exact.T
        self.deviation = NOISE * slopes.square().mean().sqrt()  # of the derivatives
        self.states = states + NOISE * torch.randn(states.shape, generator=generator, dtype=DOUBLE)
        drawn = torch.randn(states.shape, generator=generator, dtype=DOUBLE)
        self.slopes = slopes + self.deviation * drawn

    def loss(self, field: Callable[..., torch.Tensor], ys: torch.Tensor, weight: float) -> Any:
        """Return the misfit of states and, with a weight, that of the derivatives there."""
        misfit = ((ys - self.states) / NOISE).square().mean()
        if not weight:
            return misfit
        # The derivative at an output is f of its state, with gradients through the solve.
        wrong = (field(TIMES, ys) - self.slopes) / self.deviation
        return misfit + weight * wrong.square().mean()

    def regression(self) -> Linear:
        """Return W of least squares, derivatives on states as they are: nothing is solved."""
        found = torch.linalg.lstsq(self.states.flatten(0, 1), self.slopes.flatten(0, 1)).solution
        return Linear(found.T)


def supervised(
    weight: float, data: Measurements, options: argparse.Namespace, odeint: Any = None
) -> tuple[Linear, dict[str, Any]]:
    """Learn W with derivatives of a weight, by pnode or torchdiffeq; return a row of the table."""
    learned = Linear(torch.tensor([[-2.0, 0.0], [0.0, -20.0]], dtype=DOUBLE))
    field = Counted(learned)
    solver = pnode.Solver(field, method="radau3", step_size=STEP, jacobian="block", compile=False)

    def loss() -> torch.Tensor:
        if odeint is None:
            ys = solver(data.starts, TIMES).ys
        else:
            ys = odeint(field, data.starts, TIMES, method="dopri5", **TOLERANCE)
        result: torch.Tensor = data.loss(learned, ys, weight)
        return result

    label = f"weight {weight:g}{'' if odeint is None else ' peer'}".replace(" ", "-")
    training = train(
        learned, loss, options, label=label, constant=True,
        optimizer=lambda parts: torch.optim.LBFGS(
            parts, max_iter=10, line_search_fn="strong_wolfe"
        ),
    )  # fmt: skip
    slow, fast = learned.rates()

    def gradient() -> int:
        field.calls = 0
        torch.autograd.grad(loss(), learned.matrix)
        return field.calls

    found = measure(gradient, 3, in_use=True)
    return learned, {
        "slow rate": slow, "fast rate": fast, "CPU s of training": training.cpu_seconds,
        "CPU ms of a gradient": 1e3 * found.cpu_seconds, "MiB": found.peak_mib, "f": found.value,
    }  # fmt: skip


def pendulum(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    angle, speed = y.unbind(-1)
    return torch.stack([speed, -torch.sin(angle)], dim=-1)


def starts_of(number: int, generator: torch.Generator) -> torch.Tensor:
    return 2.0 * torch.rand((number, 2), generator=generator, dtype=DOUBLE) - 1.0


def learned_step(
    options: argparse.Namespace, generator: torch.Generator
) -> tuple[tuple[float, float], list[float]]:
    """Learn a and b from one accurate step of COARSE from many starts."""
    y = starts_of(500, generator)
    with torch.no_grad():
        end = pnode.Solver(pendulum, rtol=1e-10, atol=1e-12)(y, [0.0, COARSE]).ys[-1]
    first = pendulum(TIMES[0], y)
    ab = torch.nn.Parameter(torch.tensor([0.5, 1.0], dtype=DOUBLE))  # the midpoint rule

    def loss() -> torch.Tensor:
        a, b = ab.unbind()
        second = pendulum(TIMES[0], y + a * COARSE * first)
        step = y + COARSE * ((1.0 - b) * first + b * second)
        return ((step - end) / COARSE**3).square().mean()

    found = train(
        [ab], loss, options, label="step", constant=True,
        optimizer=lambda parts: torch.optim.LBFGS(
            parts, max_iter=20, line_search_fn="strong_wolfe"
        ),
    )  # fmt: skip
    a, b = ab.tolist()
    return (a, b), found.losses


def by_steps(
    methods: Sequence[str], options: argparse.Namespace, generator: torch.Generator
) -> list[dict[str, Any]]:
    """Return errors of states and gradients at several step sizes, on fresh starts."""
    starts = starts_of(100, generator).requires_grad_()
    times = torch.tensor([0.0, options.end], dtype=DOUBLE)

    def solve(**keywords: Any) -> tuple[torch.Tensor, torch.Tensor, pnode.Solution]:
        solution = pnode.Solver(pendulum, compile=False, **keywords)(starts, times)
        (slope,) = torch.autograd.grad(solution.ys[-1, :, 0].sum(), starts)
        return solution.ys[-1].detach(), slope, solution

    truth, exact, _ = solve(method="dopri8", rtol=1e-9, atol=1e-11)
    rows = []
    for method in methods:
        for size in (2 * COARSE, COARSE, COARSE / 2, COARSE / 4):
            end, slope, solution = solve(method=method, step_size=size)
            rows.append(
                {"run": method, "step": size, "error": (end - truth).square().mean().sqrt().item(),
                 "gradient": (slope - exact).square().mean().sqrt().item(),
                 "rhs": solution.stats.rhs}
            )  # fmt: skip
    return rows


def run(options: argparse.Namespace) -> Outcome:
    """Learn with and without derivatives, then learn a step."""
    generator = torch.Generator().manual_seed(options.seed)
    data = Measurements(generator)
    slow, fast = data.regression().rates()
    rows: list[dict[str, Any]] = [{"run": "regression", "slow rate": slow, "fast rate": fast}]
    learned = {}
    runs: list[tuple[str, float, Any]] = [
        ("states alone", 0.0, None), ("states and derivatives", 1.0, None)
    ]  # fmt: skip
    torchdiffeq = peer("torchdiffeq")
    if torchdiffeq is not None:
        runs += [(f"{name}, torchdiffeq", weight, torchdiffeq.odeint) for name, weight, _ in runs]
    for name, weight, odeint in runs:
        learned[name], row = supervised(weight, data, options, odeint)
        rows.append({"run": name, **row})
    found = {row["run"]: row for row in rows}
    (a, b), _ = learned_step(options, generator)
    pnode.tableau("learned2", [[0.0, 0.0], [a, 0.0]], [1.0 - b, b], [0.0, a])
    steps = by_steps(("midpoint", "heun2", "learned2"), options, generator)
    errors = {row["run"]: row["error"] for row in steps if row["step"] == COARSE}
    both = found["states and derivatives"]
    numbers = {
        "fast_states": found["states alone"]["fast rate"], "fast_derivatives": both["fast rate"],
        "slow_derivatives": both["slow rate"], "fast_regression": fast,
        "a": a, "b": b, "two_a_b": 2.0 * a * b, "errors": errors,
    }  # fmt: skip
    rows += steps
    return Outcome(numbers, rows, lambda: draw(learned, steps))


def draw(learned: dict[str, Linear], steps: list[dict[str, Any]]) -> Any:
    """Show the fast part of a solution, and errors by the step size."""
    drawn, axes = figure(1, 2, "Derivatives in the loss, and a learned step")
    times = torch.linspace(0.0, 0.04, 81, dtype=DOUBLE)
    start = DIRECTIONS @ torch.tensor([1.0, 0.1], dtype=DOUBLE)
    first, second = axes[0]

    def path(matrix: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.linalg.matrix_exp(time * matrix) @ start for time in times])[:, 1]

    first.plot(1e3 * times, path(system()), **TRUTH)
    styles: dict[str, dict[str, Any]] = {
        "states alone": {"color": "C0", "lw": 1.6}, "states and derivatives": LEARNED,
    }  # fmt: skip
    for name, style in styles.items():
        first.plot(1e3 * times, path(learned[name].matrix.detach()), **{**style, "label": name})
    first.plot([0.0], start[1:], **{**DATA, "label": "first output; the next is at 100"})
    first.set(title="stiff linear system, before the second output", xlabel="1000 x time",
              ylabel="second component")  # fmt: skip
    first.legend(fontsize=8)
    for name in dict.fromkeys(row["run"] for row in steps):
        mine = [row for row in steps if row["run"] == name]
        label = "learned step (of order 1)" if name == "learned2" else name
        second.loglog(
            [row["step"] for row in mine], [row["error"] for row in mine], "o-", label=label
        )
    sizes = sorted({row["step"] for row in steps})
    second.set_xticks(sizes, [f"{size:g}" for size in sizes])
    second.minorticks_off()
    second.axvline(COARSE, color="black", ls=":", lw=1.0, label="step that was learned")
    second.set(title="pendulum: methods of two evaluations a step", xlabel="step size",
               ylabel="error at the end (rms)")  # fmt: skip
    second.legend(fontsize=8)
    return drawn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--end", type=at_least(float, 1), default=8.0,
                            help="end of the pendulum's solves (8)")  # fmt: skip

    quick = {"iterations": 2, "end": 4.0}
    return arguments("derivative_supervision", __doc__, argv, iterations=6, quick=quick, add=add)


def main(argv: Sequence[str] | None = None) -> int:
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

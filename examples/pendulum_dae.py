"""A pendulum in Cartesian coordinates, whose drag is learned through a DAE solver.

A mass on a rod of length 1, with the tension s of the rod as an unknown of its own::

    x' = u,    y' = v,    u' = -s x - phi(w) u,    v' = -s y - g - phi(w) v,    w = |(u, v)|
    0 = u^2 + v^2 - g y - phi(w) (x u + y v) - s (x^2 + y^2)

The last equation is x^2 + y^2 = 1 differentiated twice, which leaves a differential-algebraic
equation of index 1 (E. Hairer & G. Wanner, "Solving Ordinary Differential Equations II", chapter
VII): M y' = f with M = diag(1, 1, 1, 1, 0). The drag phi is unknown, a network of the speed, and
learned from 31 noisy positions (5 mm) in 3 s. The method is adaptive BDF; the gradient is the
discrete adjoint of its steps, and the start's tension is solved for, differentiably
(``consistent_start=True``). Truth: phi = 0.05 + 0.15 w.

torchdiffeq has no method for M y' = f with a singular M. Its rows are of the ODE that is left
when the tension is eliminated by hand, which works for one rod and is the index reduction's last
step.

Differentiated constraints drift: how far x^2 + y^2 is from 1 is measured for three tolerances.

Run it::

    python examples/pendulum_dae.py

Measured with pnode 0.2.0 and torchdiffeq 0.2.5 on 2026-11-30, seed 0, one thread (22 s of CPU).
From 3 to 9 s the path is 3.4 mm off with the learned drag and 81 mm with the untrained one; the
drag itself is 8.7 % off, most at low speeds, which say little about it. Drift of the rod's length
over 3 s, CPU time relative to the first line's 0.18 s:

========================  ======  =======  =====  ====  ====
method                    rtol    drift    steps  f     CPU
========================  ======  =======  =====  ====  ====
bdf, DAE                  1e-4    3.4e-4   131    208   1
bdf, DAE                  1e-6    1.1e-5   249    402   1.4
bdf, DAE                  1e-8    8.4e-7   529    840   3.0
radau5, DAE               1e-4    7.1e-6   61     519   1.1
radau5, DAE               1e-6    6.3e-9   187    1578  3.0
radau5, DAE               1e-8    1.1e-11  589    5350  8.9
dopri5, tension solved    1e-4    2.1e-3   27     235   0.25
dopri5, tension solved    1e-6    2.3e-6   59     483   0.51
dopri5, tension solved    1e-8    2.6e-8   136    917   0.95
========================  ======  =======  =====  ====  ====

One gradient of the ODE without the tension by dopri5, relative to pnode's 0.24 s and 12 MiB; that
of the DAE itself, in machine code, takes 11 ms:

==========================  ======  ===  ====  ====
gradient by                 error   f    CPU   MiB
==========================  ======  ===  ====  ====
pnode, not compiled         9.7e-5  343  1     1
torchdiffeq odeint          4.3e-4  272  0.97  0.94
torchdiffeq odeint_adjoint  4.0e-4  884  2.8   0.18
==========================  ======  ===  ====  ====

What did not work: a speed without a floor under its root has no derivative at rest, which pnode
refuses with an error that names the algebraic equation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from gallery_common import (
    DATA,
    LEARNED,
    TRUTH,
    Outcome,
    arguments,
    figure,
    launch,
    measure,
    mlp,
    train,
)  # fmt: skip
from gallery_physics import compare_gradients, polish

import pnode

GRAVITY, DRAG = 9.81, (0.05, 0.15)
SPAN, OBSERVED, AHEAD, NOISE = 3.0, 30, 9.0, 0.005
WIDTH = 8
START = torch.tensor([0.96, -0.28, 0.0, 0.0, 0.0], dtype=torch.float64)  # 74 degrees, at rest
MASS = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
TOLERANCES = (1e-4, 1e-6, 1e-8)


class Drag(torch.nn.Module):
    """phi of the speed, positive: the truth, or a network."""

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.net = None if seed is None else mlp(
            1, WIDTH, 1, generator=torch.Generator().manual_seed(seed)
        )  # fmt: skip

    def forward(self, speed: torch.Tensor) -> torch.Tensor:
        if self.net is None:
            return DRAG[0] + DRAG[1] * speed
        result: torch.Tensor = self.net(speed[..., None] / 3.0)[..., 0]
        return torch.nn.functional.softplus(result - 1.0)


class Pendulum(torch.nn.Module):
    """f of M y' = f; with ``reduced`` the ODE of (x, y, u, v), the tension eliminated."""

    def __init__(self, drag: Drag, reduced: bool = False) -> None:
        super().__init__()
        self.drag, self.reduced = drag, reduced

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        x, y, u, v = state[:4]
        phi = self.drag(torch.sqrt(u * u + v * v + 1e-12))  # at rest sqrt has no derivative
        pull = u * u + v * v - GRAVITY * y - phi * (x * u + y * v)
        s = pull / (x * x + y * y) if self.reduced else state[4]
        rates = [u, v, -s * x - phi * u, -s * y - GRAVITY - phi * v]
        return torch.stack(rates if self.reduced else [*rates, pull - s * (x * x + y * y)])


def make_solver(
    drag: Drag, method: str = "bdf", rtol: float = 1e-5, **keywords: Any
) -> pnode.Solver:
    """Return the solver of the DAE, or, with an explicit method, of the reduced ODE."""
    shared = {"method": method, "rtol": rtol, "atol": 0.01 * rtol, "max_steps": 20_000, **keywords}
    if method == "dopri5":
        return pnode.Solver(Pendulum(drag, reduced=True), **shared)
    return pnode.Solver(Pendulum(drag), mass=MASS, consistent_start=True, **shared)


def times(end: float, number: int) -> torch.Tensor:
    """Return output times from 0."""
    return torch.linspace(0.0, end, number + 1, dtype=torch.float64)


def drift(states: torch.Tensor) -> float:
    """Return the largest distance of x^2 + y^2 from 1."""
    return (states[:, :2].square().sum(1) - 1.0).abs().max().item()


def drifts(drag: Drag, quick: bool) -> list[dict[str, Any]]:
    """Measure drifts, steps and times of methods and tolerances."""
    rows = []
    for method in ("bdf", "dopri5") if quick else ("bdf", "radau5", "dopri5"):
        for rtol in TOLERANCES[:2] if quick else TOLERANCES:
            solver = make_solver(drag, method, rtol, compile=False)
            start = START[:4] if method == "dopri5" else START
            with torch.no_grad():
                measured = measure(lambda s=solver, y0=start: s(y0, times(SPAN, 3)))  # type: ignore[misc]
            stats = measured.value.stats
            rows.append({
                "what": f"{method}, rtol {rtol:g}", "drift": drift(measured.value.ys),
                "steps": stats.steps, "f": stats.rhs, "CPU ms": 1e3 * measured.cpu_seconds,
            })  # fmt: skip
    return rows


def run(options: argparse.Namespace) -> Outcome:
    """Learn the drag, forecast, and measure."""
    generator = torch.Generator().manual_seed(options.seed)
    t, long = times(SPAN, OBSERVED), times(AHEAD, 10 * int(AHEAD))
    exact = make_solver(Drag(), "dopri5", 1e-10)
    with torch.no_grad():
        clean, truth = exact(START[:4], t).ys[:, :2], exact(START[:4], long).ys
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    observed = clean + NOISE * noise
    drag = Drag(options.seed)
    solver = make_solver(drag, compile=True)

    def loss(solve: Any = lambda y0, times: solver(START, times).ys) -> torch.Tensor:
        result: torch.Tensor = ((solve(START[:4], t)[:, :2] - observed) / NOISE).square().mean()
        return result

    gradient = lambda: torch.autograd.grad(loss(), [*drag.parameters()])  # noqa: E731
    measured = measure(gradient, 3, warm_up=True)
    gradients = compare_gradients(
        Pendulum(drag, reduced=True), loss, list(drag.parameters()), method="dopri5", rtol=1e-5,
        atol=1e-7, quick=options.quick,
    )  # fmt: skip
    training = train(drag, loss, options, rate=0.05, label="drag", clip=10.0)
    polished = polish(drag, loss, options, options.iterations // 2)
    with torch.no_grad():
        learned = make_solver(drag, rtol=1e-7, compile=False)(START, long)
        nothing = make_solver(Drag(options.seed), "dopri5")(START[:4], long).ys
    speeds = truth[: 10 * int(SPAN), 2:4].norm(dim=1)
    error = drag(speeds).detach() - Drag()(speeds)
    ahead = long > SPAN
    paths = {
        name: (states[ahead, :2] - truth[ahead, :2]).square().sum(1).mean().sqrt().item()
        for name, states in (("learned", learned.ys), ("untrained", nothing))
    }
    rows: list[dict[str, Any]] = [
        {"what": f"{name} drag, path from {SPAN:g} to {AHEAD:g} s", "error": value}
        for name, value in paths.items()
    ]
    rows += drifts(drag, options.quick)
    rows.append({"what": "gradient, pnode, DAE by bdf", "CPU ms": 1e3 * measured.cpu_seconds,
                 "MiB": measured.peak_mib})  # fmt: skip
    rows += gradients
    numbers = {
        "drag_error": (error.square().mean() / Drag()(speeds).square().mean()).sqrt().item(),
        "path_errors": paths, "drift": drift(learned.ys), "misfit": polished.losses[-1],
        "newton": learned.stats.newton, "steps": learned.stats.steps,
        "first_loss": training.losses[0],
        "drifts": rows[2 : 2 + (4 if options.quick else 9)],
    }  # fmt: skip
    return Outcome(numbers, rows, lambda: draw(t, observed, long, truth, learned.ys, drag, rows))


def draw(
    t: torch.Tensor, observed: torch.Tensor, long: torch.Tensor, truth: torch.Tensor,
    learned: torch.Tensor, drag: Drag, rows: list[dict[str, Any]],
) -> Any:  # fmt: skip
    """Draw the path, the drag, and the drift."""
    title = "A pendulum's drag, learned through a differential-algebraic equation"
    drawn, axes = figure(1, 3, title, figsize=(13.5, 4.2))
    axis = axes[0, 0]
    axis.plot(long, truth[:, 0], **TRUTH)
    axis.plot(t, observed[:, 0], **{**DATA, "ms": 3.5})
    axis.plot(long, learned[:, 0], **LEARNED)
    axis.axvline(SPAN, color="0.4", lw=0.8)
    axis.set(title=f"{OBSERVED + 1} observations, then a forecast", xlabel="time (s)",
             ylabel="horizontal position x (m)")  # fmt: skip
    axis.legend(fontsize=8, loc="upper right")
    axis, speeds = axes[0, 1], torch.linspace(0.0, 4.5, 91, dtype=torch.float64)
    seen = truth[: 10 * int(SPAN), 2:4].norm(dim=1)
    axis.plot(speeds, Drag()(speeds), **TRUTH)
    axis.plot(speeds, drag(speeds).detach(), **LEARNED)
    axis.axvspan(float(seen.min()), float(seen.max()), color="C0", alpha=0.08, label="speeds seen")
    axis.set(title="the drag", xlabel="speed (m/s)", ylabel="phi (1/s)", ylim=(0, None))
    axis.legend(fontsize=8)
    axis = axes[0, 2]
    for method, color in (("bdf", "C0"), ("radau5", "C3"), ("dopri5", "C2")):
        found = [
            (float(r["what"].split()[-1]), r["drift"]) for r in rows if r["what"].startswith(method)
        ]
        if found:
            text = f"{method}, {'tension eliminated' if method == 'dopri5' else 'DAE'}"
            axis.loglog(*zip(*found, strict=True), "o-", color=color, ms=4, label=text)
    axis.set(title=f"drift of the rod's length after {SPAN:g} s", xlabel="rtol",
             ylabel="largest |x^2 + y^2 - 1|")  # fmt: skip
    axis.legend(fontsize=8)
    return drawn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    return arguments("pendulum_dae", __doc__, argv, iterations=30, quick={"iterations": 10})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

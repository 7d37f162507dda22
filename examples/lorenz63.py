"""Lorenz 63 with a wrong parameter, and a network that learns what is missing.

The convection model of E. N. Lorenz (1963)::

    x' = sigma (y - x),    y' = x (rho - z) - y,    z' = x y - beta z

is known with a wrong rho, 24 instead of 28. A hybrid model, equations plus a network that is
learned from the trajectory, predicts a chaotic system for longer than equations or network alone
(J. Pathak et al., "Hybrid forecasting of chaotic processes", 2018; M. Levine & A. Stuart, "A
framework for machine learning of model error in dynamical systems", 2022). Observed are 2000
states every 0.05 time units, with noise of 0.5 % of their standard deviation. Both networks
(3-24-24-3, tanh) learn from forecasts over a quarter of a time unit, from 128 random starts per
update, through rk4 with two steps per observation.

Forecasts from 50 states of another trajectory are valid until their error exceeds 0.4 of the
standard deviation; times are given in Lyapunov times, 1 / 0.906.

Run it::

    python examples/lorenz63.py

Measured with pnode 0.2.0 and torchdiffeq 0.2.5 on 2026-11-30, seed 0, one thread (26 s of CPU);
times in Lyapunov times, 50 forecasts:

=========  ==========  ========  =======  ===============
what       valid time  shortest  longest  training, CPU s
=========  ==========  ========  =======  ===============
equations  0.285       0.136     0.589
network    0.881       0.136     2.22     6.5
hybrid     2.46        0.77      5.89     8.6
=========  ==========  ========  =======  ===============

One gradient by dopri5, rtol = 1e-6, CPU time and memory relative to pnode's 107 ms and 12 MiB
without compilation; compiled is what ``compile="auto"`` comes to in a training:

==========================  ======  ===  ====  ====
gradient by                 error   f    CPU   MiB
==========================  ======  ===  ====  ====
pnode, not compiled         1.8e-7  163  1     1
pnode, dense=True           2.3e-7  159  1.1   0.98
pnode, compiled             1.8e-7  163  0.24  0.72
torchdiffeq odeint          1.1e-6  86   0.83  0.76
torchdiffeq odeint_adjoint  8.0e-7  210  3.6   0.12
==========================  ======  ===  ====  ====

The hybrid's residual is 3.2 % off the true one, 4 x in y'. What did not work: a fifth of the
training (``--quick``) leaves it at 13 %, and the network alone of no use.

The steps of the training are half an interval: with longer ones the network would learn the errors
of rk4 along with the residual, see ``modified_equation.py``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from gallery_common import LEARNED, TRUTH, Outcome, arguments, at_least, figure, launch, mlp, train
from gallery_physics import compare_gradients

import pnode

SIGMA, RHO, BETA, WRONG = 10.0, 28.0, 8.0 / 3.0, 24.0
INTERVAL, AHEAD, BATCH = 0.05, 5, 128
NOISE, WIDTH = 0.005, 24
CENTER, SCALE = torch.tensor([0.0, 0.0, 23.5]).double(), torch.tensor([7.9, 9.0, 8.6]).double()
LYAPUNOV, VALID, STARTS, LONGEST = 0.906, 0.4, 50, 12.0
NAMES = ("equations", "network", "hybrid")


class Lorenz(torch.nn.Module):
    """The equations, for rows (x, y, z)."""

    def __init__(self, rho: float = RHO) -> None:
        super().__init__()
        self.rho = rho

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        x, y, z = state.unbind(-1)
        return torch.stack([SIGMA * (y - x), x * (self.rho - z) - y, x * y - BETA * z], dim=-1)


class Network(torch.nn.Module):
    """A network alone, or beside equations."""

    def __init__(self, seed: int, equations: Lorenz | None = None) -> None:
        super().__init__()
        self.net = mlp(3, WIDTH, WIDTH, 3, generator=torch.Generator().manual_seed(seed))
        self.equations = equations
        with torch.no_grad():
            last = self.net[-1]
            assert isinstance(last, torch.nn.Linear)
            last.weight.mul_(0.1)  # at first it adds little

    def residual(self, state: torch.Tensor) -> torch.Tensor:
        """Return what the network adds; rates are an order of magnitude above the scale."""
        result: torch.Tensor = 10 * SCALE * self.net((state - CENTER) / SCALE)
        return result

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        added = self.residual(state)
        return added if self.equations is None else self.equations(t, state) + added


def trajectory(start: Sequence[float], length: int) -> torch.Tensor:
    """Return states on the attractor, every interval."""
    times = torch.arange(length + 200, dtype=torch.float64) * INTERVAL
    first = torch.tensor(start, dtype=torch.float64)
    return pnode.Solver(Lorenz(), method="verner8", rtol=1e-9, atol=1e-9)(first, times).ys[200:]


def make_solver(model: torch.nn.Module) -> pnode.Solver:
    """Return the solver of the training."""
    return pnode.Solver(model, method="rk4", step_size=INTERVAL / 2)


def window() -> torch.Tensor:
    """Return the output times of a forecast that is learned from."""
    return torch.arange(AHEAD + 1, dtype=torch.float64) * INTERVAL


def mean_square(ys: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in standard deviations."""
    return ((ys - target) / SCALE).square().mean()


def learn(model: Network, observed: torch.Tensor, options: argparse.Namespace, label: str) -> Any:
    """Train a model on forecasts from random observations."""
    generator = torch.Generator().manual_seed(options.seed)
    solver = make_solver(model)

    def loss() -> torch.Tensor:
        starts = torch.randint(len(observed) - AHEAD, (BATCH,), generator=generator)
        target = observed[starts + torch.arange(AHEAD + 1)[:, None]]
        return mean_square(solver(target[0], window()).ys, target)

    return train(model, loss, options, rate=1e-2, label=label, clip=1.0, generator=generator)


def forecast(model: torch.nn.Module, starts: torch.Tensor) -> torch.Tensor:
    """Return forecasts from rows of states, every interval: (times, starts, 3)."""
    times = torch.arange(0.0, LONGEST / LYAPUNOV, INTERVAL, dtype=torch.float64)
    with torch.no_grad():
        return pnode.Solver(model, method="rk4", step_size=INTERVAL / 4)(starts, times).ys


def valid_times(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Return the first times, in Lyapunov times, at which forecasts are off."""
    off = ((found - truth) / SCALE).square().mean(-1).sqrt() > VALID
    last = torch.ones_like(off[:1])
    return torch.cat([off, last]).int().argmax(0) * INTERVAL * LYAPUNOV


def gradients(model: Network, observed: torch.Tensor, quick: bool) -> list[dict[str, Any]]:
    """Measure the first gradient of the training beside torchdiffeq's, both by dopri5."""
    target = observed[torch.arange(BATCH) * 10 + torch.arange(AHEAD + 1)[:, None]]
    return compare_gradients(
        model, lambda solve: mean_square(solve(target[0], window()), target),
        list(model.parameters()), method="dopri5", quick=quick,
    )  # fmt: skip


def run(options: argparse.Namespace) -> Outcome:
    """Train both networks and compare forecasts."""
    generator = torch.Generator().manual_seed(options.seed)
    clean = trajectory((1.0, 1.0, 20.0), options.observations)
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    observed = clean + NOISE * SCALE * noise
    models: dict[str, Any] = {
        "equations": Lorenz(WRONG), "network": Network(options.seed),
        "hybrid": Network(options.seed, Lorenz(WRONG)),
    }  # fmt: skip
    compared = gradients(models["hybrid"], observed, options.quick)
    trainings = {n: learn(models[n], observed, options, n) for n in ("network", "hybrid")}
    other = trajectory((-3.0, -4.0, 18.0), 8 * STARTS)[::8][:STARTS]
    truth = forecast(Lorenz(), other)
    found = {name: forecast(model, other) for name, model in models.items()}
    valid = {name: valid_times(states, truth) for name, states in found.items()}
    with torch.no_grad():
        residual = models["hybrid"].residual(clean)[:, 1]
    wanted = (RHO - WRONG) * clean[:, 0]
    rows: list[dict[str, Any]] = []
    for name, values in valid.items():
        row: dict[str, Any] = {
            "what": name,
            "valid time": values.mean().item(),
            "shortest": values.min().item(),
            "longest": values.max().item(),
        }
        if name in trainings:
            row["training, CPU s"] = trainings[name].cpu_seconds
        rows.append(row)
    rows += compared
    numbers = {
        "valid_times": {name: values.mean().item() for name, values in valid.items()},
        "residual_error": ((residual - wanted).norm() / wanted.norm()).item(),
        "final_losses": {n: t.losses[-1] for n, t in trainings.items()},
    }  # fmt: skip
    return Outcome(numbers, rows, lambda: draw(truth, found, valid, clean[:, 0], residual))


def draw(
    truth: torch.Tensor, found: dict[str, torch.Tensor], valid: dict[str, torch.Tensor],
    x: torch.Tensor, residual: torch.Tensor,
) -> Any:  # fmt: skip
    """Draw one forecast, the valid times, and the learned residual."""
    title = f"Lorenz 63: equations with rho = {WRONG:g} instead of {RHO:g}, and what is learned"
    drawn, axes = figure(2, 2, title)
    grid, shown = axes[0, 0].get_gridspec(), int(valid["hybrid"].sort().indices[STARTS // 2])
    for axis in axes[0]:
        axis.remove()
    axis = drawn.add_subplot(grid[0, :])
    clock = torch.arange(len(truth)) * INTERVAL * LYAPUNOV
    colors = {"equations": "C1", "network": "C0", "hybrid": LEARNED["color"]}
    axis.plot(clock, truth[:, shown, 0], **TRUTH)
    for name, states in found.items():
        axis.plot(clock, states[:, shown, 0], color=colors[name], lw=1.2, label=name)
        axis.axvline(float(valid[name][shown]), color=colors[name], ls=":", lw=1.5)
    axis.set(title="the forecast whose hybrid lasts for the median time; dotted: valid until here",
             xlabel="Lyapunov times", ylabel="x", xlim=(0, 10))  # fmt: skip
    axis.legend(fontsize=8, ncols=4, loc="upper right")
    axis = axes[1, 0]
    boxes = axis.boxplot([valid[name] for name in NAMES], patch_artist=True)
    for box, name in zip(boxes["boxes"], NAMES, strict=True):
        box.set_facecolor(colors[name])
    axis.set_xticks([1, 2, 3], NAMES)
    axis.set(title=f"{STARTS} forecasts", ylabel="valid time (Lyapunov times)")
    axis = axes[1, 1]
    axis.plot(x, (RHO - WRONG) * x, **TRUTH)
    axis.plot(x, residual, ".", ms=2, color=LEARNED["color"], label="learned by the hybrid")
    axis.set(title="what the equation of y' lacks", xlabel="x", ylabel="rate")
    axis.legend(fontsize=8)
    return drawn


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this example's own option."""
    least = at_least(int, 1300)
    parser.add_argument("--observations", type=least, default=2000, help="observed states (2000)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    quick = {"iterations": 60, "observations": 1300}
    return arguments("lorenz63", __doc__, argv, iterations=300, quick=quick, add=add_options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

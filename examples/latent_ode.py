"""Latent ODE: irregular series, each with its own times.

A latent ODE (Rubanova, Chen & Duvenaud, "Latent ODEs for irregularly-sampled time series", NeurIPS
2019) encodes the measurements of a series into a distribution of a latent state z(0), solves

::

    z' = f(z),   x(t) = D z(t)

and maximises the evidence bound of what was measured, f, D and the encoder being learned. Here a
series is the angle of a damped pendulum from a random start, x'' = -4 sin x - 0.2 x', measured at
24 times of its own with noise of 0.05. The encoder (a GRU) sees the half of them before t = 4, the
loss covers t < 8, and predictions go on until t = 12.

No two series share a time. The usual way is one solve at the union of all times, from which each
series takes what is its own; with ``samples="independent"`` each series has its own times and
steps.

Run it (two minutes of CPU time on one core)::

    python examples/latent_ode.py

Measured with pnode 0.2.0 and torchdiffeq 0.2.5 on 2026-11-30, seed 0, 250 updates, 100 other
series; root mean square errors where the encoder has seen the series, where the loss has, and
beyond:

=====================  =======  =======  =======  =====================  ==============
model                  t < 4    4 to 8   8 to 12  inside its 90 % band,  CPU s of its
                                                  8 to 12                training
=====================  =======  =======  =======  =====================  ==============
latent ODE             0.113    0.086    0.059    99.9 %                 64
network of z(0) and t  0.071    0.055    0.573    13.3 %                 21
=====================  =======  =======  =======  =====================  ==============

The network, which had ten times the updates, is better where it was trained, and knows nothing
beyond. One gradient of 64 series at the same tolerances, the error being that of the angles, and
one of an untrained model, whose solutions are smoother:

============================  =======  =====  =====  =========  =====
solve                         error    CPU s  MiB    untrained  CPU s
============================  =======  =====  =====  =========  =====
pnode, own times              0.0089   0.27   0.6    1.0e-4     0.089
pnode, own times, dense       0.0118   0.29   1.9    2.0e-3     0.053
pnode, union of times, dense  0.0091   0.20   9.1    1.4e-5     0.129
torchdiffeq, union of times   0.0321   0.89   80     1.3e-3     1.15
============================  =======  =====  =====  =========  =====

What did not work: the bands are too wide, as the deviation of the noise is still well above 0.05
after so few updates. The training takes a step to each time of each series, three evaluations with
bosh3, where the smooth solution of an untrained model asks for fewer: there ``dense=True`` takes
three fifths of the time, of a trained one nothing is saved.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
from torch import nn

import pnode

SEEN, TRAINED, HORIZON = 4.0, 8.0, 12.0  # the encoder sees, the loss covers, we predict until
NOISE, DRAWS, LATENT, BATCH = 0.05, 40, 4, 64
EACH = 12  # measurements of a series before SEEN, and after it


@dataclass
class Series:
    """Pendulums: starts (N, 2), each one's times (N, 25), the first 0, and noisy angles there."""

    starts: torch.Tensor
    times: torch.Tensor
    angles: torch.Tensor

    @classmethod
    def random(cls, number: int, generator: torch.Generator) -> Series:
        """Draw starts, times and noise."""
        starts = 3.0 * torch.rand((number, 2), generator=generator) - 1.5
        uniform = torch.rand((2, number, EACH), generator=generator).sort(dim=-1).values
        parts = uniform * torch.tensor([SEEN, TRAINED - SEEN])[:, None, None]
        times = torch.cat([torch.zeros(number, 1), parts[0], SEEN + parts[1]], dim=1)
        times = times + 1e-4 * torch.arange(times.shape[1])  # none twice, in single precision
        clean = pendulums(starts, times)
        return cls(starts, times, clean + NOISE * torch.randn(clean.shape, generator=generator))

    @property
    def seen(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Times and angles before SEEN."""
        return self.times[:, : EACH + 1], self.angles[:, : EACH + 1]

    def __getitem__(self, rows: torch.Tensor) -> Series:
        return Series(self.starts[rows], self.times[rows], self.angles[rows])


def pendulums(starts: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Return the angles (N, T) of damped pendulums at each one's times (N, T)."""

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        angle, speed = y.unbind(-1)
        return torch.stack([speed, -4.0 * torch.sin(angle) - 0.2 * speed], dim=-1)

    solver = pnode.Solver(field, rtol=1e-7, atol=1e-7, samples="independent")
    angles: torch.Tensor = solver(starts.double(), times.double()).ys[..., 0]
    return angles.T.float()


class Encoder(nn.Module):
    """From the measurements before SEEN, last to first, to mean and log deviation of z(0)."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 32, batch_first=True)
        self.head = nn.Linear(32, 2 * LATENT)

    def forward(self, times: torch.Tensor, angles: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gaps = times.diff(dim=1, append=torch.full((len(times), 1), SEEN))
        inputs = torch.stack([angles, times, gaps], dim=-1).flip(1)
        mean, spread = self.head(self.gru(inputs)[1][0]).chunk(2, dim=-1)
        return mean, spread.clamp(-7.0, 2.0)


class Field(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(LATENT, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, LATENT),
        )  # fmt: skip

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = self.net(z)
        return value


class Model(nn.Module):
    """An encoder, and paths of angles from latent starts; subclasses say how."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()
        self.log_noise = nn.Parameter(torch.tensor(-1.5))

    def paths(self, z0: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Return angles (N, T) of latent starts (N, LATENT) at each one's times (N, T)."""
        raise NotImplementedError

    def negative_elbo(self, data: Series, generator: torch.Generator) -> torch.Tensor:
        """Return the negative evidence bound per measurement."""
        mean, spread = self.encoder(*data.seen)
        z0 = mean + spread.exp() * torch.randn(mean.shape, generator=generator)
        misfit = (self.paths(z0, data.times) - data.angles) * (-self.log_noise).exp()
        divergence = 0.5 * (mean.square() + (2.0 * spread).exp() - 1.0) - spread
        each = divergence.sum(dim=1).mean() / data.times.shape[1]
        result: torch.Tensor = 0.5 * misfit.square().mean() + self.log_noise + each
        return result

    @torch.no_grad()
    def predict(
        self, data: Series, wanted: torch.Tensor, generator: torch.Generator
    ) -> torch.Tensor:
        """Return draws of the angles at ``wanted`` (T,), shape (DRAWS, N, T), without noise."""
        mean, spread = self.encoder(*data.seen)
        noise = torch.randn((DRAWS, *mean.shape), generator=generator)
        starts = (mean + spread.exp() * noise).flatten(0, 1)
        return self.paths(starts, wanted.expand(len(starts), -1)).view(DRAWS, len(mean), -1)


class LatentODE(Model):
    """A linear decoder of a latent state that follows an ODE."""

    def __init__(self) -> None:
        super().__init__()
        self.field, self.decoder = Field(), nn.Linear(LATENT, 1)
        self.solver = pnode.Solver(
            self.field, method="bosh3", rtol=1e-3, atol=1e-4, samples="independent"
        )

    def paths(self, z0: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        angles: torch.Tensor = self.decoder(self.solver(z0, times).ys)[..., 0].T
        return angles


class ByTime(Model):
    """The baseline: a decoder that is a network of z(0) and time, without an ODE."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(LATENT + 1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(),
            nn.Linear(width, 1),
        )  # fmt: skip

    def paths(self, z0: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        starts = z0[:, None].expand(-1, times.shape[1], -1)
        angles: torch.Tensor = self.net(torch.cat([starts, times[..., None]], dim=-1))[..., 0]
        return angles


def learn(
    model: Model, options: argparse.Namespace, data: Series, iterations: int,
    generator: torch.Generator,
) -> float:  # fmt: skip
    """Train on batches; return the seconds of CPU that it took."""

    def loss() -> torch.Tensor:
        batch = torch.randperm(len(data.times), generator=generator)[:BATCH]
        return model.negative_elbo(data[batch], generator)

    label = type(model).__name__.lower()
    return train(
        model, loss, options, iterations=iterations, clip=5.0, label=label, generator=generator
    ).cpu_seconds


def judge(model: Model, test: Series, generator: torch.Generator) -> dict[str, float]:
    """Return errors of the mean prediction in parts of the time axis, and the bands' coverage."""
    wanted = torch.linspace(0.0, HORIZON, 121)
    draws = model.predict(test, wanted, generator)
    truth = pendulums(test.starts, wanted.expand(len(test.times), -1))
    measured = truth + NOISE * torch.randn(truth.shape, generator=generator)
    noise = model.log_noise.detach().exp() * torch.randn(draws.shape, generator=generator)
    low, high = (draws + noise).quantile(torch.tensor([0.05, 0.95]), dim=0)
    inside = ((measured > low) & (measured < high)).float()
    wrong = (draws.mean(dim=0) - truth).square()
    row = {}
    for name, begin, end in (("seen", 0.0, SEEN), ("trained", SEEN, TRAINED),
                             ("beyond", TRAINED, HORIZON)):  # fmt: skip
        part = (wanted > begin) & (wanted <= end)
        row[f"rmse {name}"] = wrong[:, part].mean().sqrt().item()
        row[f"90% band {name}"] = inside[:, part].mean().item()
    return row


def union(solve: Any, model: LatentODE, z0: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Return angles by one solve at the union of all times."""
    together, places = torch.unique(times, return_inverse=True)
    states = solve(model.field, z0, together)
    angles: torch.Tensor = model.decoder(states[places.T, torch.arange(len(z0))])[..., 0].T
    return angles


def compare(
    model: LatentODE, times: torch.Tensor, generator: torch.Generator
) -> list[dict[str, Any]]:
    """Measure one solve and its gradient in three ways; errors are those of the angles."""
    z0 = torch.randn((len(times), LATENT), generator=generator)
    tight: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-6}
    loose: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-4}
    with torch.no_grad():
        truth = union(partial(pnode.odeint, dense=True, **tight), model, z0, times)
    dense = pnode.Solver(model.field, method="dopri5", dense=True, **loose)
    own = pnode.Solver(model.field, method="bosh3", dense=True, samples="independent", **loose)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "pnode, own times": lambda: model.paths(z0, times),
        "pnode, own times, dense": lambda: model.decoder(own(z0, times).ys)[..., 0].T,
        "pnode, union, dense": lambda: union(lambda f, y, t: dense(y, t).ys, model, z0, times),
    }
    torchdiffeq = peer("torchdiffeq")
    if torchdiffeq is not None:
        solve = partial(torchdiffeq.odeint, method="dopri5", **loose)
        ways["torchdiffeq, union"] = lambda: union(solve, model, z0, times)
    rows = []
    for name, way in ways.items():

        def gradient(way: Callable[[], torch.Tensor] = way) -> torch.Tensor:
            angles = way()
            torch.autograd.grad(angles.square().mean(), list(model.field.parameters()))
            return angles.detach()

        found = measure(gradient, repeats=3, warm_up=True)
        error = (found.value - truth).abs().max().item()
        rows.append({"name": name, "largest error": error, "CPU s of a gradient":
                     found.cpu_seconds, "MiB": found.peak_mib})  # fmt: skip
    return rows


def draw(model: Model, test: Series, generator: torch.Generator) -> Any:
    """Show four series: measured, truth, mean and band of the prediction."""
    wanted = torch.linspace(0.0, HORIZON, 241)
    few = test[torch.arange(4)]
    draws = model.predict(few, wanted, generator)
    truth = pendulums(few.starts, wanted.expand(4, -1))
    low, high = draws.quantile(torch.tensor([0.05, 0.95]), dim=0)
    drawn, axes = figure(2, 2, "Latent ODE: pendulums predicted from measurements before t = 4")
    for row, axis in enumerate(axes.flat):
        axis.plot(wanted, truth[row], **TRUTH)
        axis.fill_between(wanted, low[row], high[row], color="C3", alpha=0.25, lw=0,
                          label="90 % of draws")  # fmt: skip
        axis.plot(wanted, draws[:, row].mean(dim=0), **{**LEARNED, "label": "mean prediction"})
        axis.plot(*(part[row] for part in few.seen), **{**DATA, "label": "measured, seen"})
        for time, text in ((SEEN, "seen"), (TRAINED, "trained")):
            axis.axvline(time, color="black", ls=":", lw=1.0)
            axis.text(time, 1.0, f"{text} ", transform=axis.get_xaxis_transform(), ha="right",
                      va="top", fontsize=8)  # fmt: skip
        axis.set(xlabel="time (s)", ylabel="angle (rad)")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return drawn


def run(options: argparse.Namespace) -> Outcome:
    """Learn, predict, compare."""
    generator = torch.Generator().manual_seed(options.seed)
    data, test = Series.random(options.series, generator), Series.random(100, generator)
    model, baseline = LatentODE(), ByTime()
    rows: list[dict[str, Any]] = []
    for each, iterations in ((model, options.iterations), (baseline, 10 * options.iterations)):
        seconds = learn(each, options, data, iterations, generator)
        found = judge(each, test, generator)
        rows.append({"name": type(each).__name__, **found, "CPU s of training": seconds})
    own = test.times[:BATCH]
    gradients = compare(model, own, generator)
    numbers = {
        "beyond": rows[0]["rmse beyond"], "beyond_baseline": rows[1]["rmse beyond"],
        "coverage_beyond": rows[0]["90% band beyond"],
        "spread": pendulums(test.starts, test.times).std().item(),
        "seconds_own": gradients[0]["CPU s of a gradient"],
        "seconds_union": gradients[-1]["CPU s of a gradient"],
        "errors": [row["largest error"] for row in gradients],
    }  # fmt: skip
    return Outcome(numbers, rows + gradients, lambda: draw(model, test, generator))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--series", type=at_least(int, BATCH), default=200, help="series to learn from (200)"
        )

    quick = {"iterations": 30, "series": 64}
    return arguments("latent_ode", __doc__, argv, iterations=250, quick=quick, add=add)


def main(argv: Sequence[str] | None = None) -> int:
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

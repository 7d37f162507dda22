"""A learned observer: the state of a Van der Pol oscillator from noisy samples of its position.

A Kazantzis-Kravaris/Luenberger (KKL) observer (Niazi et al., "Learning-based design of Luenberger
observers for autonomous nonlinear systems", ACC 2023; Miao & Gatsis, "Learning robust state
observers using neural ODEs", L4DC 2023) runs a stable linear filter on the measurement y = x_1 and
maps its state back,

::

    x_1' = x_2,  x_2' = (1 - x_1^2) x_2 - x_1;    z' = -diag(a) z + y(t),    estimate = S(z)

where z follows T(x) once the transient has died out, and S is the inverse of T. Networks for T and
S are fitted to pairs (x, z) first; then S and the rates a are trained through the solve of the
filter, whose input is the polygon through noisy samples every 0.2 time units:
``pnode.controls.linear``, and the samples' times are output times, so that a step ends at each
kink.

Errors are those of x_2, which is not measured, on fresh oscillators after the transient. Baselines
are networks that are fitted to pairs alone, as in the first of these papers; the slope of the
samples, a centered difference; and an observer that has the true model, x' = f(x) + L (y - x_1),
whose gain L is chosen on the training data. The peer is torchdiffeq, as in the second paper: the
same training from the same pairs, the filter solved by the same method, ``heun3``.

Run it (half a minute of CPU time on one core)::

    python examples/observer.py

Measured with pnode 0.2.0 and torchdiffeq 0.2.5 on 2026-11-30, seed 0: root mean square error of x_2
after the transient, 50 fresh oscillators, by the deviation of the noise of the samples (learned
from: 0.1), and CPU seconds of the training:

======================  ======  =====  =====  =====  ========
estimate                0       0.05   0.1    0.2    training
======================  ======  =====  =====  =====  ========
fitted to pairs alone   0.0099  0.028  0.051  0.099  4.2
learned observer        0.0104  0.028  0.051  0.099  10.4
the same, torchdiffeq   0.0104  0.028  0.051  0.099  6.2
slope of the samples    0.038   0.180  0.342  0.723
true model, L = 2, 1    0.0036  0.023  0.046  0.090
======================  ======  =====  =====  =====  ========

One gradient of the loss by S and the rates, of 60 oscillators in 80 steps, beside that of the steps
written out in torch; CPU time and memory relative to pnode's 204 ms and 8.9 MiB:

==========================  =======  ===  ====  ====
gradient by                 error    f    CPU   MiB
==========================  =======  ===  ====  ====
pnode                       4.6e-13  240  1     1
torchdiffeq odeint          4.9e-13  240  0.87  1.3
torchdiffeq odeint_adjoint  9.5e-3   597  2.8   1.1
==========================  =======  ===  ====  ====

(On a busy computer: 0.7 to 1.3 in four other runs for the second row. In the training pnode is
given the samples anew in each call, as arguments of f, and takes 1.7 times as long.)

50 estimates together take 0.06 s, and 0.12 s with the true model. The rates go from 1, 2, 3 to
1.00, 2.00, 2.99. S(T(x)) is off by 0.018 in x_2; T could start the filter near a known state, which
is not done here. What did not work: the training through the solve adds nothing to the pairs, of
which there are enough here. Without noise the learned observer is three times worse than the true
model, as S is fitted to noisy samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
    mlp,
    peer,
    train,
)
from gallery_physics import compare_gradients

import pnode

DOUBLE = torch.float64
TIMES = torch.linspace(0.0, 16.0, 81, dtype=DOUBLE)
SETTLED = 30  # samples until the transient is over, t = 6
NOISE = 0.1  # of the samples that are learned from
RATES = (1.0, 2.0, 3.0)
METHOD, STEP = "heun3", 0.2  # of the filter; torchdiffeq has the method too


def van_der_pol(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    place, speed = x.unbind(-1)
    return torch.stack([speed, (1.0 - place**2) * speed - place], dim=-1)


@dataclass
class Oscillators:
    """States (T, N, 2) at TIMES and noisy samples (T, N) of the position."""

    states: torch.Tensor
    samples: torch.Tensor

    @classmethod
    def random(cls, number: int, noise: float, generator: torch.Generator) -> Oscillators:
        starts = 5.0 * torch.rand((number, 2), generator=generator, dtype=DOUBLE) - 2.5
        with torch.no_grad():
            states = pnode.Solver(van_der_pol, rtol=1e-8, atol=1e-8)(starts, TIMES).ys
        drawn = torch.randn(states.shape[:2], generator=generator, dtype=DOUBLE)
        return cls(states, states[..., 0] + noise * drawn)


class Filter(torch.nn.Module):
    """z' = -diag(a) z + y(t); the samples of y are those of the call."""

    def __init__(self) -> None:
        super().__init__()
        self.log_rates = torch.nn.Parameter(torch.tensor(RATES, dtype=DOUBLE).log())

    def forward(self, t: torch.Tensor, z: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        return self.driven(pnode.controls.linear(TIMES, samples)(t), z)

    def driven(self, place: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = place[:, None] - self.log_rates.exp() * z
        return result


class Driven(torch.nn.Module):
    """The filter with samples that are held, for solvers that take no arguments."""

    def __init__(self, filter: Filter, samples: torch.Tensor) -> None:
        super().__init__()
        self.filter, self.place = filter, pnode.controls.linear(TIMES, samples)

    def forward(self, t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        return self.filter.driven(self.place(t), z)


class Observer(torch.nn.Module):
    """The filter, and networks for T and its inverse S; torchdiffeq's ``odeint`` may solve."""

    def __init__(
        self, generator: torch.Generator, odeint: Callable[..., torch.Tensor] | None = None
    ) -> None:
        super().__init__()
        self.odeint = odeint
        self.filter = Filter()
        self.forth = mlp(2, 32, 32, 3, generator=generator)
        self.back = mlp(3, 32, 32, 2, generator=generator)
        self.solver = pnode.Solver(self.filter, method=METHOD, step_size=STEP, compile=False)

    def copy(self, odeint: Callable[..., torch.Tensor] | None = None) -> Observer:
        """Return another one with the weights as they are."""
        result = Observer(torch.Generator(), odeint)
        result.load_state_dict(self.state_dict())
        return result

    def filtered(self, samples: torch.Tensor) -> torch.Tensor:
        """Return z (T, N, 3) at TIMES."""
        rest = torch.zeros((samples.shape[1], 3), dtype=DOUBLE)
        if self.odeint is not None:
            field = Driven(self.filter, samples)
            return self.odeint(field, rest, TIMES, method=METHOD, options={"step_size": STEP})
        z: torch.Tensor = self.solver(rest, TIMES, samples).ys
        return z

    def scaled(self, z: torch.Tensor) -> torch.Tensor:
        """Return filtered samples at the size of the position."""
        return z * self.filter.log_rates.exp()

    def estimate(self, samples: torch.Tensor) -> torch.Tensor:
        """Return estimates (T, N, 2) of the state."""
        estimate: torch.Tensor = self.back(self.scaled(self.filtered(samples)))
        return estimate

    def misfit(self, data: Oscillators, z: torch.Tensor) -> torch.Tensor:
        """Return the loss of the estimates from filtered samples, once they have settled."""
        wrong: torch.Tensor = (self.back(self.scaled(z)) - data.states)[SETTLED:]
        return wrong.square().mean()

    def trained(self) -> list[torch.nn.Parameter]:
        """Return what is trained through the solve: S and the rates."""
        return [*self.back.parameters(), self.filter.log_rates]

    def pairs(self, data: Oscillators) -> tuple[torch.Tensor, torch.Tensor]:
        """Return settled states and those of the filter, scaled to the size of the position."""
        with torch.no_grad():
            z = self.scaled(self.filtered(data.samples))
        return data.states[SETTLED:].flatten(0, 1), z[SETTLED:].flatten(0, 1)


def error(estimate: torch.Tensor, data: Oscillators) -> float:
    """Return the root mean square error of the speed once the transient is over."""
    # The last sample has no centered difference.
    wrong = (estimate[..., 1] - data.states[..., 1])[SETTLED:-1]
    return wrong.square().mean().sqrt().item()


def slopes(data: Oscillators) -> torch.Tensor:
    """Return the samples and their centered differences, as states."""
    speed = torch.zeros_like(data.samples)
    speed[1:-1] = (data.samples[2:] - data.samples[:-2]) / (TIMES[2:] - TIMES[:-2])[:, None]
    return torch.stack([data.samples, speed], dim=-1)


@torch.no_grad()
def luenberger(data: Oscillators, gain: float) -> torch.Tensor:
    """Return the estimates of a copy of the true system that is drawn to the measurement."""
    gains = torch.tensor([2.0 * gain, gain**2], dtype=DOUBLE)

    def rhs(t: torch.Tensor, x: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
        place = pnode.controls.linear(TIMES, samples)(t)
        result: torch.Tensor = van_der_pol(t, x) + (place - x[:, 0])[:, None] * gains
        return result

    rest = torch.zeros_like(data.states[0])
    solver = pnode.Solver(rhs, method="bosh3", step_size=0.1, compile=False)
    estimate: torch.Tensor = solver(rest, TIMES, data.samples).ys
    return estimate


def fit_pairs(
    observer: Observer, data: Oscillators, options: argparse.Namespace, generator: torch.Generator
) -> float:
    """Fit T and S to pairs; return the seconds."""
    x, z = observer.pairs(data)

    def fit() -> torch.Tensor:
        rows = torch.randint(len(x), (512,), generator=generator)
        forth = (observer.forth(x[rows]) - z[rows]).square().mean()
        result: torch.Tensor = forth + (observer.back(z[rows]) - x[rows]).square().mean()
        return result

    networks = [*observer.forth.parameters(), *observer.back.parameters()]
    return train(
        networks, fit, options, iterations=20 * options.iterations, label="pairs",
        generator=generator,
    ).cpu_seconds  # fmt: skip


def train_through(
    observer: Observer, data: Oscillators, options: argparse.Namespace, label: str
) -> float:
    """Train S and the rates through the solve of the filter; return the seconds."""
    return train(
        observer.trained(), lambda: observer.misfit(data, observer.filtered(data.samples)), options,
        rate=3e-3, label=label,
    ).cpu_seconds  # fmt: skip


def learn(
    data: Oscillators, options: argparse.Namespace, generator: torch.Generator
) -> tuple[dict[str, Observer], dict[str, float], float]:
    """Return the observers by name, the seconds of their last training, and S(T(x)) - x."""
    fitted = Observer(generator)
    seconds = {"fitted to pairs alone": fit_pairs(fitted, data, options, generator)}
    observers = {"fitted to pairs alone": fitted, "learned observer": fitted.copy()}
    with torch.no_grad():
        round_trip = error(fitted.back(fitted.forth(data.states)), data)
    torchdiffeq = peer("torchdiffeq")
    if torchdiffeq is not None:
        observers["the same by torchdiffeq"] = fitted.copy(torchdiffeq.odeint)
    for name, label in zip([*observers][1:], ("filter", "torchdiffeq"), strict=False):
        seconds[name] = train_through(observers[name], data, options, label)
    return observers, seconds, round_trip


def by_gradients(observer: Observer, data: Oscillators, quick: bool) -> list[dict[str, Any]]:
    """Measure the gradient of the loss by pnode and by torchdiffeq."""
    rest = torch.zeros((data.samples.shape[1], 3), dtype=DOUBLE)
    field, trained = Driven(observer.filter, data.samples), observer.trained()

    def written_out(z: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        path = [z]
        for t in times[:-1]:
            first = field(t, z)
            second = field(t + STEP / 3, z + STEP / 3 * first)
            third = field(t + 2 * STEP / 3, z + 2 * STEP / 3 * second)
            z = z + STEP / 4 * (first + 3 * third)
            path.append(z)
        return torch.stack(path)

    return compare_gradients(
        field, lambda solve: observer.misfit(data, solve(rest, TIMES)), trained,
        method=METHOD, step_size=STEP, quick=quick, compiled=False,  # controls look up a time
        exact=torch.autograd.grad(observer.misfit(data, written_out(rest, TIMES)), trained),
    )  # fmt: skip


def run(options: argparse.Namespace) -> Outcome:
    """Learn, and compare at several levels of noise."""
    generator = torch.Generator().manual_seed(options.seed)
    data = Oscillators.random(options.oscillators, NOISE, generator)
    observers, seconds, round_trip = learn(data, options, generator)
    observer, fitted = observers["learned observer"], observers["fitted to pairs alone"]
    gains = [0.5, 1.0, 1.5, 2.0, 3.0]
    gain = min(gains, key=lambda each: error(luenberger(data, each), data))
    ways: dict[str, Callable[[Oscillators], torch.Tensor]] = {
        name: lambda test, each=each: each.estimate(test.samples)  # type: ignore[misc]
        for name, each in observers.items()
    }
    ways["slope of the samples"] = slopes
    ways[f"true model, gain {gain:g}"] = lambda test: luenberger(test, gain)
    levels = (0.0, 0.05, 0.1, 0.2)
    tests = [Oscillators.random(50, noise, generator) for noise in levels]
    rows = []
    with torch.no_grad():
        for name, way in ways.items():
            found = measure(lambda: way(tests[0]))  # noqa: B023
            errors = {
                f"noise {noise:g}": error(way(test), test)
                for noise, test in zip(levels, tests, strict=True)
            }
            rows.append({"rms error of x2": name, **errors, "CPU s": found.cpu_seconds,
                         "CPU s of training": seconds.get(name)})  # fmt: skip
    by_name = {row["rms error of x2"]: list(row.values())[1:5] for row in rows}
    gradients = by_gradients(fitted, data, options.quick)
    numbers = {
        "learned": by_name["learned observer"], "slopes": by_name["slope of the samples"],
        "model": list(rows[-1].values())[1:5], "rates": observer.filter.log_rates.exp(),
        "pairs_alone": by_name["fitted to pairs alone"],
        "by_torchdiffeq": by_name.get("the same by torchdiffeq"),
        "there_and_back": round_trip,
    }  # fmt: skip
    return Outcome(numbers, rows + gradients, lambda: draw(observer, tests[2], rows, levels))


def draw(
    observer: Observer, test: Oscillators, rows: list[dict[str, Any]], levels: Sequence[float]
) -> Any:
    """Show one oscillator's estimates and the errors by the noise."""
    drawn, axes = figure(1, 3, "A learned observer of a Van der Pol oscillator")
    with torch.no_grad():
        estimate = observer.estimate(test.samples)[:, 0]
    for axis, index, name in ((axes[0, 0], 0, "position, measured"), (axes[0, 1], 1, "speed")):
        axis.plot(TIMES, test.states[:, 0, index], **TRUTH)
        if index == 0:
            axis.plot(TIMES, test.samples[:, 0], **{**DATA, "ms": 3, "label": "samples"})
        else:
            axis.plot(TIMES, slopes(test)[:, 0, 1], color="C0", lw=0.8, label="slope of samples")
        axis.plot(TIMES, estimate[:, index], **{**LEARNED, "label": "learned observer"})
        axis.axvspan(0.0, TIMES[SETTLED], color="0.9", label="transient")
        axis.set(title=f"{name} (noise 0.1)", xlabel="time")
        axis.legend(fontsize=7)
    for row in rows:
        values = list(row.values())[1:5]
        axes[0, 2].plot(levels, values, "o-", label=row["rms error of x2"])
    axes[0, 2].set(title="50 fresh oscillators", xlabel="noise of the samples",
                   ylabel="rms error of the speed")  # fmt: skip
    axes[0, 2].legend(fontsize=8)
    return drawn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--oscillators", type=at_least(int, 5), default=60,
                            help="to learn from (60)")  # fmt: skip

    quick = {"iterations": 15, "oscillators": 30}
    return arguments("observer", __doc__, argv, iterations=80, quick=quick, add=add)


def main(argv: Sequence[str] | None = None) -> int:
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

"""Reach tubes: where all trajectories from a ball go, with a probability.

After GoTube (Gruenbacher et al., "GoTube: scalable statistical verification of continuous-depth
models", AAAI 2022). Points x_i are drawn on the surface of the initial ball, radius r, around c,
and solved together with the variational equation

::

    x' = f(x),   F' = f_x(x) F,   F(0) = 1

At each time distances are measured with A = F(c)^-1, as ``|A (x - x_c)|``: a tube of ellipsoids. If
m is the largest distance of the samples and L bounds the stretching ``|A F|`` over the ball, a
sample's distance speaks for all starts within a chord q of its own, up to L q. N samples leave no
gap wider than q around the worst start, with probability 1 - gamma, if the cap of chord q has the
share 1 - gamma^(1/N) of the sphere. So

::

    radius(t) = min(m + L q, L r)

holds the worst trajectory with probability 1 - gamma. The stretching factors ``|A F_i|`` are those
of all samples, from one solve with n tangents (``torch.func.jacfwd`` of a solve); L is their
largest, and a tenth more for what lies between samples: as in GoTube an estimate, and no proof.

The systems, radii and horizons are those of the authors' code: Brusselator, Van der Pol, robot arm.

Run it (half a minute of CPU time on one core)::

    python examples/reach_tube.py

Measured with pnode 0.2.0 and torchdiffeq 0.2.5 on 2026-11-30, seed 0, 500 samples, gamma = 0.01,
mean over 60 times; "covered" are those of 5,000 fresh trajectories that never leave:

===========  ======================  =======  ===========
system       radius                  covered  mean volume
===========  ======================  =======  ===========
Brusselator  linearised: r           31 %     3.7e-5
Brusselator  largest sample          97 %     3.8e-5
Brusselator  stretching alone        100 %    4.8e-5
Brusselator  tube                    100 %    4.1e-5
Van der Pol  linearised: r           24 %     7.9e-5
Van der Pol  largest sample          98 %     8.7e-5
Van der Pol  stretching alone        100 %    1.2e-4
Van der Pol  tube                    100 %    9.3e-5
robot arm    linearised: r           26 %     2.91e-11
robot arm    largest sample          99 %     2.93e-11
robot arm    stretching alone        100 %    4.3e-11
robot arm    tube                    100 %    4.3e-11
===========  ======================  =======  ===========

States and stretching factors of all samples: pnode with tangents, and torchdiffeq with the
variational equation as a part of the state. Their derivatives agree to 2e-8 of the largest:

===========  ============  ==========  ==================  ================
system       pnode, CPU s  pnode, MiB  torchdiffeq, CPU s  torchdiffeq, MiB
===========  ============  ==========  ==================  ================
Brusselator  0.50          18          0.98                5
Van der Pol  1.11          36          2.13                3
robot arm    2.55          89          3.12                13
===========  ============  ==========  ==================  ================

pnode takes less time and more memory. What did not work: in four dimensions 500 samples leave gaps
so wide that m + L q is larger than L r, and the tube is that of the stretching factors alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gallery_common import Outcome, arguments, at_least, counts, figure, launch, measure, peer
from scipy.special import betaincinv

import pnode

GAMMA, MARGIN = 0.01, 1.1  # chance that the tube is too narrow; for stretching between samples
RADII = (("linearised", "C0"), ("stretching alone", "C1"), ("tube", "C3"))
TOLERANCE: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-10}


@dataclass(frozen=True)
class System:
    """f on states of shape (N, n), the initial ball and the horizon."""

    name: str
    rate: Callable[[torch.Tensor], torch.Tensor]
    center: tuple[float, ...]
    radius: float
    horizon: float

    def __call__(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.rate(x)


def brusselator(x: torch.Tensor) -> torch.Tensor:
    a, b = x.unbind(-1)
    turned = a**2 * b
    return torch.stack([1.0 + turned - 2.5 * a, 1.5 * a - turned], dim=-1)


def van_der_pol(x: torch.Tensor) -> torch.Tensor:
    place, speed = x.unbind(-1)
    return torch.stack([speed, (place**2 - 1.0) * speed - place], dim=-1)


def robot_arm(x: torch.Tensor) -> torch.Tensor:
    angle, length, turning, sliding = x.unbind(-1)
    torque = 4.0 - 2.0 * angle - 2.0 * turning - 2.0 * length * turning * sliding
    force = length * turning**2 - length - sliding + 1.0
    return torch.stack([turning, sliding, torque / (length**2 + 1.0), force], dim=-1)


SYSTEMS = (
    System("Brusselator", brusselator, (1.0, 1.0), 0.01, 9.0),
    System("Van der Pol", van_der_pol, (-1.0, -1.0), 0.01, 40.0),
    System("robot arm", robot_arm, (1.505, 1.505, 0.005, 0.005), 0.005, 40.0),
)


def on_sphere(system: System, number: int, generator: torch.Generator) -> torch.Tensor:
    """Return starts on the surface of the initial ball, and its center first."""
    center = torch.tensor([system.center], dtype=torch.float64)
    drawn = torch.randn((number, center.shape[1]), generator=generator, dtype=torch.float64)
    surface = system.radius * drawn / drawn.norm(dim=1, keepdim=True)
    return torch.cat([center, center + surface])


def flow(solver: pnode.Solver, starts: torch.Tensor, times: torch.Tensor) -> tuple[Any, ...]:
    """Return states (T, N, n), their derivatives by the own start (T, N, n, n), and the counts."""
    solutions = []

    def shifted(by: torch.Tensor) -> torch.Tensor:
        solutions.append(solver(starts + by, times))
        states: torch.Tensor = solutions[-1].ys
        return states

    # All rows are shifted alike: n tangents give the derivatives of all of them.
    by_start = torch.func.jacfwd(shifted)(torch.zeros(starts.shape[1], dtype=torch.float64))
    return solver(starts, times).ys, by_start, solutions[-1]


def variational(system: System, odeint: Any, starts: torch.Tensor, times: torch.Tensor) -> Any:
    """Return the same by the usual way: the variational equation as a part of the state."""
    number, size = starts.shape
    jacobian = torch.func.vmap(torch.func.jacrev(system.rate))

    def both(t: torch.Tensor, pair: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        x, by_start = pair
        return system.rate(x), jacobian(x) @ by_start

    unit = torch.eye(size, dtype=torch.float64).repeat(number, 1, 1)
    return odeint(both, (starts, unit), times, method="dopri5", **TOLERANCE)


@dataclass
class Tube:
    """Center (T, n), metric (T, n, n), and radii (T,) by the name of how they were found."""

    center: torch.Tensor
    metric: torch.Tensor
    radii: dict[str, torch.Tensor]

    @classmethod
    def of(cls, system: System, states: torch.Tensor, by_start: torch.Tensor) -> Tube:
        center, size, number = states[:, 0], states.shape[-1], states.shape[1] - 1
        metric = torch.linalg.inv(by_start[:, 0])
        largest = distances(center, metric, states[:, 1:]).amax(dim=1)
        stretching = torch.linalg.matrix_norm(metric[:, None] @ by_start, ord=2).amax(dim=1)
        # The share of the sphere within an angle a is half of I(sin(a)^2; (n - 1)/2, 1/2).
        share = 1.0 - GAMMA ** (1.0 / number)
        angle = math.asin(math.sqrt(betaincinv((size - 1) / 2, 0.5, 2.0 * share)))
        chord = 2.0 * system.radius * math.sin(angle / 2)
        alone = MARGIN * stretching * system.radius
        radii = {
            "linearised": torch.full_like(largest, system.radius),
            "largest sample": largest,
            "stretching alone": alone,
            "tube": torch.minimum(alone, largest + MARGIN * stretching * chord),
        }
        return cls(center, metric, radii)

    def volume(self, name: str) -> float:
        """Return the mean volume of the ellipsoids over the times after the first."""
        size = self.center.shape[1]
        unit = math.pi ** (size / 2) / math.gamma(size / 2 + 1)
        volumes = unit * self.radii[name] ** size / torch.linalg.det(self.metric).abs()
        result: float = volumes[1:].mean().item()
        return result

    def coverage(self, name: str, states: torch.Tensor) -> float:
        """Return the share of trajectories that never leave it."""
        inside = distances(self.center, self.metric, states) <= self.radii[name][:, None]
        # At the first time all points lie on the surface itself.
        return inside[1:].all(dim=0).double().mean().item()


def distances(center: torch.Tensor, metric: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Return |A (x - center)|, shape (T, N)."""
    result: torch.Tensor = torch.einsum("tij,tnj->tni", metric, states - center[:, None]).norm(
        dim=-1
    )
    return result


def study(
    system: System, options: argparse.Namespace, generator: torch.Generator
) -> tuple[Tube, torch.Tensor, list[dict[str, Any]]]:
    """Return a system's tube, fresh trajectories and rows of the table."""
    times = torch.linspace(0.0, system.horizon, options.times, dtype=torch.float64)
    starts = on_sphere(system, options.samples, generator)
    solver = pnode.Solver(system, method="dopri5", **TOLERANCE)
    with torch.no_grad():
        ours = measure(lambda: flow(solver, starts, times), warm_up=True)
        states, by_start, solution = ours.value
        tube = Tube.of(system, states, by_start)
        fresh = solver(on_sphere(system, options.fresh, generator)[1:], times).ys
    rows = []
    for name in tube.radii:
        rows.append(
            {"system": system.name, "radius": name, "covered": tube.coverage(name, fresh),
             "mean volume": tube.volume(name)}
        )  # fmt: skip
    taken = counts(solution)
    rows.append({"system": system.name, "radius": "pnode, tangents", "CPU s": ours.cpu_seconds,
                 "MiB": ours.peak_mib, "steps": taken["steps"]})  # fmt: skip
    torchdiffeq = peer("torchdiffeq")
    if torchdiffeq is not None:
        with torch.no_grad():
            theirs = measure(lambda: variational(system, torchdiffeq.odeint, starts, times))
        error = (theirs.value[1] - by_start).abs().amax() / by_start.abs().amax()
        rows.append({"system": system.name, "radius": "torchdiffeq, variational",
                     "CPU s": theirs.cpu_seconds, "MiB": theirs.peak_mib,
                     "difference": error.item()})  # fmt: skip
    return tube, fresh, rows


def draw(found: dict[str, tuple[Tube, torch.Tensor]], options: argparse.Namespace) -> Any:
    """Show for each system the tube at a few times, and its radius over time."""
    drawn, axes = figure(2, len(found), "Reach tubes, and fresh samples that they must hold")
    circle = torch.linspace(0.0, 2.0 * math.pi, 100, dtype=torch.float64)
    around = torch.stack([circle.cos(), circle.sin()])
    for column, (system, (tube, fresh)) in enumerate(zip(SYSTEMS, found.values(), strict=False)):
        shape, growth = axes[:, column]
        when = options.times // 10
        center = tube.center[when]
        # The shadow of {|A z| <= R} on the first two coordinates has the covariance A^-1 A^-T.
        inverse = torch.linalg.inv(tube.metric[when])
        root = torch.linalg.cholesky((inverse @ inverse.T)[:2, :2])
        points = (fresh[when, :400] - center)[:, :2]
        shape.plot(*points.T, ".", ms=2.0, color="0.55", label="fresh samples")
        for name, color in RADII:
            edge = tube.radii[name][when] * root @ around
            shape.plot(*edge, color=color, label=name)
        t = when / (options.times - 1) * system.horizon
        shape.set(title=f"{system.name}, t = {t:.1f}", xlabel="first coordinate − center",
                  ylabel="second coordinate − center")  # fmt: skip
        shape.ticklabel_format(style="sci", scilimits=(-2, 2))
        times = torch.linspace(0.0, system.horizon, options.times)
        far = distances(tube.center, tube.metric, fresh).amax(dim=1) / system.radius
        growth.plot(times, far, color="0.55", lw=4, label="farthest fresh sample")
        for name, color in RADII:
            growth.plot(times, tube.radii[name] / system.radius, color=color, label=name)
        growth.set(xlabel="time", ylabel="radius / initial radius, metric A")
    axes[0, 0].legend(fontsize=7, loc="upper right")
    axes[1, 0].legend(fontsize=7)
    return drawn


def run(options: argparse.Namespace) -> Outcome:
    """Find the tubes and count who stays inside."""
    generator = torch.Generator().manual_seed(options.seed)
    found, rows, numbers = {}, [], {}
    for system in SYSTEMS[: options.systems]:
        tube, fresh, own = study(system, options, generator)
        found[system.name] = tube, fresh
        rows += own
        numbers[system.name] = {row["radius"]: row for row in own}
    return Outcome({"systems": numbers}, rows, lambda: draw(found, options))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def add(parser: argparse.ArgumentParser) -> None:
        count = at_least(int, 20)
        parser.add_argument("--samples", type=count, default=500, help="drawn for a tube (500)")
        parser.add_argument("--fresh", type=count, default=5000, help="to count with (5000)")
        parser.add_argument("--times", type=count, default=61, help="output times (61)")
        parser.add_argument("--systems", type=int, choices=(1, 2, 3), default=3,
                            help="the first so many of them (3)")  # fmt: skip

    quick = {"samples": 100, "fresh": 1000, "times": 20, "systems": 1}
    return arguments("reach_tube", __doc__, argv, iterations=1, quick=quick, add=add)


def main(argv: Sequence[str] | None = None) -> int:
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

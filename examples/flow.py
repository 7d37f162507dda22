"""Continuous normalising flows: densities learned with an exact or an estimated trace.

FFJORD (W. Grathwohl et al., ICLR 2019) takes samples x through an ODE, y' = f(t, y) from y(0) = x,
to a standard normal z = y(1), and knows their density, as the logarithm of a volume changes with
the trace of the Jacobian:

::

    log p(x) = log N(z) + integral of tr(df/dy) dt

The trace, and what RNODE (C. Finlay et al., ICML 2020) asks to be small,

::

    kinetic energy: integral of |f|^2 dt,    Jacobian: integral of |df/dy|_F^2 dt

are three cost integrals here (``pnode.Solver(cost=...)``): they go along the path, with gradients,
and have no say in the choice of steps. All come from products with the Jacobian, J e: over all unit
vectors they are exact (in two dimensions), over a random vector of signs an unbiased estimate
(Hutchinson's; in 16 and 43), drawn anew for each solve.

The densities are mixtures of normals with known density: eight on a ring, two moons of many, and
five in 16 and 43 dimensions at random. So there is a least negative log-likelihood (NLL) that any
model can have, the mixture's own. Training takes 4 fixed steps of rk4; what is measured
afterwards is solved by dopri5 at rtol 1e-6, with exact traces, and by torchdiffeq with the trace in
the state.

Run it (about three minutes on one core)::

    python examples/flow.py

Measured with pnode 0.2.0 on 2026-11-30, seed 0, 300 updates with 256 samples each (265 s of CPU in
all); NLL of 2000 samples that were not learned from, and what dopri5 takes:

=====================  =====  =====  =======  ========  ==  ===============
density                NLL    least  kinetic  Jacobian  f   training, CPU s
=====================  =====  =====  =======  ========  ==  ===============
ring                   2.191  2.152  0.79     2.20      73  37
ring, not regularised  2.176  2.128  0.86     2.42      73  34
moons                  1.690  1.525  1.33     6.14      58  36
mixture in 16          13.74  13.28  13.7     8.89      73  31
mixture in 43          35.13  32.87  33.9     22.3      73  44
=====================  =====  =====  =======  ========  ==  ===============

The density of the ring, summed over a square, is 1 to 7e-7. Hutchinson's estimate of the NLL in 16
dimensions, 20 times 50 samples, is 0.077 off, with a deviation of 0.048.

One gradient of the exact NLL of 256 samples, beside torchdiffeq 0.2.5, which has the trace in the
state and in its error norm; errors are those against rtol 1e-10:

===================================  =======  ========  ======  ====
gradient by                          NLL      gradient  CPU ms  MiB
===================================  =======  ========  ======  ====
ring, pnode                          1.1e-6   3.7e-5    428     77
ring, torchdiffeq odeint             3.6e-7   2.2e-5    452     77
ring, torchdiffeq odeint_adjoint     3.6e-7   5.5e-6    790     7.6
16, pnode                            6.4e-6   4.7e-5    2198    283
16, torchdiffeq odeint               1.2e-5   7.4e-5    1401    786
16, torchdiffeq odeint_adjoint       1.2e-5   9.7e-6    2029    52
===================================  =======  ========  ======  ====

What did not work: to be faster than that. As cost integrals the trace and the regularisers evaluate
the network a second time beside f, where a state with the trace in it gets both from one product,
and solves with ``cost=`` are not compiled.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from gallery_common import (
    Outcome,
    Training,
    arguments,
    at_least,
    figure,
    launch,
    measure,
    mlp,
    peer,
    train,
)
from gallery_physics import Counted

import pnode

DOUBLE = torch.float64
SPAN = torch.tensor([0.0, 1.0], dtype=DOUBLE)
STEPS, WEIGHT = 4, 0.01  # of rk4; of both regularisers
TOLERANCE: dict[str, Any] = {"method": "dopri5", "rtol": 1e-6, "atol": 1e-6}
TIGHT: dict[str, Any] = {"method": "dopri5", "rtol": 1e-10, "atol": 1e-10}
EDGE, CELLS = 3.0, 80  # of the square on which densities are drawn, and cells along it


# --------------------------------------------------------------------------------- the densities


class Mixture:
    """Normals of one deviation around many centers, all of the same weight."""

    def __init__(self, name: str, centers: torch.Tensor, deviation: float) -> None:
        self.name, self.centers, self.deviation = name, centers, deviation
        self.size = centers.shape[1]

    def sample(self, number: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(self.centers), (number,), generator=generator)
        noise = torch.randn(number, self.size, generator=generator, dtype=DOUBLE)
        return self.centers[chosen] + self.deviation * noise

    def log_density(self, x: torch.Tensor) -> torch.Tensor:
        scaled = (x[:, None] - self.centers) / self.deviation
        each = normal(scaled) - self.size * math.log(self.deviation)
        return each.logsumexp(dim=1) - math.log(len(self.centers))


def normal(z: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the standard normal density."""
    return -0.5 * (z.square() + math.log(2.0 * math.pi)).sum(-1)


def densities() -> list[Mixture]:
    """Return what is to be learned."""
    turn = 2.0 * math.pi * torch.arange(8, dtype=DOUBLE) / 8
    ring = 2.0 * torch.stack([turn.cos(), turn.sin()], dim=1)
    arc = math.pi * torch.arange(100, dtype=DOUBLE) / 99
    upper = torch.stack([arc.cos() - 0.5, arc.sin() - 0.25], dim=1)
    found = [Mixture("ring", ring, 0.25), Mixture("moons", 1.4 * torch.cat([upper, -upper]), 0.12)]
    for size in (16, 43):
        drawn = torch.randn(5, size, generator=torch.Generator().manual_seed(size), dtype=DOUBLE)
        found.append(Mixture(f"mixture in {size}", drawn, 0.5))
    return found


# -------------------------------------------------------------------------------------- the flow


class Field(torch.nn.Module):
    """f(t, y), a network of both; y has any batch dimensions."""

    def __init__(self, size: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.net = mlp(size + 1, width, width, size, generator=generator)

    def forward(self, t: torch.Tensor, y: torch.Tensor, probes: Any = None) -> torch.Tensor:
        clock = t.to(y.dtype).expand(*y.shape[:-1], 1)
        result: torch.Tensor = self.net(torch.cat([y, clock], dim=-1))
        return result


class Integrands(torch.nn.Module):
    """Trace and squared norm of the Jacobian, and |f|^2, for each sample: (B, 3).

    The sums are over vectors e of shape (k, B, size).
    """

    def __init__(self, field: Field) -> None:
        super().__init__()
        self.field = field

    def forward(self, t: torch.Tensor, y: torch.Tensor, probes: torch.Tensor) -> torch.Tensor:
        return self.both(t, y, probes)[1]

    def both(
        self, t: torch.Tensor, y: torch.Tensor, probes: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return f too."""
        many = y.expand_as(probes).clone()
        f, product, *_ = torch.func.jvp(partial(self.field, t), (many,), (probes,))
        trace = (probes * product).sum((0, 2))
        return f[0], torch.stack(
            [trace, product.square().sum((0, 2)), f[0].square().sum(-1)], dim=-1
        )


def unit_vectors(x: torch.Tensor) -> torch.Tensor:
    """Return the probes of exact traces of samples (B, size)."""
    return torch.eye(x.shape[1], dtype=x.dtype)[:, None].repeat(1, len(x), 1)


def signs(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return one random probe for each sample."""
    drawn = torch.randint(2, (1, *x.shape), generator=generator)
    return (2 * drawn - 1).to(x.dtype)


class Flow:
    """A field, and densities by it."""

    def __init__(self, size: int, width: int, generator: torch.Generator) -> None:
        self.size, self.field = size, Field(size, width, generator)
        self.integrands = Integrands(self.field)

    def solver(self, **keywords: Any) -> pnode.Solver:
        return pnode.Solver(self.field, cost=self.integrands, compile=False, **keywords)

    def log_density(
        self, solver: pnode.Solver, x: torch.Tensor, probes: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, pnode.Solution]:
        """Return log p (B,), the two regularisers (B, 2) and the solution; exact by default."""
        solution = solver(x, SPAN, args=unit_vectors(x) if probes is None else probes)
        assert solution.costs is not None
        trace, regular = solution.costs[-1].split([1, 2], dim=-1)
        return normal(solution.ys[-1]) + trace[:, 0], regular, solution

    def paths(self, number: int, generator: torch.Generator) -> torch.Tensor:
        """Return samples at 41 times (41, number, size), of which the last are of the density."""
        solver = pnode.Solver(self.field, compile=False, **TOLERANCE)
        z = torch.randn(number, self.size, generator=generator, dtype=DOUBLE)
        with torch.no_grad():
            result: torch.Tensor = solver(z, torch.linspace(1.0, 0.0, 41, dtype=DOUBLE)).ys
        return result


def learn(
    density: Mixture, weight: float, options: argparse.Namespace, label: str
) -> tuple[Flow, Training]:
    """Train a flow with fresh samples."""
    generator = torch.Generator().manual_seed(options.seed)
    flow = Flow(density.size, options.width, generator)
    solver = flow.solver(method="rk4", step_size=1.0 / STEPS)

    def loss() -> torch.Tensor:
        x = density.sample(options.batch, generator)
        probes = None if density.size == 2 else signs(x, generator)
        logs, regular, _ = flow.log_density(solver, x, probes)
        return weight * regular.sum(dim=1).mean() - logs.mean()

    return flow, train(
        flow.field, loss, options, rate=1e-2, label=label, generator=generator, clip=10.0
    )


# --------------------------------------------------------------------------------- measurements


def by_torchdiffeq(flow: Flow, call: Callable[..., Any], x: torch.Tensor) -> torch.Tensor:
    """Return log p by a package that has the trace in the state."""
    probes = unit_vectors(x)

    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.integrands = flow.integrands

        def forward(self, t: torch.Tensor, state: tuple[torch.Tensor, ...]) -> Any:
            f, rates = self.integrands.both(t, state[0], probes)
            return f, rates[:, 0]

    z, trace = call(Both(), (x, x.new_zeros(len(x))), SPAN, **TOLERANCE)
    logs: torch.Tensor = normal(z[-1]) + trace[-1]
    return logs


def gradients(flow: Flow, x: torch.Tensor) -> list[dict[str, Any]]:
    """Measure a gradient of the NLL by pnode and by torchdiffeq, at the same tolerances."""
    tight, solver = flow.solver(**TIGHT), flow.solver(**TOLERANCE)
    package = peer("torchdiffeq")
    ways: dict[str, Callable[[], torch.Tensor]] = {"pnode": lambda: flow.log_density(solver, x)[0]}
    for name in ("odeint", "odeint_adjoint") if package is not None else ():
        ways[f"torchdiffeq {name}"] = partial(by_torchdiffeq, flow, getattr(package, name), x)

    def gradient(logs: torch.Tensor) -> tuple[float, torch.Tensor]:
        found = torch.autograd.grad(-logs.mean(), list(flow.field.parameters()))
        return -logs.mean().item(), torch.cat([part.reshape(-1) for part in found])

    exact_value, exact = gradient(flow.log_density(tight, x)[0])
    rows = []
    for name, way in ways.items():
        measured = measure(lambda way=way: gradient(way()), 3, warm_up=True)  # type: ignore[misc]
        value, found = measured.value
        rows.append({
            "density": f"  gradient, {name}", "NLL": value,
            "off by": abs(value - exact_value),
            "gradient off by": ((found - exact).norm() / exact.norm()).item(),
            "CPU s": measured.cpu_seconds, "MiB": measured.peak_mib,
        })  # fmt: skip
    return rows


def square(edge: float) -> torch.Tensor:
    """Return the centers of the cells that the square |x| < edge is cut into, (CELLS^2, 2)."""
    line = (torch.arange(CELLS, dtype=DOUBLE) + 0.5) * (2.0 * edge / CELLS) - edge
    return torch.cartesian_prod(line, line)


def evaluate(
    flow: Flow, density: Mixture, unseen: torch.Tensor, training: Training, name: str
) -> dict[str, Any]:
    """Return a row: NLL of samples that were not learned from, and what the solve took."""
    with torch.no_grad():
        solver = flow.solver(**TOLERANCE)
        logs, regular, solution = flow.log_density(solver, unseen)
    counted = Counted(flow.field)
    with torch.no_grad():
        pnode.Solver(counted, compile=False, **TOLERANCE)(unseen, SPAN)
    return {
        "density": name, "NLL": -logs.mean().item(),
        "least": -density.log_density(unseen).mean().item(),
        "kinetic": regular[:, 1].mean().item(), "Jacobian": regular[:, 0].mean().item(),
        "steps": solution.stats.steps, "f": counted.calls, "CPU s": training.cpu_seconds,
    }  # fmt: skip


def mass(flow: Flow) -> float:
    """Return the integral of a flow's density over a square that leaves out hardly anything."""
    with torch.no_grad():
        logs = flow.log_density(flow.solver(**TOLERANCE), square(2.0 * EDGE))[0]
    return logs.exp().sum().item() * (4.0 * EDGE / CELLS) ** 2


def estimate(flow: Flow, x: torch.Tensor, generator: torch.Generator, draws: int) -> list[float]:
    """Return the mean NLL's difference from the exact one, and its deviation, by Hutchinson."""
    solver = flow.solver(**TOLERANCE)
    with torch.no_grad():
        exact = flow.log_density(solver, x)[0]
        found = [
            (flow.log_density(solver, x, signs(x, generator))[0] - exact).mean()
            for _ in range(draws)
        ]
    values = torch.stack(found)
    return [values.mean().item(), (values.std() / math.sqrt(draws)).item()]


# ----------------------------------------------------------------------------------- the program


def run(options: argparse.Namespace) -> Outcome:
    """Train, and measure."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    rows, flows, losses = [], [], {}
    cases = [(density, WEIGHT) for density in densities()]
    cases = [*cases[:1], (cases[0][0], 0.0), *cases[1:]]
    if options.quick:
        cases = [cases[0], cases[3]]
    for density, weight in cases:
        name = density.name if weight else f"{density.name}, not regularised"
        flow, training = learn(density, weight, options, name.replace(" ", "-").replace(",", ""))
        unseen = density.sample(options.unseen, generator)
        rows.append(evaluate(flow, density, unseen, training, name))
        flows.append((flow, density))
        losses[name] = training.losses
    measured = [0, len(flows) - 1] if options.quick else [0, len(flows) - 2]
    for index in measured:
        flow, density = flows[index]
        rows.append({"density": f"{density.name}, {options.batch} samples"})
        rows += gradients(flow, density.sample(options.batch, generator))
    flow, density = flows[measured[1]]
    numbers = {
        "losses": losses, "mass": mass(flows[0][0]),
        "hutchinson": estimate(flow, density.sample(50, generator), generator, 20),
    }  # fmt: skip
    plane = [(flow, density) for flow, density in flows if density.size == 2]
    plane = [plane[0], *plane[2:]]  # without the one that is not regularised
    return Outcome(numbers, rows, lambda: draw(plane, generator))


def draw(shown: Sequence[tuple[Flow, Mixture]], generator: torch.Generator) -> Any:
    """Draw the densities, samples of both, and paths from the normal to the samples."""
    drawn, axes = figure(
        len(shown), 4, "Continuous normalising flows: from a normal distribution to data",
        figsize=(14.0, 3.6 * len(shown) + 0.4),
    )  # fmt: skip
    box = (-EDGE, EDGE, -EDGE, EDGE)
    for row, (flow, density) in zip(axes, shown, strict=True):
        with torch.no_grad():
            learned = flow.log_density(flow.solver(**TOLERANCE), square(EDGE))[0].exp()
        truth = density.log_density(square(EDGE)).exp()
        for axis, values, title in (
            (row[0], truth, f"{density.name}: true density"), (row[1], learned, "learned density"),
        ):  # fmt: skip
            axis.imshow(values.reshape(CELLS, CELLS).T, origin="lower", extent=box,
                        vmin=0.0, vmax=truth.max(), cmap="viridis")  # fmt: skip
            axis.set(title=title)
            axis.grid(visible=False)
        paths = flow.paths(500, generator)
        data = density.sample(500, generator)
        row[2].plot(*data.T, "o", ms=3, mfc="white", mec="0.4", mew=0.6, label="data")
        row[2].plot(*paths[-1].T, ".", ms=3, color="C3", label="samples of the flow")
        row[2].legend(fontsize=7, loc="upper right")
        row[2].set(title="samples")
        few = paths[:, :60]
        row[3].plot(few[..., 0], few[..., 1], color="0.6", lw=0.7)
        row[3].plot(*few[0].T, ".", color="C0", ms=4, label="normal (t = 1)")
        row[3].plot(*few[-1].T, ".", color="C3", ms=4, label="sample (t = 0)")
        row[3].legend(fontsize=7, loc="upper right")
        row[3].set(title="paths")
        for axis in row:
            axis.set(xlim=box[:2], ylim=box[2:], aspect="equal", xlabel="$x_1$", ylabel="$x_2$")
    return drawn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""

    def add(parser: argparse.ArgumentParser) -> None:
        whole = partial(at_least, int)
        parser.add_argument("--batch", type=whole(2), default=256, help="samples of a step (256)")
        parser.add_argument("--unseen", type=whole(2), default=2000, help="of the NLL (2000)")
        parser.add_argument("--width", type=whole(1), default=48, help="of hidden layers (48)")

    quick = {"iterations": 30, "batch": 64, "unseen": 200, "width": 16}
    return arguments("flow", __doc__, argv, iterations=300, quick=quick, add=add)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

"""Two oscillators learned apart, and coupled without learning anything more.

A mass on a spring and with friction has an energy H(x), x = (q, p), and ports: a force F on the
mass, and the velocity w of the wall that its spring hangs on. As a port-Hamiltonian system::

    x' = (J - R) dH/dx + G u,    y = G^T dH/dx,    u = (F, w),    y = (velocity, -spring force)

with J skew and R positive semidefinite. C. Neary & U. Topcu, "Compositional learning of dynamical
system models using port-Hamiltonian neural networks" (2023) learn H and R of each part by itself,
from trajectories of the part alone, and couple what was learned. Here H is a convex network, s
x^2 / 2 + sum a_i log cosh(w_i x + b_i) with a_i, s > 0, R = L L^T, and J and G are known. Each
part is trained on 64 noisy windows of half a second under random constant inputs. Then

* *hung*: the second spring hangs on the first mass. u = C y with a skew matrix C, so that the
  whole is port-Hamiltonian again and its energy cannot rise, whatever was learned;
* *bolted*: the two masses are bolted together. The force s between them is an unknown more, and
  the equation for it is v1' = v2', the constraint v1 = v2 differentiated once: a differential-
  algebraic equation of index 1, with the mass matrix diag(1, 1, 1, 1, 0), solved by adaptive BDF.

The baseline is a plain network of x for the unforced x' and for y, of as many parameters, with the
same data and the same coupling.

Run it::

    python examples/port_hamiltonian.py

Measured with pnode 0.2.0 and torchdiffeq 0.2.5 on 2026-11-30, seed 0, one thread (27 s of CPU):

========================  ======  ===============  ===
what                      error   energy rises by  f
========================  ======  ===============  ===
hung, port-Hamiltonian    0.0083  0
hung, plain net           0.0365  0.0054
bolted, port-Hamiltonian  0.0055  0                385
========================  ======  ===============  ===

One gradient of a part, CPU time and memory relative to pnode's 19 ms and 1.3 MiB:

==========================  ======  ===  ====  ====
gradient by                 error   f    CPU   MiB
==========================  ======  ===  ====  ====
pnode, not compiled         2.4e-9  39   1     1
torchdiffeq odeint          9.5e-8  32   1.05  1.02
torchdiffeq odeint_adjoint  5.8e-8  102  3.6   0.32
==========================  ======  ===  ====  ====

Bolted together, v1 - v2 drifts by 5e-8 in 15 s. torchdiffeq can train the parts and solve the hung
ones, but has no method for the bolted ones.

What did not work: with constants in the energy's network the learned momentum at rest is not zero.
Started from p = 0 the bolted masses keep a difference of velocities, at which the bolt does work,
and the energy rose by 6 %; they now start from the learned state at rest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from gallery_common import LEARNED, TRUTH, Outcome, arguments, at_least, figure, launch, mlp, train
from gallery_physics import compare_gradients, polish

import pnode

PARTS = ((1.0, 1.5, 0.5, 0.15), (1.5, 1.0, 0.3, 0.1))  # m, k, k3, d: V' = k q + k3 q^3
STEP, STEPS, NOISE = 0.1, 5, 0.005
HIDDEN = 16
END, OUTPUTS = 15.0, 151
START = ((1.2, 0.0), (-0.5, 0.0))  # (q, p) of both parts


def matrix(*rows: Sequence[float]) -> torch.Tensor:
    """Return a matrix."""
    return torch.tensor(rows, dtype=torch.float64)


J, G = matrix((0, 1), (-1, 0)), matrix((0, -1), (1, 0))
HANG = matrix(
    (0, 0, 0, -1), (0, 0, 0, 0), (0, 0, 0, 0), (1, 0, 0, 0)
)  # u = C y; u = F1, w1, F2, w2


# ------------------------------------------------------------------------------------- the models


class Oscillator(torch.nn.Module):
    """The truth: H = p^2 / (2 m) + k q^2 / 2 + k3 q^4 / 4."""

    def __init__(self, m: float, k: float, k3: float, d: float) -> None:
        super().__init__()
        self.m, self.k, self.k3 = m, k, k3
        self.friction = matrix((0, 0), (0, d))

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        q, p = x.unbind(-1)
        return p**2 / (2 * self.m) + self.k * q**2 / 2 + self.k3 * q**4 / 4

    def slope(self, x: torch.Tensor) -> torch.Tensor:
        """dH/dx."""
        q, p = x.unbind(-1)
        return torch.stack([self.k * q + self.k3 * q**3, p / self.m], dim=-1)

    def drift(self, x: torch.Tensor) -> torch.Tensor:
        """x' without inputs."""
        return self.slope(x) @ (J - self.friction).T

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs y."""
        return self.slope(x) @ G


class Learned(Oscillator):
    """A convex energy and a friction matrix."""

    def __init__(self, generator: torch.Generator) -> None:
        torch.nn.Module.__init__(self)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.rows, self.bias = (torch.nn.Parameter(draw(*s)) for s in ((HIDDEN, 2), (HIDDEN,)))
        self.log_weights = torch.nn.Parameter(-3.0 + 0.1 * draw(HIDDEN))
        self.log_stiffness = torch.nn.Parameter(0.1 * draw(2))
        self.root = torch.nn.Parameter(0.3 * draw(2, 2))

    @property
    def friction(self) -> torch.Tensor:  # type: ignore[override]
        """R, positive semidefinite."""
        return self.root @ self.root.T

    def energy(self, x: torch.Tensor) -> torch.Tensor:
        z = x @ self.rows.T + self.bias
        log_cosh = z.abs() + torch.log1p(torch.exp(-2 * z.abs()))
        return (x**2 @ self.log_stiffness.exp()) / 2 + log_cosh @ self.log_weights.exp()

    def slope(self, x: torch.Tensor) -> torch.Tensor:
        inner = torch.tanh(x @ self.rows.T + self.bias) * self.log_weights.exp()
        return x * self.log_stiffness.exp() + inner @ self.rows


class Plain(torch.nn.Module):
    """The baseline: a network of x for the drift and the outputs."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.net = mlp(2, HIDDEN, 4, generator=generator)

    def drift(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)[..., :2]
        return result

    def output(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(x)[..., 2:]
        return result


class Forced(torch.nn.Module):
    """One part under constant inputs, for many windows at once."""

    def __init__(self, part: Any) -> None:
        super().__init__()
        self.part, self.inputs = part, torch.zeros(2, dtype=torch.float64)

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.part.drift(x) + self.inputs @ G.T
        return result


class Hung(torch.nn.Module):
    """Both parts, the second spring on the first mass: u = C y."""

    def __init__(self, parts: Sequence[Any]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)
        self.own = tuple(parts)

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        halves = [x[..., :2], x[..., 2:]]
        pairs = list(zip(self.own, halves, strict=True))
        y = torch.cat([part.output(half) for part, half in pairs], dim=-1)
        u = y @ HANG.T
        drifts = [part.drift(half) for part, half in pairs]
        return torch.cat([drifts[0] + u[..., :2] @ G.T, drifts[1] + u[..., 2:] @ G.T], dim=-1)


class Bolted(torch.nn.Module):
    """Both parts and the force s between their masses; the last equation is v1' - v2' = 0."""

    def __init__(self, parts: Sequence[Oscillator]) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)
        self.own = tuple(parts)

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        force = torch.stack([torch.zeros_like(state[4]), state[4]])
        rates, accelerations = [], []
        for part, x, sign in zip(self.own, (state[:2], state[2:4]), (-1.0, 1.0), strict=True):
            rate = part.drift(x) + sign * force
            rates.append(rate)
            accelerations.append(torch.func.jvp(part.slope, (x,), (rate,))[1][1:])
        return torch.cat([*rates, accelerations[0] - accelerations[1]])


# -------------------------------------------------------------------------------------- learning


def observe(index: int, seed: int, windows: int) -> tuple[torch.Tensor, ...]:
    """Return inputs, noisy states (steps + 1, windows, 2) and noisy outputs of one part."""
    generator = torch.Generator().manual_seed(1000 * (index + 1) + seed)
    part = Oscillator(*PARTS[index])
    field = Forced(part)
    field.inputs = 2 * torch.rand(windows, 2, generator=generator, dtype=torch.float64) - 1
    start = 3 * torch.rand(windows, 2, generator=generator, dtype=torch.float64) - 1.5
    states = pnode.Solver(field, rtol=1e-9, atol=1e-11)(start, times()).ys
    outputs = part.output(states)
    noisy = [
        exact + NOISE * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        for exact in (states, outputs)
    ]
    return field.inputs, noisy[0], noisy[1]


def times() -> torch.Tensor:
    """Return the times of a window's observations."""
    return STEP * torch.arange(STEPS + 1, dtype=torch.float64)


def loss_of(part: Any, data: tuple[torch.Tensor, ...], ys: torch.Tensor) -> torch.Tensor:
    """Mean squared errors of states and outputs."""
    _, states, outputs = data
    result: torch.Tensor = (ys - states).square().mean() + (
        part.output(states) - outputs
    ).square().mean()
    return result


def learn(
    part: Any, data: tuple[torch.Tensor, ...], options: argparse.Namespace, label: str
) -> Any:
    """Train one part on its own data; return it."""
    field = Forced(part)
    field.inputs = data[0]
    solver = pnode.Solver(field, method="rk4", step_size=STEP)

    def loss() -> torch.Tensor:
        return loss_of(part, data, solver(data[1][0], times()).ys)

    train(part, loss, options, rate=2e-2, label=label)
    polish(part, loss, options, options.iterations, f"{label}-polish")
    return part


# -------------------------------------------------------------------------------------- coupling


def swing(parts: Sequence[Any]) -> torch.Tensor:
    """Return the states of the hung oscillators: (outputs, 4)."""
    solver = pnode.Solver(Hung(parts), rtol=1e-8, atol=1e-10, max_steps=20_000, compile=False)
    with torch.no_grad():
        return solver(matrix(*START).reshape(-1), span()).ys


def bolt(parts: Sequence[Oscillator]) -> pnode.Solution:
    """Return the states of the bolted oscillators: (outputs, 5)."""
    mass = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    solver = pnode.Solver(
        Bolted(parts), mass=mass, method="bdf", rtol=1e-6, atol=1e-8, consistent_start=True,
        compile=False,
    )  # fmt: skip
    halves = [at_rest(part, q) for part, (q, _) in zip(parts, START, strict=True)]
    start = torch.cat([*halves, torch.zeros(1, dtype=torch.float64)])
    with torch.no_grad():
        return solver(start, span())


def at_rest(part: Oscillator, q: float) -> torch.Tensor:
    """Return (q, p) of velocity dH/dp = 0, by Newton's method; a learned energy has its own p."""
    x, momentum = matrix((q, 0.0))[0], matrix((0.0, 1.0))[0]
    for _ in range(20):
        slope, rate = torch.func.jvp(part.slope, (x,), (momentum,))[:2]
        x = x - (slope[1] / rate[1]).detach() * momentum
    return x


def span() -> torch.Tensor:
    """Return the output times of the coupled systems."""
    return torch.linspace(0.0, END, OUTPUTS, dtype=torch.float64)


def total(parts: Sequence[Oscillator], states: torch.Tensor) -> torch.Tensor:
    """Return the energy of both parts together."""
    with torch.no_grad():
        return parts[0].energy(states[:, :2]) + parts[1].energy(states[:, 2:4])


def highest_rise(energy: torch.Tensor) -> float:
    """Return the largest rise above what was reached before, as a share of the first energy."""
    return ((energy - energy.cummin(0).values).max() / (energy[0] - energy.min())).item()


def distance(found: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the root mean square error over that of the truth."""
    return ((found - truth).square().mean() / truth.square().mean()).sqrt().item()


def gradients(part: Learned, data: tuple[torch.Tensor, ...], quick: bool) -> list[dict[str, Any]]:
    """Measure a gradient of the first part's loss beside torchdiffeq's."""
    field = Forced(part)
    field.inputs = data[0]
    return compare_gradients(
        field, lambda solve: loss_of(part, data, solve(data[1][0], times())),
        list(part.parameters()), method="dopri5", quick=quick,
    )  # fmt: skip


def run(options: argparse.Namespace) -> Outcome:
    """Learn both parts in both ways, and couple them."""
    truth = [Oscillator(*values) for values in PARTS]
    data = [observe(index, options.seed, options.windows) for index in range(2)]
    parts: dict[str, list[Any]] = {"port-Hamiltonian": [], "plain net": []}
    for index in range(2):
        for name, kind in (("port-Hamiltonian", Learned), ("plain net", Plain)):
            generator = torch.Generator().manual_seed(10 * options.seed + index)
            label = f"{name.split('-')[0].split()[0]}-{index + 1}"
            parts[name].append(learn(kind(generator), data[index], options, label))
    learned = parts["port-Hamiltonian"]
    hung = {"truth": swing(truth)} | {name: swing(pair) for name, pair in parts.items()}
    solutions = {"truth": bolt(truth), "port-Hamiltonian": bolt(learned)}
    bolted = {name: solution.ys for name, solution in solutions.items()}
    energies = {
        "hung": total(learned, hung["port-Hamiltonian"]),
        "bolted": total(learned, bolted["port-Hamiltonian"]),
        "plain": total(truth, hung["plain net"]), "truth": total(truth, hung["truth"]),
    }  # fmt: skip
    speeds = [part.slope(half)[:, 1].detach() for part, half in zip(
        learned, bolted["port-Hamiltonian"][:, :4].split(2, dim=1), strict=True)]  # fmt: skip
    gap = speeds[0] - speeds[1]
    stats = solutions["port-Hamiltonian"].stats
    rows: list[dict[str, Any]] = [
        {"what": f"hung, {name}", "error": distance(hung[name], hung["truth"]),
         "energy rises by": highest_rise(energies[key])}
        for name, key in (("port-Hamiltonian", "hung"), ("plain net", "plain"))
    ]  # fmt: skip
    rows.append({
        "what": "bolted, port-Hamiltonian",
            "error": distance(bolted["port-Hamiltonian"], bolted["truth"]),
        "energy rises by": highest_rise(energies["bolted"]), "f": stats.rhs,
    })  # fmt: skip
    numbers = {
        "hung_error": rows[0]["error"], "plain_error": rows[1]["error"],
        "bolted_error": rows[2]["error"], "hung_rise": rows[0]["energy rises by"],
        "plain_rise": rows[1]["energy rises by"], "bolted_rise": rows[2]["energy rises by"],
        "bolted_drift": (gap - gap[0]).abs().max().item(), "bolted_steps": stats.steps,
        "bolted_rejected": stats.rejected, "newton": stats.newton,
        "parameters": [sum(p.numel() for p in pair[0].parameters()) for pair in parts.values()],
    }  # fmt: skip
    untrained = Learned(torch.Generator().manual_seed(10 * options.seed))
    rows += gradients(untrained, data[0], options.quick)
    return Outcome(numbers, rows, lambda: draw(hung, bolted, energies, rows))


def draw(
    hung: dict[str, torch.Tensor], bolted: dict[str, torch.Tensor],
    energies: dict[str, torch.Tensor], rows: list[dict[str, Any]],
) -> Any:  # fmt: skip
    """Draw the coupled motions and their energies."""
    drawn, axes = figure(2, 2, "Two oscillators learned apart, then coupled without training")
    t, plain = span(), {"color": "C0", "lw": 1.0, "ls": "--", "label": "plain net"}
    axis = axes[0, 0]
    axis.plot(t, hung["truth"][:, 2], **TRUTH)
    axis.plot(t, hung["plain net"][:, 2], **plain)
    axis.plot(t, hung["port-Hamiltonian"][:, 2], **{**LEARNED, "label": "port-Hamiltonian"})
    axis.set(title="second spring hung on the first mass", xlabel="time (s)",
             ylabel="elongation of spring 2 (m)")  # fmt: skip
    axis.legend(fontsize=8)
    axis = axes[0, 1]
    axis.plot(t, energies["truth"], **{**TRUTH, "label": "true energy along the true path"})
    axis.plot(t, energies["plain"], **{**plain, "label": "true energy along the plain net's path"})
    axis.plot(t, energies["hung"] - energies["hung"][-1] + energies["truth"][-1],
              **{**LEARNED, "label": "learned energy along its own path (shifted)"})  # fmt: skip
    axis.set(title="energy of both parts, hung", xlabel="time (s)", ylabel="energy (J)")
    axis.legend(fontsize=8)
    for axis, column, title, unit in (
        (axes[1, 0], 0, "masses bolted together: a DAE", "elongation of spring 1 (m)"),
        (axes[1, 1], 4, "the force in the bolt", "force (N)"),
    ):
        axis.plot(t, bolted["truth"][:, column], **TRUTH)
        axis.plot(
            t, bolted["port-Hamiltonian"][:, column], **{**LEARNED, "label": "port-Hamiltonian"}
        )
        axis.set(title=title, xlabel="time (s)", ylabel=unit)
        axis.legend(fontsize=8)
    return drawn


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this example's own option."""
    parser.add_argument("--windows", type=at_least(int, 4), default=64, help="windows of data (64)")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    quick = {"iterations": 60, "windows": 32}
    return arguments(
        "port_hamiltonian", __doc__, argv, iterations=200, quick=quick, add=add_options
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

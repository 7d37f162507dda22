"""A thousand stiff reactors, each with a temperature of its own: activation energies learned.

Robertson's reactions A -> B, B + B -> B + C, B + C -> A + C in a thousand well-stirred reactors,
whose rates follow Arrhenius' law at each one's temperature,

::

    a' = -k1 a + k3 b c,   b' = k1 a - k3 b c - k2 b^2,   c' = k2 b^2
    k_i = exp(log k_i(350 K) - E_i / R (1/T - 1/350 K))

The three rate constants and activation energies E_i are found from noisy measurements of all
reactors by L-BFGS, from energies 20 to 40 per cent wrong. Rows of the state are independent:
either all take the same steps, with ``jacobian="block"``, which factors a thousand 3 x 3 systems
side by side; or each has its own, ``samples="independent"``, in machine code. The training takes
its own (with ``--quick`` the same for all, which needs no compiler). The peer is diffrax, whose
``vmap`` gives each reactor its own steps, in as many rounds as the slowest one needs.

Run it on one rank or several::

    python examples/reactors.py
    mpirun -n 2 python examples/reactors.py

Measured with pnode 0.2.0 and diffrax 0.7.2 on 2026-11-30, seed 0: one gradient of 100 reactors at
the same tolerances; errors of the states are in units of (1, 3e-5, 1), CPU time and memory relative
to those of bdf with the same steps for all, 0.78 s and 1.0 MiB; counts of own steps are sums:

=========================  =======  =====  ======  =========  =====  ====
solver                     error    steps  f       Jacobians  CPU    MiB
=========================  =======  =====  ======  =========  =====  ====
pnode, bdf                 1.4e-05  200    420     78         1      1
pnode, bdf, own steps      1.1e-05  18813  23255   999        0.05   2.9
pnode, esdirk6, own steps  1.1e-05  5401   109297  108893     0.033  1.5
pnode, esdirk6             3.0e-06  66     3124    66         2.0    1.3
diffrax, Kvaerno5, vmap    2.9e-05                            5.6    471
=========================  =======  =====  ======  =========  =====  ====

diffrax takes 21 s of CPU time to compile besides, and the MiB are those with that; its gradient and
that of esdirk6 differ by 4e-07. Learned from a thousand reactors, 84 iterations of L-BFGS (the
whole program takes 26 s of CPU time without diffrax), the loss from 224 to 1.014, where 1 is the
noise:

============  ======  ======  =======
parameter     truth   guess   learned
============  ======  ======  =======
log k1        -3.219  -2.813  -3.217
log k2        17.217  16.811  17.219
log k3        9.210   9.547   9.208
E1 (kJ/mol)   60.000  72.000  59.794
E2 (kJ/mol)   25.000  15.000  24.811
E3 (kJ/mol)   40.000  52.000  39.804
============  ======  ======  =======

Two ranks find the loss of one to 1e-13. For this Newton's method of bdf with the same steps for all
is made to go on to 1e-9 (``snes_stol``): what it leaves at its default, a twentieth of the
tolerance, depends on round-off, 5e-10 in the loss. What did not work: esdirk6 with the same steps
for all, whose simplified Newton iteration needs seven evaluations for each stage, is more expensive
than bdf, though with a smaller error.
"""

from __future__ import annotations

import argparse
import math
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
    counts,
    figure,
    launch,
    measure,
    peer,
    train,
)
from mpi4py import MPI

import pnode
from pnode.parallel import total

GAS, MIDDLE = 8.314e-3, 350.0  # kJ / (mol K); K
RATES, ENERGIES = (0.04, 3e7, 1e4), (60.0, 25.0, 40.0)  # 1 / time; kJ / mol
GUESS, WRONG = (0.06, 2e7, 1.4e4), (1.2, 0.6, 1.3)  # rates, and factors of the energies
SCALE = (1.0, 3e-5, 1.0)  # of a, b and c
RTOL, ATOL, NOISE = 1e-5, 1e-7, 0.02


class Kinetics(torch.nn.Module):
    """f of the reactors at temperatures (N, 1); the state has the shape (N, 3)."""

    def __init__(
        self, temperatures: torch.Tensor, rates: Sequence[float], energies: Sequence[float]
    ) -> None:
        super().__init__()
        log_rates = torch.tensor(rates, dtype=torch.float64).log()
        self.log_rates = torch.nn.Parameter(log_rates)
        self.energies = torch.nn.Parameter(torch.tensor(energies, dtype=torch.float64) / 10.0)
        self.colder = (1.0 / temperatures - 1.0 / MIDDLE) * 10.0 / GAS

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        k1, k2, k3 = (self.log_rates - self.energies * self.colder).exp().unbind(-1)
        a, b, c = y.unbind(-1)
        slow, fastest, fast = k1 * a, k2 * b**2, k3 * b * c
        return torch.stack([fast - slow, slow - fast - fastest, fastest], dim=-1)


def solver(
    kinetics: Kinetics, comm: MPI.Intracomm, method: str = "bdf", accuracy: float = 1.0,
    own_steps: bool = False,
) -> pnode.Solver:  # fmt: skip
    """Return a solver whose steps all reactors of all ranks share, or each has its own."""
    atol = accuracy * ATOL * torch.tensor(SCALE, dtype=torch.float64)
    steps = pnode.Steps(rtol=accuracy * RTOL, atol=atol)
    if own_steps:
        return pnode.Solver(
            kinetics, method=method, samples="independent", compile=True, comm=comm, steps=steps
        )
    return pnode.Solver(
        kinetics, method=method, jacobian="block", comm=comm, compile=False, steps=steps,
        petsc_options={"snes_stol": 1e-9} if method == "bdf" else None,
    )  # fmt: skip


@dataclass
class Measured:
    """The reactors of this rank: temperatures (n, 1), times, and noisy states (T, n, 3)."""

    temperatures: torch.Tensor
    times: torch.Tensor
    states: torch.Tensor
    number: int

    @classmethod
    def random(cls, number: int, generator: torch.Generator, comm: MPI.Intracomm) -> Measured:
        """Draw temperatures and noise of all reactors, and keep those of this rank."""
        all_of_them = 320.0 + 60.0 * torch.rand((number, 1), generator=generator).double()
        times = torch.cat([torch.zeros(1), torch.logspace(-2, 2, 9)]).double()
        noise = torch.randn((len(times), number, 3), generator=generator, dtype=torch.float64)
        mine = slice(number * comm.rank // comm.size, number * (comm.rank + 1) // comm.size)
        temperatures = all_of_them[mine]
        with torch.no_grad():
            exact = solver(Kinetics(temperatures, RATES, ENERGIES), comm, accuracy=1e-2)
            truth = exact(start(temperatures), times).ys
        states = truth + NOISE * torch.tensor(SCALE) * noise[:, mine]
        return cls(temperatures, times, states, number)


def start(temperatures: torch.Tensor) -> torch.Tensor:
    """Return pure A in each reactor."""
    pure = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    return pure.expand(len(temperatures), 3).clone()


def loss_of(
    kinetics: Kinetics, data: Measured, comm: MPI.Intracomm, method: str = "bdf",
    own_steps: bool = False,
) -> Callable[[], tuple[torch.Tensor, pnode.Solution]]:  # fmt: skip
    """Return a function that solves and compares: the mean square in units of the noise."""
    solve = solver(kinetics, comm, method, own_steps=own_steps)
    scale = NOISE * torch.tensor(SCALE, dtype=torch.float64)

    def loss() -> tuple[torch.Tensor, pnode.Solution]:
        solution = solve(start(data.temperatures), data.times)
        misfit = ((solution.ys - data.states) / scale)[1:].square().sum()
        return total(misfit, comm) / (3 * (len(data.times) - 1) * data.number), solution

    return loss


def gradient(
    loss: Callable[[], tuple[torch.Tensor, pnode.Solution]], kinetics: Kinetics
) -> tuple[float, torch.Tensor, pnode.Solution]:
    """Return the loss, its gradient and the solution."""
    value, solution = loss()
    parts = torch.autograd.grad(value, list(kinetics.parameters()))
    return value.item(), torch.cat(parts), solution


def by_diffrax(data: Measured) -> Any:
    """Return a function of (log rates, energies) that gives loss and gradient, by diffrax."""
    diffrax, jax = peer("diffrax"), peer("jax")
    if diffrax is None or jax is None:
        return None
    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy
    colder = jnp.asarray((1.0 / data.temperatures - 1.0 / MIDDLE).numpy() * 10.0 / GAS)
    times, states = jnp.asarray(data.times.numpy()), jnp.asarray(data.states.numpy())
    scale = jnp.asarray(SCALE)

    def field(t: Any, y: Any, rates: Any) -> Any:
        a, b, c = y
        slow, fastest, fast = rates[0] * a, rates[1] * b**2, rates[2] * b * c
        return jnp.stack([fast - slow, slow - fast - fastest, fastest])

    def one(rates: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field), diffrax.Kvaerno5(), times[0], times[-1], None,
            jnp.asarray([1.0, 0.0, 0.0]), rates, saveat=diffrax.SaveAt(ts=times), max_steps=4096,
            stepsize_controller=diffrax.PIDController(rtol=RTOL, atol=ATOL * scale),
        ).ys  # fmt: skip

    def loss(parameters: Any) -> Any:
        rates = jnp.exp(parameters[0] - parameters[1] * colder)
        ys = jnp.swapaxes(jax.vmap(one)(rates), 0, 1)
        return jnp.mean(((ys - states) / (NOISE * scale))[1:] ** 2), ys

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def call(kinetics: Kinetics) -> tuple[float, torch.Tensor, torch.Tensor]:
        parameters = [jnp.asarray(each.detach().numpy()) for each in kinetics.parameters()]
        (value, ys), found = jax.block_until_ready(compiled(parameters))
        slope = torch.tensor([float(each) for part in found for each in part])
        return float(value), slope, torch.tensor(ys.tolist(), dtype=torch.float64)

    return call


def compare(
    kinetics: Kinetics, data: Measured, options: argparse.Namespace, comm: MPI.Intracomm
) -> list[dict[str, Any]]:
    """Measure one gradient, by pnode and (on one rank) by diffrax; errors are those of states."""
    with torch.no_grad():
        tight = solver(kinetics, comm, accuracy=1e-3)
        truth = tight(start(data.temperatures), data.times).ys

    def error(ys: torch.Tensor) -> float:
        worst = ((ys.detach() - truth) / torch.tensor(SCALE)).abs().max().item()
        return float(comm.allreduce(worst, MPI.MAX))

    rows = []
    runs = [("bdf", False), ("bdf", True), ("esdirk6", True), ("esdirk6", False)]
    for method, own_steps in runs[:1] if options.quick else runs:
        loss = loss_of(kinetics, data, comm, method, own_steps)
        ours = measure(partial(gradient, loss, kinetics), warm_up=True)
        value, slope, solution = ours.value
        taken = counts(solution)
        name = f"pnode, {method}{', own steps' if own_steps else ''}"
        rows.append({"run": name, "loss": value, "error": error(solution.ys),
                     "steps": taken["steps"], "rhs": taken["rhs"], "jacobians": taken["jacobians"],
                     "CPU s": ours.cpu_seconds, "MiB": ours.peak_mib})  # fmt: skip
    theirs = by_diffrax(data) if comm.size == 1 and not options.quick else None
    if theirs is not None:
        first = measure(lambda: theirs(kinetics))
        found = measure(lambda: theirs(kinetics))
        apart = (found.value[1] - slope).norm() / slope.norm()
        rows.append(
            {"run": "diffrax, Kvaerno5, vmap", "loss": found.value[0],
             "error": error(found.value[2]), "CPU s": found.cpu_seconds, "MiB": first.peak_mib,
             "compiling, CPU s": first.cpu_seconds - found.cpu_seconds,
             "gradient differs by": apart.item()}
        )  # fmt: skip
    return rows


def run(options: argparse.Namespace) -> Outcome:
    """Compare, and learn the rates and the energies. Collective."""
    comm = MPI.COMM_WORLD
    generator = torch.Generator().manual_seed(options.seed)
    data = Measured.random(options.reactors, generator, comm)
    guess = [energy * factor for energy, factor in zip(ENERGIES, WRONG, strict=True)]
    few = Measured.random(options.compared, generator, comm)
    rows = compare(Kinetics(few.temperatures, GUESS, guess), few, options, comm)
    kinetics = Kinetics(data.temperatures, GUESS, guess)
    first = {name: part.detach().clone() for name, part in kinetics.named_parameters()}
    loss = loss_of(kinetics, data, comm, own_steps=not options.quick)
    found = train(
        kinetics, lambda: loss()[0], options, constant=True, comm=comm,
        optimizer=lambda parts: torch.optim.LBFGS(
            parts, max_iter=7, line_search_fn="strong_wolfe"
        ),
    )  # fmt: skip
    truth = torch.cat([torch.tensor(RATES).double().log(), torch.tensor(ENERGIES).double()])
    learned = torch.cat([kinetics.log_rates, 10.0 * kinetics.energies]).detach()
    with torch.no_grad():
        final, solution = loss()
    names = [f"log k{i}" for i in (1, 2, 3)] + [f"E{i} (kJ/mol)" for i in (1, 2, 3)]
    begun = torch.cat([first["log_rates"], 10.0 * first["energies"]])
    for name, *values in zip(names, truth, begun, learned, strict=True):
        keys = ("truth", "guess", "learned")
        rows.append({"run": name, **dict(zip(keys, map(float, values), strict=True))})
    numbers = {
        "first_loss": found.losses[0], "losses": found.losses, "final_loss": final.item(),
        "learned": learned, "truth": truth,
        "largest_error_of_energies": (learned - truth)[3:].abs().max().item(),
    }  # fmt: skip
    return Outcome(numbers, rows, lambda: draw(data, solution, kinetics, first))


def draw(
    data: Measured, solution: pnode.Solution, kinetics: Kinetics, first: dict[str, torch.Tensor]
) -> Any:
    """Show B in the coldest and the hottest reactor, and the rates over temperature."""
    drawn, axes = figure(1, 3, "Stiff reactors: kinetics learned from all of them together")
    ends = int(data.temperatures.argmin()), int(data.temperatures.argmax())
    with torch.no_grad():
        smooth = torch.cat([torch.zeros(1), torch.logspace(-3, 2, 60)]).double()
        few = data.temperatures[list(ends)]
        exact = solver(Kinetics(few, RATES, ENERGIES), MPI.COMM_SELF, accuracy=1e-2)(
            start(few), smooth
        ).ys
    for axis, row, index in zip(axes[0], (0, 1), ends, strict=False):
        axis.semilogx(smooth[1:], 1e5 * exact[1:, row, 1], **TRUTH)
        axis.semilogx(data.times[1:], 1e5 * data.states[1:, index, 1], **DATA)
        axis.semilogx(data.times[1:], 1e5 * solution.ys[1:, index, 1], **{**LEARNED, "marker": "+"})
        axis.set(title=f"reactor at {few[row].item():.0f} K", xlabel="time",
                 ylabel="concentration of B (units of 1e-5)")  # fmt: skip
        axis.legend(fontsize=8)
    kelvin = torch.linspace(320.0, 380.0, 50, dtype=torch.float64)[:, None]
    colder = (1.0 / kelvin - 1.0 / MIDDLE) * 10.0 / GAS
    for index, color in enumerate(("C0", "C1", "C2")):
        lines = ((torch.tensor(RATES).double().log(), torch.tensor(ENERGIES) / 10.0),
                 (first["log_rates"], first["energies"]),
                 (kinetics.log_rates.detach(), kinetics.energies.detach()))  # fmt: skip
        styles: tuple[dict[str, Any], ...] = ({"lw": 5, "alpha": 0.3}, {"ls": ":"}, {"lw": 1.6})
        for (log_rate, energy), style, name in zip(
            lines, styles, ("truth", "first guess", "learned"), strict=True
        ):
            value = (log_rate[index] - energy[index] * colder[:, 0]) / math.log(10.0)
            axes[0, 2].plot(kelvin, value, color=color, label=f"k{index + 1}, {name}", **style)
    axes[0, 2].set(title="Arrhenius' law", xlabel="temperature (K)", ylabel="log10 of the rate")
    axes[0, 2].legend(fontsize=6, ncols=3)
    return drawn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--reactors", type=at_least(int, 2), default=1000, help="(1000)")
        parser.add_argument(
            "--compared", type=at_least(int, 2), default=100, help="in the table of times (100)"
        )

    quick = {"iterations": 1, "reactors": 20, "compared": 10}
    return arguments("reactors", __doc__, argv, iterations=12, quick=quick, add=add)


def main(argv: Sequence[str] | None = None) -> int:
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

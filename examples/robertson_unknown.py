"""Robertson's stiff kinetics with one unknown reaction, and its order recovered.

Of the three reactions of H. H. Robertson (1966), whose rates span nine decades ::

    A -> B        0.04 A
    B + B -> C + B    3e7 B^2
    B + C -> A + C    1e4 B C

the second is not known: all that is known is that something turns B into C. Its rate is a network
of the logarithms, as in chemical reaction networks (W. Ji & S. Deng, "Autonomous discovery of
unknown reaction pathways from data by chemical reaction neural network", 2021; S. Kim et al.,
"Stiff neural ordinary differential equations", 2021), but free to be no power law::

    log r = b + w . log(A, B, C) + N(log A, log B, log C)

Observed are A, B and C, with noise of 1 %, at 25 times between 1e-4 and 100, from five mixtures
of A and C. The slopes of log r along the learned paths are the orders of the reaction; where they
are integers within their spread, the rate constant is what remains.

The equations are stiff: the solver is an ESDIRK method of order 3, adaptive, whole solves compiled
(``compile=True``; without a compiler it takes five hundred times as long). Beside it: diffrax with
Kvaerno's method of order 3, jitted. Explicit methods are hopeless, which is measured too.

Run it::

    python examples/robertson_unknown.py

Measured with pnode 0.2.0 and diffrax 0.7.2 on 2026-11-30, seed 0, one thread (44 s of CPU, most of
it for what pnode without compiling and diffrax take): orders -0.01 in A, 1.86 in B and -0.10 in C,
with spreads of 0.07, 0.01 and 0.05, which round to 0, 2 and 0; the rate constant is then 3.08e7.
dopri5 would take 69,000 steps, the solver takes 160. One gradient of all five solves, CPU time and
memory relative to the first line's 12 ms and 0.05 MiB:

===================  ======  ====  ====  =============
gradient by          error   CPU   MiB   first call, s
===================  ======  ====  ====  =============
pnode, compiled      3.2e-7  1     1     0.21
pnode, not compiled  3.2e-7  529   43    6.6
diffrax              2.8e-7  27    4.6   25
===================  ======  ====  ====  =============

What did not work: after Adam alone the network is no power law at all (orders 2.4, 1.3 and 0). B
follows A and C closely along these paths, and tells the orders apart only slowly: its 1.86 is off
by far more than its spread, which is that along the learned paths.
"""

from __future__ import annotations

import argparse
import math
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
    figure,
    launch,
    measure,
    mlp,
    train,
)  # fmt: skip
from gallery_physics import diffrax_gradient, polish

import pnode

K1, K2, K3 = 0.04, 3e7, 1e4
STARTS = torch.tensor([[a, 0.0, 1.0 - a] for a in (1.0, 0.9, 0.7, 0.5, 0.3)], dtype=torch.float64)
END, OBSERVED, NOISE, WIDTH = 100.0, 25, 0.01, 8
POLISH = 200  # iterations of L-BFGS
FLOOR = 1e-9  # of what logarithms are taken of
GUESS = (0.0, 1.0, 0.0, 5.0)  # first order in B, 150 per unit of time
ORDERS = (0, 2, 0)
RTOL, ATOL = 1e-6, (1e-9, 1e-13, 1e-9)


class Kinetics(torch.nn.Module):
    """The equations with a given rate of the second reaction, a function of (A, B, C)."""

    def __init__(self, rate: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b, c = y
        slow, back, unknown = K1 * a, K3 * b * c, self.rate(y)
        return torch.stack([back - slow, slow - back - unknown, unknown])


class Rate(torch.nn.Module):
    """exp(b + w . logs + N(logs)), for states (..., 3)."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = mlp(3, WIDTH, 1, generator=torch.Generator().manual_seed(seed))
        self.linear = torch.nn.Parameter(torch.tensor(GUESS, dtype=torch.float64))

    def logarithm(self, logs: torch.Tensor) -> torch.Tensor:
        """Return log r of logarithms."""
        known = logs @ self.linear[:3] + self.linear[3]
        result: torch.Tensor = known + 0.1 * self.net(logs / 5.0)[..., 0]
        return result

    def forward(self, y: torch.Tensor) -> torch.Tensor:
        return torch.exp(self.logarithm(torch.log(y + FLOOR)))


def truth(y: torch.Tensor) -> torch.Tensor:
    """The rate that is to be found."""
    return K2 * y[..., 1] ** 2


def make_solver(rate: Callable[[torch.Tensor], torch.Tensor], **keywords: Any) -> pnode.Solver:
    """Return the solver."""
    chosen = {"method": "es325", "rtol": RTOL, "atol": torch.tensor(ATOL, dtype=torch.float64)}
    return pnode.Solver(
        Kinetics(rate), **{**chosen, "compile": True, "max_steps": 5000, **keywords}
    )


def times(number: int = OBSERVED) -> torch.Tensor:
    """Return the start and the times of the observations."""
    later = torch.logspace(-4, math.log10(END), number, dtype=torch.float64)
    return torch.cat([torch.zeros(1, dtype=torch.float64), later])


def solve_all(solver: pnode.Solver, t: torch.Tensor) -> torch.Tensor:
    """Return the states from all mixtures: (mixtures, times, 3)."""
    return torch.stack([solver(start, t).ys for start in STARTS])


def mean_square(states: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """Mean squared relative error."""
    scale = observed + 0.01 * observed.amax((0, 1))
    return (((states - observed) / scale)[:, 1:]).square().mean()


def by_diffrax(rate: Rate, observed: torch.Tensor) -> Callable[[], Any] | None:
    """Return a function that computes the loss's gradient by diffrax; None where it is missing."""
    target = observed.numpy()
    scale = target + 0.01 * target.max((0, 1))

    def field(jax: Any, y: Any, w: Any) -> Any:
        jnp = jax.numpy
        logs = jnp.log(jnp.where(y < 0.0, 0.0, y) + FLOOR)  # NaN would end diffrax's Newton method
        hidden = jnp.tanh(w["net.0.weight"] @ (logs / 5.0) + w["net.0.bias"])
        net = (w["net.2.weight"] @ hidden + w["net.2.bias"])[0]
        unknown = jnp.exp(logs @ w["linear"][:3] + w["linear"][3] + 0.1 * net)
        slow, back = K1 * y[0], K3 * y[1] * y[2]
        return jnp.stack([back - slow, slow - back - unknown, unknown])

    def loss(states: Any) -> Any:
        return ((((states - target) / scale)[:, 1:]) ** 2).mean()

    return diffrax_gradient(field, rate, STARTS, times(), loss, rtol=RTOL, atol=ATOL)


def gradients(rate: Rate, observed: torch.Tensor, peers: bool) -> list[dict[str, Any]]:
    """Measure one gradient of the loss: compiled, not compiled, by diffrax."""

    def by(solver: pnode.Solver) -> torch.Tensor:
        loss = mean_square(solve_all(solver, times()), observed)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, [*rate.parameters()])])

    compiled, plain = make_solver(rate), make_solver(rate, compile=False)
    tight = torch.tensor([1e-12, 1e-16, 1e-12], dtype=torch.float64)
    exact = by(make_solver(rate, rtol=1e-9, atol=tight))
    ways: dict[str, Callable[[], Any] | None] = {"pnode, compiled": lambda: by(compiled)}
    if peers:
        ways |= {
            "pnode, not compiled": lambda: by(plain),
            "diffrax": by_diffrax(rate, observed),
        }
    rows: list[dict[str, Any]] = []
    for name, call in ways.items():
        if call is None:
            continue
        first = measure(call)
        measured = first if "not" in name else measure(call, 3)
        error = (measured.value - exact).norm() / exact.norm()
        rows.append({"what": f"gradient, {name}", "error": error.item(),
                     "CPU ms": 1e3 * measured.cpu_seconds, "first, s": first.cpu_seconds,
                     "MiB": measured.peak_mib})  # fmt: skip
        rows[-1]["ratio"] = rows[-1]["CPU ms"] / rows[0]["CPU ms"]
    return rows


def explicit_steps(rate: Rate) -> float:
    """Return about how many steps dopri5 takes for one solve."""
    reached = [0.0]
    monitor = lambda step, t, y: reached.append(t)  # noqa: E731
    solver = make_solver(rate, method="dopri5", max_steps=300, monitor=monitor, compile=False)
    try:
        with torch.no_grad():
            return float(solver(STARTS[0], times()).stats.steps)
    except pnode.SolveError:
        return 300 * END / max(reached)


def orders(rate: Rate, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the slopes of log r at all states, and the logarithms."""
    logs = torch.log(states + FLOOR).requires_grad_()
    return torch.autograd.grad(rate.logarithm(logs).sum(), logs)[0], logs.detach()


def run(options: argparse.Namespace) -> Outcome:
    """Learn the rate, and find its orders."""
    generator = torch.Generator().manual_seed(options.seed)
    with torch.no_grad():
        clean = solve_all(make_solver(truth, method="esdirk6", rtol=1e-9), times())
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    observed = clean * (1.0 + NOISE * noise)
    rate = Rate(options.seed)
    solver = make_solver(rate)

    def loss() -> torch.Tensor:
        return mean_square(solve_all(solver, times()), observed)

    training = train(rate, loss, options, rate=0.05, label="rate", clip=1.0)
    polished = polish(rate, loss, options, POLISH)
    with torch.no_grad():
        learned = solve_all(solver, times(100))
    states = learned[:, 20:].reshape(-1, 3)  # behind the first instant, where B = 0
    slopes, logs = orders(rate, states)
    mean, spread = slopes.mean(0), slopes.std(0)
    value = rate.logarithm(logs).detach()
    rounded = mean.round()
    constant = (value - logs @ rounded).mean().exp().item()
    error = ((rate(states).detach() - truth(states)) / truth(states)).square().mean().sqrt().item()
    counts = solver(STARTS[0], times()).stats
    rows: list[dict[str, Any]] = [
        {"what": f"order in {name}", "found": m.item(), "spread": s.item(), "true": float(o)}
        for name, m, s, o in zip("ABC", mean, spread, ORDERS, strict=True)
    ]
    rows.append({"what": "rate constant", "found": constant, "true": K2})
    rows += gradients(Rate(options.seed), observed, not options.quick)  # not where it vanishes
    steps = explicit_steps(rate)
    numbers = {
        "orders": mean.tolist(), "spread": spread.tolist(), "rounded": rounded.tolist(),
        "constant": constant, "rate_error": error, "explicit_steps": steps, "steps": counts.steps,
        "evaluations": counts.rhs, "losses": training.losses + polished.losses,
    }  # fmt: skip
    return Outcome(numbers, rows, lambda: draw(observed, learned, rate, states, slopes))


def draw(
    observed: torch.Tensor, learned: torch.Tensor, rate: Rate, states: torch.Tensor,
    slopes: torch.Tensor,
) -> Any:  # fmt: skip
    """Draw B over time, the rate against B, and the orders."""
    drawn, axes = figure(1, 3, "An unknown reaction in Robertson's kinetics, learned as a network",
                         figsize=(13, 4.2))  # fmt: skip
    axis, fine = axes[0, 0], times(100)[1:]
    for index in (0, 2, 4):
        axis.semilogx(fine, 1e5 * learned[index, 1:, 1], **{**LEARNED, "label": "learned"})
        axis.semilogx(times()[1:], 1e5 * observed[index, 1:, 1], **DATA)
        axis.annotate(f"A = {STARTS[index, 0]:g} at first", (1e-2, 1e5 * observed[index, 12, 1]),
                      fontsize=8, ha="center", va="bottom", xytext=(0, 6),
                      textcoords="offset points")  # fmt: skip
    axis.margins(y=0.12)
    axis.set(title="three of the five mixtures", xlabel="time (s)", ylabel="B (1e-5)")
    axis.legend(*[pair[:2] for pair in axis.get_legend_handles_labels()], fontsize=8)
    axis, order = axes[0, 1], states[:, 1].argsort()
    b = states[order, 1]
    axis.loglog(b, truth(states)[order], **{**TRUTH, "label": "truth: 3e7 B^2"})
    axis.loglog(b, rate(states).detach()[order], ".", ms=3, color=LEARNED["color"],
                label="network along the paths")  # fmt: skip
    axis.xaxis.set_minor_formatter("")
    axis.set(title="the unknown rate", xlabel="B", ylabel="rate (1 / s)")
    axis.legend(fontsize=8)
    axis = axes[0, 2]
    boxes = axis.boxplot([slopes[:, k] for k in range(3)], patch_artist=True, showfliers=False)
    for box in boxes["boxes"]:
        box.set_facecolor(LEARNED["color"])
    axis.plot([1, 2, 3], ORDERS, "k_", ms=40, mew=2, label="truth")
    axis.set_xticks([1, 2, 3], ["A", "B", "C"])
    axis.set(
        title="orders: slopes of the network's log r",
        ylabel="d log r / d log (A, B, C); black: truth",
    )
    return drawn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    return arguments("robertson_unknown", __doc__, argv, iterations=200, quick={"iterations": 80})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

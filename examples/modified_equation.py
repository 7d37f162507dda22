"""What a neural ODE learns is not the field but the modified field of its method.

Fit a field g so that steps of length h of a method of order p reproduce data of y' = f(y). What
is learned is the field whose *numerical* solution is exact, the inverse modified equation of A.
Zhu, P. Jin, B. Zhu & Y. Tang, "On numerical integration in neural ordinary differential
equations" (2022)::

    g = f + h^p f_p + O(h^(p+1)),    f_p = lim (exact step - step of the method with f) / h^(p+1)

so that the distance from g to f falls like h^p, and that to f + h^p f_p like h^(p+1). Both slopes
are measured here for Euler's method, the midpoint rule and the classical Runge-Kutta method, on
the epidemic of Kermack and McKendrick (1927) in shares of a population::

    S' = -beta S I,    I' = beta S I - gamma I

with beta = 2.5 and gamma = 1. f_p is found by differentiating both steps p + 1 times in h, by
nested forward-mode derivatives. g is a polynomial of degree 7, fitted to exact steps from 144
states by Gauss-Newton, whose Jacobian is ``pnode.sensitivities``: converged to round-off, it
shows the slopes. A network (tanh, Adam and L-BFGS) is trained on the same steps with Euler's
method at one h. What was learned by one method is then followed by the same method and by an
accurate one.

Run it (24 s of CPU)::

    python examples/modified_equation.py

Measured with pnode 0.2.0 and torchdiffeq 0.2.5 on 2026-11-30, seed 0, one thread:

===============================  ========  =====  =================  =========
what                             to f      slope  to modified field  its slope
===============================  ========  =====  =================  =========
polynomial by euler, h = 0.1     0.035     1.03   0.0038             1.94
polynomial by midpoint, h = 0.1  0.00192   2.01   0.000197           3.03
polynomial by rk4, h = 0.1       2.58e-06  3.92   7.69e-07           5.02
net by euler, h = 0.2            0.0721           0.0138
===============================  ========  =====  =================  =========

==================================  ========
what                                error
==================================  ========
net by euler, steps as in training  0.000358
net by euler, solved accurately     0.0122
==================================  ========

====================================  ======  =  ======  =====  =====
what                                  error   f  CPU ms  MiB    ratio
====================================  ======  =  ======  =====  =====
gradient, pnode                       0       2  5.71    0.387  1
gradient, pnode, compiled             1e-15      4.07    0.418  0.712
gradient, torchdiffeq odeint          0       2  2.03    0.281  0.355
gradient, torchdiffeq odeint_adjoint  0.0254  4  3.53    0.305  0.619
====================================  ======  =  ======  =====  =====

The gradients of one step are the same numbers in both packages; for a problem of a single small
step pnode takes longer, most of it the constant cost of a solve. The slope of Euler's second line
is still on its way to 2 at these steps. The network is as far from the modified field as the
polynomial: what is left is the next term of the series, and not a lack of training.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from gallery_common import Outcome, arguments, figure, launch, mlp, train
from gallery_physics import compare_gradients, fit, polish

import pnode

BETA, GAMMA = 2.5, 1.0
DEGREE, SIDE = 7, 12
STEPS = (0.4, 0.2, 0.1, 0.05)
NET_STEP, WIDTH = 0.2, 24
TABLEAUS: dict[str, tuple[int, Sequence[Sequence[float]], Sequence[float]]] = {
    "euler": (1, ((),), (1.0,)),
    "midpoint": (2, ((), (0.5,)), (0.0, 1.0)),
    "rk4": (4, ((), (0.5,), (0.0, 0.5), (0.0, 0.0, 1.0)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
}
Field = Callable[[torch.Tensor], torch.Tensor]


# ------------------------------------------------------------------------------------- the fields


def epidemic(y: torch.Tensor) -> torch.Tensor:
    """The truth f, for rows (S, I)."""
    infections = BETA * y[..., 0] * y[..., 1]
    return torch.stack([-infections, infections - GAMMA * y[..., 1]], dim=-1)


class Polynomial(torch.nn.Module):
    """All monomials of S and I up to a degree, in Legendre polynomials of [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        pairs = [(i, j) for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)]
        self.index = torch.tensor(pairs).T
        self.weights = torch.nn.Parameter(torch.zeros(len(pairs), 2, dtype=torch.float64))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = 2 * y - 1
        values = [torch.ones_like(z), z]
        for n in range(1, DEGREE):
            values.append(((2 * n + 1) * z * values[n] - n * values[n - 1]) / (n + 1))
        table = torch.stack(values, dim=-1)  # (..., 2, degree + 1)
        return (table[..., 0, self.index[0]] * table[..., 1, self.index[1]]) @ self.weights


class Net(torch.nn.Module):
    """A network of S and I."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.net = mlp(2, WIDTH, WIDTH, 2, generator=generator)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(2 * y - 1)
        return result


# ------------------------------------------------------------------------------- the modified field


def step(method: str, field: Field, y: torch.Tensor, h: torch.Tensor | float) -> torch.Tensor:
    """Take one step."""
    _, rows, weights = TABLEAUS[method]
    slopes: list[torch.Tensor] = []
    for row in rows:
        stage = y
        for a, slope in zip(row, slopes, strict=True):
            stage = stage + h * a * slope
        slopes.append(field(stage))
    for weight, slope in zip(weights, slopes, strict=True):
        y = y + h * weight * slope
    return y


def along(function: Field, direction: Field) -> Field:
    """Return the derivative of a function along a field."""

    def derivative(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.func.jvp(function, (x,), (direction(x),))[1]
        return result

    return derivative


def correction(method: str, y: torch.Tensor) -> torch.Tensor:
    """Return f_p at rows of states."""
    times = TABLEAUS[method][0] + 1
    exact: Field = lambda y: y  # noqa: E731
    for _ in range(times):  # d/dh of a function of the exact solution is its derivative along f
        exact = along(exact, epidemic)
    numerical: Field = lambda h: step(method, epidemic, y, h)  # noqa: E731
    for _ in range(times):
        numerical = along(numerical, torch.ones_like)
    zero = torch.zeros((), dtype=torch.float64)
    return (exact(y) - numerical(zero)) / math.factorial(times)


def states() -> torch.Tensor:
    """Return a grid of states."""
    side = torch.linspace(0.05, 0.95, SIDE, dtype=torch.float64)
    return torch.cartesian_prod(side, 0.8 * side)


def exact_steps(h: float) -> torch.Tensor:
    """Return where the exact solution from all states is after h."""
    solver = pnode.Solver(lambda t, y: epidemic(y), method="dopri8", rtol=1e-13, atol=1e-15)
    return solver(states(), times(h)).ys[1]


def times(h: float) -> torch.Tensor:
    """Return the two times of a step."""
    return torch.tensor([0.0, h], dtype=torch.float64)


def norm(values: torch.Tensor) -> float:
    """Root mean square."""
    return values.square().mean().sqrt().item()


# --------------------------------------------------------------------------------------- learning


def learn_polynomial(method: str, h: float) -> Polynomial:
    """Fit a polynomial so that steps of the method are the exact ones."""
    model, target = Polynomial(), exact_steps(h)
    solver = pnode.Solver(model, method=method, step_size=h, compile=False)
    fit(solver, ["weights"], states(), times(h), lambda ys: (ys[1] - target).reshape(-1) / h)
    return model


def learn_net(options: argparse.Namespace) -> Net:
    """Train a network with Euler's method."""
    model, target = Net(torch.Generator().manual_seed(options.seed)), exact_steps(NET_STEP)
    solver = pnode.Solver(model, method="euler", step_size=NET_STEP)

    def loss() -> torch.Tensor:
        return ((solver(states(), times(NET_STEP)).ys[1] - target) / NET_STEP).square().mean()

    train(model, loss, options, label="net")
    polish(model, loss, options, 4 * options.iterations)
    return model


def follow(model: torch.nn.Module, method: str, **keywords: Any) -> torch.Tensor:
    """Return the epidemic that a model predicts from 1 % infected."""
    start = torch.tensor([0.9, 0.05], dtype=torch.float64)
    grid = torch.arange(0.0, 6.01, NET_STEP, dtype=torch.float64)
    with torch.no_grad():
        return pnode.Solver(model, method=method, compile=False, **keywords)(start, grid).ys


def gradients(model: Net, quick: bool) -> list[dict[str, Any]]:
    """Measure the gradient of one midpoint step's loss beside torchdiffeq's and the formula's."""
    target, zero = exact_steps(NET_STEP), torch.zeros((), dtype=torch.float64)
    end = step("midpoint", lambda y: model(zero, y), states(), NET_STEP)
    parameters = list(model.parameters())
    return compare_gradients(
        model, lambda solve: (solve(states(), times(NET_STEP))[1] - target).square().sum(),
        parameters, method="midpoint", step_size=NET_STEP,
        exact=torch.autograd.grad((end - target).square().sum(), parameters), quick=quick,
    )  # fmt: skip


def run(options: argparse.Namespace) -> Outcome:
    """Measure the slopes, and train the network."""
    grid, zero = states(), torch.zeros((), dtype=torch.float64)
    truth = epidemic(grid)
    distances: dict[str, dict[str, list[float]]] = {}
    rows: list[dict[str, Any]] = []
    slopes: dict[str, list[float]] = {}
    for method, (order, _, _) in TABLEAUS.items():
        modified = correction(method, grid)
        found: dict[str, list[float]] = {"f": [], "modified": []}
        for h in STEPS:
            with torch.no_grad():
                learned = learn_polynomial(method, h)(zero, grid)
            found["f"].append(norm(learned - truth))
            found["modified"].append(norm(learned - truth - h**order * modified))
        distances[method] = found
        slopes[method] = [
            float(np.polyfit(np.log(STEPS[-2:]), np.log(found[name][-2:]), 1)[0]) for name in found
        ]
        rows.append({
            "what": f"polynomial by {method}, h = {STEPS[2]:g}",
            "to f": found["f"][2], "slope": slopes[method][0],
            "to modified field": found["modified"][2], "its slope": slopes[method][1],
        })  # fmt: skip
    model = learn_net(options)
    with torch.no_grad():
        learned = model(zero, grid)
    to_truth = norm(learned - truth)
    to_modified = norm(learned - truth - NET_STEP * correction("euler", grid))
    rows.append(
        {
            "what": f"net by euler, h = {NET_STEP:g}",
            "to f": to_truth,
            "to modified field": to_modified,
        }
    )
    accurate = {"rtol": 1e-10, "atol": 1e-12}
    exact = follow(Truth(), "dopri5", **accurate)
    paths = {
        "steps as in training": follow(model, "euler", step_size=NET_STEP),
        "solved accurately": follow(model, "dopri5", **accurate),
    }
    errors = {name: norm(path - exact) for name, path in paths.items()}
    rows += [{"what": f"net by euler, {name}", "error": value} for name, value in errors.items()]
    rows += gradients(model, options.quick)
    numbers = {
        "slopes": slopes, "distances": distances, "steps": STEPS, "net_to_f": to_truth,
        "net_to_modified": to_modified, "path_errors": errors,
    }  # fmt: skip
    return Outcome(numbers, rows, lambda: draw(distances, slopes, exact, paths))


class Truth(torch.nn.Module):
    """f as a Module."""

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return epidemic(y)


def draw(
    distances: dict[str, dict[str, list[float]]], slopes: dict[str, list[float]],
    exact: torch.Tensor, paths: dict[str, torch.Tensor],
) -> Any:  # fmt: skip
    """Draw the distances against h, and what the net predicts."""
    title = "A field learned through a method is that method's modified field"
    drawn, axes = figure(1, 2, title, figsize=(10, 4.4))
    axis = axes[0, 0]
    for color, (method, found) in zip(("C0", "C2", "C3"), distances.items(), strict=True):
        for name, style, slope in zip(found, ("o-", "s--"), slopes[method], strict=True):
            order = TABLEAUS[method][0]
            to = "f" if name == "f" else f"f + h^{order} f_{order}".replace("h^1", "h")
            axis.loglog(STEPS, found[name], style, color=color, ms=4, lw=1.2,
                        label=f"{method}, to {to}: slope {slope:.2f}")  # fmt: skip
    axis.set(title="distance of what was learned", xlabel="step h of the training",
             ylabel="root mean square of the fields' difference")  # fmt: skip
    axis.legend(fontsize=7)
    axis = axes[0, 1]
    clock = NET_STEP * np.arange(len(exact))
    axis.plot(clock, exact[:, 1], color="0.75", lw=5, label="truth")
    for (name, path), style in zip(paths.items(), ("C3-", "C0--"), strict=True):
        axis.plot(clock, path[:, 1], style, lw=1.5, label=f"network, {name}")
    axis.set(title=f"network learned with Euler steps of {NET_STEP:g}", xlabel="time (1 / gamma)",
             ylabel="share infected")  # fmt: skip
    axis.legend(fontsize=8)
    return drawn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    return arguments("modified_equation", __doc__, argv, iterations=200, quick={"iterations": 40})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

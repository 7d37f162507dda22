"""A double pendulum from little data, with what physics says beside them.

Two unit masses on two unit rods, without friction; angles a = (a1, a2) and their rates w::

    a' = w,    w' = g(a, w),
    E(a, w) = w1^2 + w2^2 / 2 + w1 w2 cos(a1 - a2) - G (2 cos a1 + cos a2)

F. Djeumou, C. Neary, E. Goubault, S. Putot & U. Topcu, "Neural networks with physics-informed
architectures and constraints for dynamical systems modeling" (2022) give a network side
information, as structure where the equations have it, and as constraints at points without data.
Three fields learn from the same eight noisy paths of 0.8 s, 17 states each:

* *plain net*: the network is all of the field, in sines, cosines and rates;
* *structure*: a' = w is known, the network is the acceleration;
* *conservation*: so, and E is the same at all steps of 32 further paths, of which nothing is
  measured. The constraints c = E(y_n) - E(y_0) enter through an augmented Lagrangian,
  the loss plus the means of l c + m c^2 / 2 over all steps, whose multipliers l become l + m c
  after each of four rounds.

The solver is rk4 with an output at each step, so that the values at steps and their gradients are
those of ``ys``. Errors are of 32 other paths of 3 s.

Run it::

    python examples/side_information.py

Measured with pnode 0.2.0 and torchdiffeq 0.2.5 on 2026-11-30, seed 0, one thread (36 s of CPU):

============  ==============  ==============  =================  ==========
what          rad off at 1 s  rad off at 3 s  energy off at 1 s  off at 3 s
============  ==============  ==============  =================  ==========
plain net     0.321           0.574           0.518              0.620
structure     0.179           0.630           0.208              1.478
conservation  0.185           0.655           0.222              0.863
============  ==============  ==============  =================  ==========

One gradient of the loss of *structure* by dopri5, rtol = 1e-6, CPU time and memory relative to
pnode's 54 ms and 2.0 MiB:

==========================  ======  ===  ====  ====
gradient by                 error   f    CPU   MiB
==========================  ======  ===  ====  ====
pnode, not compiled         1.8e-8  105  1     1
pnode, dense=True           3.3e-7  76   1.05
pnode, compiled             1.8e-8  105  0.11
torchdiffeq odeint          7.7e-7  62   0.82  0.78
torchdiffeq odeint_adjoint  4.7e-7  286  4.3   0.30
==========================  ======  ===  ====  ====

(Without ``dense=True`` pnode steps to each of the 16 outputs; torchdiffeq interpolates there.)

The structure halves the errors at 1 s. What did not work: the conservation law, kept to 5 % along
the unseen paths, adds nothing at 1 s, and takes two fifths off the error of the energy at 3 s,
where all angles are far off. In a training of a few seconds (``--quick``) it takes a third off at 1
s too.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from gallery_common import TRUTH, Outcome, arguments, figure, launch, mlp, train
from gallery_physics import compare_gradients

import pnode

GRAVITY, STEP = 9.81, 0.05
PATHS, SEEN, UNSEEN, LENGTH, TESTED = (
    8,
    16,
    32,
    20,
    60,
)  # paths and steps with data, without, of tests
NOISE, ROUNDS, PENALTY, WIDTH = 0.005, 4, 10.0, 32
COLORS = {"plain net": "C1", "structure": "C0", "conservation": "C3"}


def accelerations(state: torch.Tensor) -> torch.Tensor:
    """The truth, w'."""
    a, b, u, v = state.unbind(-1)
    sine, cosine = torch.sin(a - b), torch.cos(a - b)
    below = 2.0 + 2.0 * sine**2  # 3 - cos(2 (a - b))
    first = -3 * GRAVITY * torch.sin(a) - GRAVITY * torch.sin(a - 2 * b)
    first = first - 2 * sine * (v**2 + u**2 * cosine)
    second = 2 * sine * (2 * u**2 + 2 * GRAVITY * torch.cos(a) + v**2 * cosine)
    return torch.stack([first / below, second / below], dim=-1)


def energy(state: torch.Tensor) -> torch.Tensor:
    """E over G, and 0 at rest."""
    a, b, u, v = state.unbind(-1)
    kinetic = u**2 + v**2 / 2 + u * v * torch.cos(a - b)
    return kinetic / GRAVITY + 3.0 - 2 * torch.cos(a) - torch.cos(b)


class Truth(torch.nn.Module):
    """The double pendulum."""

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        return torch.cat([state[..., 2:], accelerations(state)], dim=-1)


class Field(torch.nn.Module):
    """A network: of the whole field, or of the accelerations."""

    def __init__(self, seed: int, structure: bool) -> None:
        super().__init__()
        self.structure = structure
        generator = torch.Generator().manual_seed(seed)
        self.net = mlp(6, WIDTH, WIDTH, 2 if structure else 4, generator=generator)

    def forward(self, t: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        angles, rates = state[..., :2], state[..., 2:]
        inputs = torch.cat([torch.sin(angles), torch.cos(angles), rates / 3.0], dim=-1)
        result: torch.Tensor = 10.0 * self.net(inputs)
        return torch.cat([rates, result], dim=-1) if self.structure else result


def make_solver(field: torch.nn.Module) -> pnode.Solver:
    """Return the solver of the training: rk4, an output at each step."""
    return pnode.Solver(field, method="rk4", step_size=STEP)


def times(steps: int) -> torch.Tensor:
    """Return the times of so many steps."""
    return STEP * torch.arange(steps + 1, dtype=torch.float64)


def starts(number: int, generator: torch.Generator) -> torch.Tensor:
    """Return random angles within 1 radian, and rates within 1 per second."""
    return 2 * torch.rand(number, 4, generator=generator, dtype=torch.float64) - 1


def solve_truth(start: torch.Tensor, steps: int) -> torch.Tensor:
    """Return the true paths: (steps + 1, paths, 4)."""
    return pnode.Solver(Truth(), rtol=1e-9, atol=1e-11)(start, times(steps)).ys


def data_loss(ys: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """Mean squared error; rates count a tenth."""
    scale = torch.tensor([1.0, 1.0, 3.0, 3.0], dtype=torch.float64)
    return ((ys - observed) / scale).square().mean()


def learn(
    field: Field, observed: torch.Tensor, options: argparse.Namespace, label: str
) -> list[float]:
    """Train a field on the data alone."""
    solver = make_solver(field)
    loss = lambda: data_loss(solver(observed[0], times(SEEN)).ys, observed)  # noqa: E731
    return train(field, loss, options, rate=1e-2, label=label, clip=1.0).losses


class Lagrangian:
    """The data's loss, and the conservation law along paths without data."""

    def __init__(self, field: Field, observed: torch.Tensor, unseen: torch.Tensor) -> None:
        self.solver, self.observed, self.unseen = make_solver(field), observed, unseen
        self.multipliers = torch.zeros(LENGTH, len(unseen), dtype=torch.float64)
        self.violations: list[float] = []

    def constraints(self) -> torch.Tensor:
        """Return E(y_n) - E(y_0) at all steps."""
        levels = energy(self.solver(self.unseen, times(LENGTH)).ys)
        return levels[1:] - levels[0]

    def loss(self) -> torch.Tensor:
        """Return the augmented Lagrangian."""
        c = self.constraints()
        data = data_loss(self.solver(self.observed[0], times(SEEN)).ys, self.observed)
        return data + (self.multipliers * c).mean() + PENALTY * c.square().mean() / 2

    def update(self) -> None:
        """Move the multipliers."""
        with torch.no_grad():
            c = self.constraints()
        self.multipliers = self.multipliers + PENALTY * c
        self.violations.append(c.square().mean().sqrt().item())


def learn_constrained(
    field: Field, lagrangian: Lagrangian, options: argparse.Namespace
) -> list[float]:
    """Train with the conservation law, in rounds; as many updates as without."""
    losses: list[float] = []
    for number in range(ROUNDS):
        rate = 1e-2 / (1 + number)
        losses += train(
            field, lagrangian.loss, options, iterations=options.iterations // ROUNDS, rate=rate,
            label=f"conservation-{number + 1}", clip=1.0, constant=number < ROUNDS - 1,
        ).losses  # fmt: skip
        lagrangian.update()
    return losses


def run(options: argparse.Namespace) -> Outcome:
    """Train the three fields and compare them."""
    generator = torch.Generator().manual_seed(options.seed)
    clean = solve_truth(starts(PATHS, generator), SEEN)
    observed = clean + NOISE * torch.randn(clean.shape, generator=generator, dtype=torch.float64)
    unseen, tested = starts(UNSEEN, generator), starts(UNSEEN, generator)
    fields = {name: Field(options.seed, name != "plain net") for name in COLORS}
    lagrangian = Lagrangian(fields["conservation"], observed, unseen)
    gradients = compare_gradients(
        fields["structure"],
        lambda solve: data_loss(solve(observed[0], times(SEEN)), observed),
        list(fields["structure"].parameters()), method="dopri5", quick=options.quick,
    )  # fmt: skip
    losses = {name: learn(fields[name], observed, options, name.split()[0])
              for name in ("plain net", "structure")}  # fmt: skip
    losses["conservation"] = learn_constrained(fields["conservation"], lagrangian, options)
    truth = solve_truth(tested, TESTED)
    paths, errors, drifts, rows = {}, {}, {}, list[dict[str, Any]]()
    for name, field in fields.items():
        with torch.no_grad():
            paths[name] = pnode.Solver(field, method="rk4", step_size=STEP)(
                tested, times(TESTED)
            ).ys
        off = (paths[name] - truth)[..., :2]
        errors[name] = off.square().mean((1, 2)).sqrt()
        levels = energy(paths[name])
        drifts[name] = ((levels - levels[0]) / levels[0]).square().mean(1).sqrt()
        rows.append({
            "what": name, "rad off at 1 s": errors[name][20].item(),
            "rad off at 3 s": errors[name][60].item(), "energy off at 1 s": drifts[name][20].item(),
            "off at 3 s": drifts[name][60].item(), "loss": losses[name][-1],
        })  # fmt: skip
    rows += gradients
    numbers = {
        "errors_1s": {name: values[20].item() for name, values in errors.items()},
        "errors_3s": {name: values[60].item() for name, values in errors.items()},
        "energy_1s": {name: values[20].item() for name, values in drifts.items()},
        "energy_3s": {name: values[60].item() for name, values in drifts.items()},
        "violations": lagrangian.violations,
    }  # fmt: skip
    return Outcome(numbers, rows, lambda: draw(truth, paths, errors, drifts))


def draw(
    truth: torch.Tensor, paths: dict[str, torch.Tensor], errors: dict[str, torch.Tensor],
    drifts: dict[str, torch.Tensor],
) -> Any:  # fmt: skip
    """Draw one path, errors, and energies."""
    title = (
        f"A double pendulum learned from {PATHS} paths of {SEEN * STEP:g} s, and side information"
    )
    drawn, axes = figure(1, 3, title, figsize=(13.5, 4.2))
    clock, shown = times(TESTED), int(truth[0, :, :2].square().sum(1).argmax())
    axis = axes[0, 0]
    axis.plot(clock, truth[:, shown, 1], **TRUTH)
    for name, states in paths.items():
        axis.plot(clock, states[:, shown, 1], color=COLORS[name], lw=1.4, label=name)
    low, high = float(truth[:, shown, 1].min()), float(truth[:, shown, 1].max())
    axis.set(title="the test path that starts highest", xlabel="time (s)",
             ylabel="angle of the lower rod (rad)", ylim=(2 * low, 2 * high))  # fmt: skip
    axis.legend(fontsize=8)
    for axis, values, text, unit in (
        (axes[0, 1], errors, "error of both angles", "root mean square (rad)"),
        (axes[0, 2], drifts, "energy gained or lost", "root mean square, relative"),
    ):
        for name, line in values.items():
            axis.semilogy(clock[1:], line[1:], color=COLORS[name], label=name)
        axis.axvline(SEEN * STEP, color="0.4", lw=0.8)
        axis.set(title=f"{text}, {UNSEEN} test paths", xlabel="time (s); line: as long as the data",
                 ylabel=unit)  # fmt: skip
        axis.legend(fontsize=8)
    return drawn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    return arguments("side_information", __doc__, argv, iterations=200, quick={"iterations": 60})


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

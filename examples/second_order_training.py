"""Second-order training: Gauss-Newton products and Kronecker factors of a solve.

A network f is to be the field of a spiral, y' = A y^3 (the example of Chen et al., NeurIPS 2018),
from states at 10 times on each of 32 paths. The loss is a sum of squares of residuals r, so its
curvature is about that of Gauss and Newton, G = 2 J^T J with the Jacobian J = dr/dp. Two ways
to use it, J never being formed:

1. *Gauss-Newton.* ``torch.func.linearize`` of the solve has the products J v, from the stages that
   were stored, and their transposes J^T u, the adjoint sweep. Conjugate gradients solve
   (G + damping) d = -gradient with up to 20 of them.
2. *Kronecker factors*, the second-order optimizer for neural ODEs of G.-H. Liu, T. Chen &
   E. Theodorou (SNOpt, NeurIPS 2021). For a layer with inputs z and cotangents a of its outputs,

   ::

       G = (integral of z z^T dt) x (integral of a a^T dt), nearly,

   two small matrices. ``solution.stages`` has both integrands at the stages of a backward sweep,
   for cotangents that are random signs, of which the mean is G.

Both end with the best step, by the quadratic model, in the plane of theirs and the last one: two
products J v, by ``torch.func.vmap`` of ``jvp``.

Both adapt their damping as Levenberg and Marquardt do: it falls while the quadratic model foretells
the loss, and rises, the step being undone, where it does not.

Run it (a minute and a half of CPU time on one core)::

    python examples/second_order_training.py

Measured with pnode 0.2.0 and torchdiffeq 0.2.5 on 2026-11-30, seed 0, one thread, networks of 722
parameters (80 s of CPU in all):

=================  ==========  =========  =====  ==================  ===========
optimizer          iterations  best loss  CPU s  iterations to 1e-3  CPU s to it
=================  ==========  =========  =====  ==================  ===========
Gauss-Newton       40          3.6e-5     39.9   12                  12.0
Kronecker factors  100         1.8e-5     9.4    32                  3.0
L-BFGS             500         1.8e-6     10.1   90                  1.8
Adam, rate 1e-2    1000        1.7e-4     16.6   349                 5.8
=================  ==========  =========  =====  ==================  ===========

The stages' gradient equals that of ``backward()``, and G v that of the whole Jacobian, to 6e-16.
One gradient at the start by dopri5, rtol = 1e-6, CPU time and memory relative to pnode's 28 ms and
1.1 MiB:

==========================  =======  ===  ====  ====
gradient by                 error    f    CPU   MiB
==========================  =======  ===  ====  ====
pnode, not compiled         2.3e-10  69   1     1
pnode, dense=True           4.1e-7   27   0.63  0.36
pnode, compiled             2.3e-10  69   0.18  0.79
torchdiffeq odeint          1.0e-6   26   0.52  0.38
torchdiffeq odeint_adjoint  1.6e-7   166  4.0   0.41
==========================  =======  ===  ====  ====

(Without ``dense=True`` pnode steps to each of the ten outputs; torchdiffeq interpolates there.)

What did not work: to beat L-BFGS, which has as many paths and as little noise as it could wish for:
it needs 60 % of the Kronecker factors' time and a seventh of Gauss-Newton's, whose iterations are
few and cost up to twenty of the others. Per unit of time the Kronecker factors beat Adam twice.
Without the plane of two directions they need half as many iterations again.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from gallery_common import (
    DATA,
    LEARNED,
    TRUTH,
    Outcome,
    Training,
    arguments,
    at_least,
    figure,
    launch,
    mlp,
    train,
)
from gallery_physics import BUNDLE, compare_gradients
from torch.func import functional_call, jvp, linearize
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import pnode

DOUBLE = torch.float64
SPIRAL = torch.tensor([[-0.1, 2.0], [-2.0, -0.1]], dtype=DOUBLE)
END, OBSERVED, PATHS, STEP = 1.0, 10, 32, 0.1
TARGET = 1e-3  # a loss to be reached
PRODUCTS = 20  # of conjugate gradients, at most
RATE = 1e-2  # of Adam
KEPT = 0.9  # of the Kronecker factors, from iteration to iteration


class Field(torch.nn.Module):
    """f(y), for states (B, 2)."""

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.net = mlp(2, width, width, 2, generator=generator)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.net(y)
        return result


class Problem:
    """Paths, a field to be learned from them, and what can be asked of its loss."""

    def __init__(self, width: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.times = torch.linspace(0.0, END, OBSERVED + 1, dtype=DOUBLE)
        self.starts = 1.2 * (2.0 * torch.rand(PATHS, 2, generator=generator, dtype=DOUBLE) - 1.0)
        exact = pnode.Solver(spiral, method="dopri8", rtol=1e-10, atol=1e-12, compile=False)
        with torch.no_grad():
            self.data = exact(self.starts, self.times).ys
        self.field = Field(width, generator)
        self.solver = pnode.Solver(self.field, method="rk4", step_size=STEP, compile=False)
        self.count = self.data[1:].numel()

    def residuals(self, ys: torch.Tensor) -> torch.Tensor:
        """Return r, whose sum of squares is the loss."""
        return (ys - self.data)[1:] / math.sqrt(self.count)

    def loss(self) -> torch.Tensor:
        return self.residuals(self.solver(self.starts, self.times).ys).square().sum()

    def of_vector(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], torch.Tensor]:
        """Return r as a function of all parameters in one vector, and that vector."""
        named = dict(self.field.named_parameters())
        sizes = [parameter.numel() for parameter in named.values()]

        def residuals(flat: torch.Tensor) -> torch.Tensor:
            parts = zip(named, named.values(), flat.split(sizes), strict=True)
            chosen = {f"rhs.{name}": part.view_as(p) for name, p, part in parts}
            solution = functional_call(self.solver, chosen, (self.starts, self.times))
            return self.residuals(solution.ys)

        return residuals, parameters_to_vector(named.values()).detach()

    def products(self, vectors: list[torch.Tensor]) -> torch.Tensor:
        """Return J v for each of some vectors, as rows."""
        residuals, flat = self.of_vector()
        several = torch.func.vmap(lambda v: jvp(residuals, (flat,), (v,))[1])
        result: torch.Tensor = several(torch.stack(vectors)).flatten(1)
        return result

    def curvature(self) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function v -> G v = 2 J^T J v."""
        linear = linearize(*self.of_vector())[1]

        def product(v: torch.Tensor) -> torch.Tensor:
            v = v.detach().requires_grad_()
            with torch.enable_grad():
                forward = linear(v)
            return 2.0 * torch.autograd.grad(forward, v, forward.detach())[0]

        return product

    def layers(self, cotangents: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Return A, B and the gradient of each linear layer, its bias being the last column."""
        linears = [part for part in self.field.net if isinstance(part, torch.nn.Linear)]
        sizes = [(linear.in_features + 1, linear.out_features) for linear in linears]
        sums = [
            tuple(torch.zeros(shape, dtype=DOUBLE) for shape in ((i, i), (o, o), (o, i)))
            for i, o in sizes
        ]

        def add(stage: pnode.Stage) -> None:
            inputs, outputs, value = [], [], stage.state
            with torch.enable_grad():
                for part in self.field.net:
                    if isinstance(part, torch.nn.Linear):
                        inputs.append(torch.nn.functional.pad(value, (0, 1), value=1.0).detach())
                    value = part(value)
                    if isinstance(part, torch.nn.Linear):
                        outputs.append(value)
            adjoints = torch.autograd.grad(value, outputs, stage.adjoint)
            for (a, b, gradient), z, adjoint in zip(sums, inputs, adjoints, strict=True):
                a += stage.weight / PATHS * z.T @ z
                b += adjoint.T @ adjoint / stage.weight
                gradient += adjoint.T @ z

        self.solver(self.starts, self.times).stages(cotangents, add)
        return sums


def spiral(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The field that is to be learned."""
    return y**3 @ SPIRAL


# ---------------------------------------------------------------------------------- optimizers


class Damped(torch.optim.Optimizer):
    """Steps by a quadratic model, damped as by Levenberg and Marquardt."""

    def __init__(self, parameters: Iterable[torch.Tensor], problem: Problem) -> None:
        super().__init__(parameters, {"damping": 1e-2})
        self.problem = problem

    def direction(self, gradient: torch.Tensor, damping: float) -> torch.Tensor:
        """Return a step."""
        raise NotImplementedError

    def step(self, closure: Callable[[], float]) -> float:  # type: ignore[override]
        value = closure()
        group = self.param_groups[0]
        parameters: list[torch.Tensor] = group["params"]
        gradient = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
        damping: float = group["damping"]
        step = self.direction(gradient, damping)
        last = self.state[parameters[0]].get("last")
        plane = [step / step.norm(), *([] if last is None else [last / last.norm()])]
        rows, table = self.problem.products(plane), torch.stack(plane)
        bend = 2.0 * rows @ rows.T + damping * table @ table.T
        slopes = table @ gradient
        lengths = -torch.linalg.lstsq(bend, slopes[:, None]).solution[:, 0]
        foretold = (0.5 * lengths @ slopes).item()
        before = parameters_to_vector(parameters).detach()
        step = lengths @ table
        vector_to_parameters(before + step, parameters)
        with torch.no_grad():
            ratio = (self.problem.loss().item() - value) / foretold
        if ratio > 0.0:
            self.state[parameters[0]]["last"] = step
        else:  # NaN too
            vector_to_parameters(before, parameters)
        if not ratio > 0.25:
            group["damping"] = 4.0 * damping
        elif ratio > 0.75:
            group["damping"] = max(damping / 3.0, 1e-12)
        return value


class GaussNewton(Damped):
    """The damped system solved by conjugate gradients."""

    def direction(self, gradient: torch.Tensor, damping: float) -> torch.Tensor:
        product = self.problem.curvature()
        step, rest = torch.zeros_like(gradient), -gradient
        along, size = rest, rest @ rest
        end = 1e-4 * size
        for _ in range(PRODUCTS):
            turned = product(along) + damping * along
            length = size / (along @ turned)
            step = step + length * along
            rest = rest - length * turned
            size, old = rest @ rest, size
            if size < end:
                break
            along = rest + size / old * along
        return step


class Kronecker(Damped):
    """The gradient divided by the Kronecker factors of each layer, which are running means."""

    def __init__(
        self, parameters: Iterable[torch.Tensor], problem: Problem, generator: torch.Generator
    ) -> None:
        super().__init__(parameters, problem)
        self.generator = generator

    def direction(self, gradient: torch.Tensor, damping: float) -> torch.Tensor:
        shape = self.problem.data.shape
        signs = 2.0 * torch.randint(2, shape, generator=self.generator) - 1.0
        signs[0] = 0.0
        cotangents = signs.to(DOUBLE) * math.sqrt(2.0 / self.problem.count)
        found = [[a, b] for a, b, _ in self.problem.layers(cotangents)]
        state = self.state[self.param_groups[0]["params"][0]]
        for old, new in zip(state.get("factors", []), found, strict=False):
            for one, other in zip(old, new, strict=True):
                other.mul_(1.0 - KEPT).add_(one, alpha=KEPT)
        state["factors"] = found
        steps = []
        rest = gradient
        for a, b in found:
            inputs, outputs = len(a) - 1, len(b)
            weight, bias, rest = rest.split(
                [inputs * outputs, outputs, len(rest) - (inputs + 1) * outputs]
            )
            table = torch.cat([weight.view(outputs, inputs), bias[:, None]], dim=1)
            share = (a.trace() / len(a) / (b.trace() / len(b))).sqrt().item()
            root = math.sqrt(damping)
            left = b + root / share * torch.eye(len(b), dtype=DOUBLE)
            right = a + root * share * torch.eye(len(a), dtype=DOUBLE)
            divided = torch.linalg.solve(right, torch.linalg.solve(left, table).T).T
            steps += [divided[:, :-1].reshape(-1), divided[:, -1]]
        return -torch.cat(steps)


def optimizers(
    problem: Problem, generator: torch.Generator
) -> dict[str, tuple[Callable[..., Any], int, int]]:
    """Return how each is made, how many of Adam's iterations take its place, and how long it is."""

    def lbfgs(tensors: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(
            tensors, max_iter=BUNDLE, history_size=50, line_search_fn="strong_wolfe"
        )

    return {
        "Gauss-Newton": (lambda tensors: GaussNewton(tensors, problem), 25, 1),
        "Kronecker factors": (lambda tensors: Kronecker(tensors, problem, generator), 10, 1),
        "L-BFGS": (lbfgs, 2 * BUNDLE, BUNDLE),
        "Adam": (lambda tensors: torch.optim.Adam(tensors, lr=RATE), 1, 1),
    }


# ----------------------------------------------------------------------------------- the program


def checks(problem: Problem, generator: torch.Generator) -> dict[str, float]:
    """Compare stages' gradients with backward's, and G v with that of the whole Jacobian."""
    parameters = dict(problem.field.named_parameters())
    ys = problem.solver(problem.starts, problem.times).ys
    cotangents = torch.randn(ys.shape, generator=generator, dtype=DOUBLE)
    parts = torch.autograd.grad(ys, list(parameters.values()), cotangents)
    expected = torch.cat([part.reshape(-1) for part in parts])
    tables = [table for _, _, table in problem.layers(cotangents)]
    found = torch.cat([torch.cat([table[:, :-1].reshape(-1), table[:, -1]]) for table in tables])
    jacobian = pnode.sensitivities(
        problem.solver, problem.starts, problem.times, wrt=tuple(parameters), mode="forward"
    )
    rows = torch.cat([jacobian[name].reshape(ys.numel(), -1) for name in parameters], dim=1)
    v = torch.randn(rows.shape[1], generator=generator, dtype=DOUBLE)
    by_rows = 2.0 / problem.count * rows[ys[0].numel() :].T @ (rows[ys[0].numel() :] @ v)
    product = problem.curvature()(v)
    return {
        "stages_off_by": ((found - expected).norm() / expected.norm()).item(),
        "product_off_by": ((product - by_rows).norm() / by_rows.norm()).item(),
    }


def row(name: str, training: Training, bundle: int) -> dict[str, Any]:
    """Return what a training took until the loss was reached, and where it ended."""
    reached = next((i for i, loss in enumerate(training.losses) if loss < TARGET), None)
    each = training.cpu_seconds / len(training.losses)
    first = None if reached is None else bundle * reached
    return {
        "what": name, "iterations": bundle * len(training.losses), "CPU s": training.cpu_seconds,
        "best loss": min(training.losses), f"iterations to {TARGET:g}": first,
        "CPU s to it": None if reached is None else each * reached,
    }  # fmt: skip


def run(options: argparse.Namespace) -> Outcome:
    """Train by each."""
    problem = Problem(options.width, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    numbers: dict[str, Any] = checks(problem, generator)
    gradients = compare_gradients(
        problem.field,
        lambda solve: problem.residuals(solve(problem.starts, problem.times)).square().sum(),
        list(problem.field.parameters()), method="dopri5", quick=options.quick,
    )  # fmt: skip
    first = {name: value.clone() for name, value in problem.field.state_dict().items()}
    trainings: dict[str, Training] = {}
    rows = []
    for name, (make, share, bundle) in optimizers(problem, generator).items():
        problem.field.load_state_dict(first)
        trainings[name] = train(
            problem.field, problem.loss, options, optimizer=make, rate=RATE,
            iterations=max(options.iterations // share, 4), constant=name != "Adam",
            label=name.replace(" ", "-"), generator=generator,
        )  # fmt: skip
        rows.append(row(name, trainings[name], bundle))
        if name == "Gauss-Newton":
            with torch.no_grad():
                learned = problem.solver(problem.starts, problem.times).ys
    numbers["losses"] = {name: training.losses for name, training in trainings.items()}
    return Outcome(numbers, rows + gradients, lambda: draw(problem, learned, trainings))


def draw(problem: Problem, learned: torch.Tensor, trainings: dict[str, Training]) -> Any:
    """Draw some paths, and losses against iterations and CPU time."""
    drawn, axes = figure(1, 3, "Second-order training of a neural ODE")
    plane, *others = axes[0]
    exact = pnode.Solver(spiral, method="dopri8", rtol=1e-10, atol=1e-12, compile=False)
    with torch.no_grad():
        truth = exact(problem.starts, torch.linspace(0.0, END, 61, dtype=DOUBLE)).ys
    for index in range(0, PATHS, 3):
        once = {"label": None} if index else {}
        plane.plot(*truth[:, index].T, **{**TRUTH, **once})
        plane.plot(*problem.data[:, index].T, **{**DATA, **once})
        plane.plot(*learned[:, index].T, **{**LEARNED, **once})
    plane.set(title="paths, learned by Gauss-Newton", xlabel="$y_1$", ylabel="$y_2$")
    plane.legend(fontsize=7)
    for name, training in trainings.items():
        number, bundle = len(training.losses), BUNDLE if name == "L-BFGS" else 1
        seconds = [training.cpu_seconds * i / number for i in range(number)]
        others[0].loglog([1 + bundle * i for i in range(number)], training.losses, label=name)
        others[1].semilogy(seconds, training.losses, label=name)
    for axis, label in zip(others, ("iteration", "CPU time (s)"), strict=True):
        axis.axhline(TARGET, color="0.5", ls=":", lw=1.0)
        axis.set(title="loss", xlabel=label, ylabel="mean squared error")
        axis.legend(fontsize=7)
    return drawn


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""

    def add(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--width", type=at_least(int, 1), default=24,
                            help="of hidden layers (24)")  # fmt: skip

    quick = {"iterations": 100, "width": 6}
    return arguments("second_order_training", __doc__, argv, iterations=1000, quick=quick, add=add)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

"""Gradients of Robertson's kinetics, alone and with a network: the stiff workloads of ``peers.py``.

The value is A(40). Alone, it is differentiated with respect to the three rates; its reference is in
``stiff_problems.py``. With a network there is a fourth reaction, A -> C, whose rate is the slow
one's times the softplus of a tanh network of the concentrations, and the gradient is taken with
respect to the network's weights too. Its reference is computed when the benchmark runs, by the
tightest solves of pnode and of diffrax, which must agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from peer_flows import OTHERWISE, Outcome, Task, joined, variant
from stiff_problems import SENSITIVITIES
from stiff_solvers import MAX_STEPS, SolveFailed, Unavailable, diffrax_solve

__all__ = ["STIFF", "STIFF_SOLVERS", "Kinetics", "create_stiff_task", "gradient_error", "reference"]

SENSITIVITY = SENSITIVITIES["ROBER A(40)"]
PROBLEM = SENSITIVITY.problem
METHODS = ("bdf", "rodaspr", "es325", "esdirk6")
PEERS = ("Kvaerno3", "Kvaerno5")
#: Solvers by name: variants of pnode with each method, and diffrax's.
STIFF_SOLVERS: tuple[str, ...] = (
    *(f"{name} {method}" for name in OTHERWISE for method in METHODS),
    *(f"diffrax {peer}" for peer in PEERS),
)
TIGHT = {"pnode esdirk6": 1e-10, "diffrax Kvaerno5": 1e-10}
AGREEMENT = 1e-7


@dataclass(frozen=True)
class Kinetics:
    """Robertson's kinetics, with a network of ``width`` neurons if that is not zero."""

    width: int

    def weights(self) -> list[np.ndarray]:
        """Return the network's weights: W_1, b_1, W_2, b_2."""
        if not self.width:
            return []
        generator = np.random.default_rng(0)
        shapes = ((self.width, 3), (self.width,), (1, self.width), (1,))
        bounds = (3**-0.5, 3**-0.5, self.width**-0.5, self.width**-0.5)
        return [generator.uniform(-b, b, shape) for b, shape in zip(bounds, shapes, strict=True)]


STIFF = {"Robertson, 3 rates": Kinetics(0), "Robertson with a network": Kinetics(50)}
SCALES = (1.0, 1e4, 1.0)  # B stays below 4e-5


def _torch_field(kinetics: Kinetics) -> tuple[Any, list[torch.Tensor]]:
    """Return f(t, y) and the rates and weights it depends on."""
    rates = torch.tensor(PROBLEM.parameters, dtype=torch.float64, requires_grad=True)
    weights = [torch.tensor(weight, requires_grad=True) for weight in kinetics.weights()]
    if not weights:
        return lambda t, y: torch.stack(PROBLEM.field(y.unbind(), rates.unbind())), [rates]
    w1, b1, w2, b2 = weights
    scales = torch.tensor(SCALES, dtype=torch.float64)
    linear = torch.nn.functional.linear

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b, c = PROBLEM.field(y.unbind(), rates.unbind())
        learned = linear(torch.tanh(linear(scales * y, w1, b1)), w2, b2)
        flow = rates[0] * y[0] * torch.nn.functional.softplus(learned[0])
        return torch.stack([a - flow, b, c + flow])

    return field, [rates, *weights]


def _pnode(kinetics: Kinetics, name: str, method: str, rtol: float) -> Task:
    field, parameters = _torch_field(kinetics)
    solver = variant(
        name, field, params=parameters, method=method, rtol=rtol,
        atol=PROBLEM.ratio * rtol, max_steps=MAX_STEPS,
    )  # fmt: skip
    y0 = torch.tensor(PROBLEM.start, dtype=torch.float64)
    times = torch.tensor([0.0, PROBLEM.end], dtype=torch.float64)

    def run() -> Any:
        solution = solver(y0, times)
        value = solution.ys[-1, SENSITIVITY.component]
        return value, torch.autograd.grad(value, parameters), solution.stats

    def read(raw: Any) -> Outcome:
        value, gradients, stats = raw
        return Outcome(value.item(), joined(gradients), stats.steps, stats.rejected)

    return Task(run, read)


def _diffrax(kinetics: Kinetics, peer: str, rtol: float) -> Task:
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    start, scales = jnp.array(PROBLEM.start), jnp.array(SCALES)
    parameters = (jnp.array(PROBLEM.parameters), *map(jnp.array, kinetics.weights()))

    def field(y: Any, p: Any) -> Any:
        rates, *weights = p
        slope = PROBLEM.field(tuple(y), rates)
        if not weights:
            return jnp.stack(slope)
        w1, b1, w2, b2 = weights
        learned = w2 @ jnp.tanh(w1 @ (scales * y) + b1) + b2
        flow = rates[0] * y[0] * jax.nn.softplus(learned[0])
        return jnp.stack([slope[0] - flow, slope[1], slope[2] + flow])

    def solve(p: Any, limit: int) -> Any:
        return diffrax_solve(
            field, start, p, PROBLEM.end, rtol, PROBLEM.ratio * rtol,
            solver=getattr(diffrax, peer)(), max_steps=limit,
            adjoint=diffrax.RecursiveCheckpointAdjoint(checkpoints=limit),
        )  # fmt: skip

    # As many steps, all of them stored, as it will take.
    solved = jax.jit(solve, static_argnums=1)(parameters, MAX_STEPS)
    if solved.result != diffrax.RESULTS.successful:
        raise SolveFailed(diffrax.RESULTS[solved.result])
    limit = int(solved.stats["num_steps"])

    def value(p: Any) -> Any:
        solved = solve(p, limit)
        return solved.ys[-1, SENSITIVITY.component], (solved.stats, solved.result)

    program = jax.jit(jax.value_and_grad(value, has_aux=True))

    def run() -> Any:
        return jax.block_until_ready(program(parameters))

    def read(raw: Any) -> Outcome:
        (result, (stats, reason)), gradients = raw
        if reason != diffrax.RESULTS.successful:
            raise SolveFailed(diffrax.RESULTS[reason])
        steps = (int(stats[f"num_{kind}_steps"]) for kind in ("accepted", "rejected"))
        return Outcome(float(result), joined(gradients), *steps)

    return Task(run, read)


def create_stiff_task(name: str, kinetics: Kinetics, rtol: float) -> Task:
    """Return the task of one of :data:`STIFF_SOLVERS`.

    Raises
    ------
    Unavailable
        If it is not installed or does not exist.
    """
    family, method = name.rsplit(" ", 1)
    if family == "diffrax":
        if find_spec("diffrax") is None:
            raise Unavailable("diffrax is not installed")
        return _diffrax(kinetics, method, rtol)
    return _pnode(kinetics, family, method, rtol)


def gradient_error(gradient: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest relative error of a rate's derivative, or that of the weights' in norm."""
    rates, weights = np.split(gradient - exact, [3])
    error = float(np.abs(rates / exact[:3]).max())
    if not weights.size:
        return error
    return max(error, float(np.linalg.norm(weights) / np.linalg.norm(exact[3:])))


def reference(kinetics: Kinetics, say: Callable[[str], Any]) -> np.ndarray:
    """Return the reference gradient.

    Raises
    ------
    SolveFailed
        If the two that should agree do not.
    """
    if not kinetics.width:
        return np.array(SENSITIVITY.gradient)
    found = {}
    for name, rtol in TIGHT.items():
        try:
            task = create_stiff_task(name, kinetics, rtol)
        except Unavailable:
            continue
        assert task.read is not None
        found[name] = task.read(task.run()).gradient
    exact, *others = found.values()
    for other in others:
        error = gradient_error(exact, other)
        say(f"reference: {' and '.join(found)} differ by {error:.1e}")
        if not error < AGREEMENT:
            raise SolveFailed(f"references differ by {error:.1e}")
    return exact

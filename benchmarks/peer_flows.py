"""Gradients of explicit solves: the workloads of ``peers.py``, and what runs them.

A flow is y' = f(y) on [0, 1] with dopri5, in fixed steps or adaptively; the value is the sum of the
squares of y(1), the gradient is taken with respect to y(0) and all weights. Everybody gets the same
numbers to start from.

How the peers are brought to the same fixed steps: torchdiffeq's dopri5 is told to hit each grid
point (``step_t``) and given tolerances that never refuse a step; the last step of torchode, which
adds up its step, is cut. diffrax stores every step: ``RecursiveCheckpointAdjoint`` gets as many
checkpoints as there are steps. torchode has step sizes for each sample of a batch: adaptively it
solves another problem than the others, and its steps are those of the sample with most of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from stiff_solvers import SolveFailed, Unavailable

import pnode

__all__ = [
    "FLOWS",
    "OTHERWISE",
    "PNODE",
    "VARIANTS",
    "Flow",
    "Outcome",
    "Task",
    "create_flow_task",
    "variant",
]

#: Keywords of Solver that make pnode's variants.
PNODE: dict[str, Callable[[], dict[str, Any]]] = {
    "pnode": lambda: {"compile": False},
    "pnode compiled": lambda: {"compile": True},
    "pnode stages": lambda: {
        "checkpointing": pnode.Checkpointing(store="stages"),
        "compile": False,
    },
}
#: Those that differ from one another where f is not evaluated by an explicit method.
OTHERWISE = tuple(name for name in PNODE if name != "pnode stages")
NEVER = 1e12  # a tolerance that no error exceeds


@dataclass(frozen=True)
class Flow:
    """y' = W_2 tanh(W_1 y), by matrices or by 3 x 3 convolutions, with biases.

    Attributes
    ----------
    shape : tuple of int
        Shape of y: (batch, size), or (batch, channels, height, width).
    width : int
        Neurons or channels in between.
    steps : int
        Number of fixed steps.
    rtol : float
        Relative and a hundred times the absolute tolerance of adaptive steps.
    """

    shape: tuple[int, ...]
    width: int
    steps: int
    rtol: float

    @property
    def convolutional(self) -> bool:
        """Whether the state consists of images."""
        return len(self.shape) == 4

    def numbers(self) -> tuple[np.ndarray, list[np.ndarray]]:
        """Return y(0) and the weights, uniform as in torch's layers."""
        generator = np.random.default_rng(0)
        size, kernel = self.shape[1], (3, 3) if self.convolutional else ()
        weights = []
        for inputs, outputs in ((size, self.width), (self.width, size)):
            bound = (inputs * max(1, 3 * len(kernel))) ** -0.5
            weights.append(generator.uniform(-bound, bound, (outputs, inputs, *kernel)))
            weights.append(generator.uniform(-bound, bound, outputs))
        return generator.standard_normal(self.shape), weights


FLOWS = {
    "2-50-2": Flow((20, 2), 50, 40, 1e-8),
    "64-256-64": Flow((256, 64), 256, 20, 1e-7),
    "512-1024-512": Flow((256, 512), 1024, 5, 1e-4),
    "conv 64x8x8": Flow((64, 64, 8, 8), 64, 5, 1e-4),
}


@dataclass
class Outcome:
    """What a task returned, and the steps it took; ``None`` where it does not say."""

    value: float
    gradient: np.ndarray
    accepted: int | None = None
    rejected: int | None = None


@dataclass
class Task:
    """Something to be timed.

    Attributes
    ----------
    run : callable
        Takes the value and the gradient and does nothing else.
    read : callable, optional
        Turns what ``run`` returned into an :class:`Outcome`.
    discrete : bool
        Whether the gradient is that of the numbers it computes, and so the same for all with the
        same steps. Adjoint equations that are solved backwards give another one.
    """

    run: Callable[[], Any]
    read: Callable[[Any], Outcome] | None = None
    discrete: bool = True


def joined(arrays: Iterable[Any]) -> np.ndarray:
    """Return the entries of all arrays as one."""
    return np.concatenate([np.asarray(array).ravel() for array in arrays])


def variant(name: str, *arguments: Any, **keywords: Any) -> pnode.Solver:
    """Return the solver of a variant of pnode.

    Raises
    ------
    Unavailable
        If this pnode has no such variant.
    """
    try:
        return pnode.Solver(*arguments, **keywords, **PNODE[name]())
    except (pnode.ConfigurationError, NotImplementedError) as error:
        raise Unavailable(str(error)) from error


class TorchFlow(torch.nn.Module):
    """The vector field in torch."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        start, weights = flow.numbers()
        self.flow = flow
        self.start = torch.tensor(start).requires_grad_()
        w1, b1, w2, b2 = (torch.nn.Parameter(torch.tensor(weight)) for weight in weights)
        self.w1, self.b1, self.w2, self.b2 = w1, b1, w2, b2
        self.convolutional = flow.convolutional

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """dy/dt."""
        if self.convolutional:
            hidden = torch.tanh(torch.nn.functional.conv2d(y, self.w1, self.b1, padding=1))
            return torch.nn.functional.conv2d(hidden, self.w2, self.b2, padding=1)
        hidden = torch.tanh(torch.nn.functional.linear(y, self.w1, self.b1))
        return torch.nn.functional.linear(hidden, self.w2, self.b2)


def _torch_task(net: TorchFlow, solve: Callable[[], tuple[Any, Any]], steps: Any) -> Task:
    """Differentiate ``solve()``, which returns y(1) and what ``steps`` finds the steps in."""
    inputs = (net.start, *net.parameters())

    def run() -> Any:
        end, record = solve()
        value = end.square().sum()
        return value, torch.autograd.grad(value, inputs), record

    def read(raw: Any) -> Outcome:
        value, gradients, record = raw
        return Outcome(value.item(), joined(g.detach() for g in gradients), *steps(record))

    return Task(run, read)


def _pnode(flow: Flow, adaptive: bool, name: str) -> Task:
    net = TorchFlow(flow)
    solver = variant(
        name, net, method="dopri5", rtol=flow.rtol, atol=1e-2 * flow.rtol,
        step_size=None if adaptive else 1.0 / flow.steps,
    )  # fmt: skip
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)

    def solve() -> tuple[Any, Any]:
        solution = solver(net.start, times)
        return solution.ys[-1], solution.stats

    return _torch_task(net, solve, lambda stats: (stats.steps, stats.rejected))


def _torchdiffeq(flow: Flow, adaptive: bool, adjoint: bool) -> Task:
    import torchdiffeq

    net = TorchFlow(flow)
    times = torch.tensor([0.0, 1.0], dtype=torch.float64)
    steps = [0, 0]

    def accept(*_: Any) -> None:
        steps[0] += 1

    def reject(*_: Any) -> None:
        steps[1] += 1

    net.callback_accept_step, net.callback_reject_step = accept, reject
    if adaptive:
        keywords: dict[str, Any] = {"rtol": flow.rtol, "atol": 1e-2 * flow.rtol}
        if adjoint:
            keywords["adjoint_params"] = tuple(net.parameters())
    else:
        # The step grows by a half after each and is cut to the next grid point.
        grid = torch.arange(flow.steps + 1, dtype=torch.float64) / flow.steps
        options = {
            "first_step": 1.5 / flow.steps, "ifactor": 1.5, "safety": 10.0, "step_t": grid,
        }  # fmt: skip
        keywords = {"rtol": NEVER, "atol": NEVER, "options": options}
        if adjoint:
            keywords["adjoint_options"] = options
    odeint = torchdiffeq.odeint_adjoint if adjoint else torchdiffeq.odeint

    def solve() -> tuple[Any, Any]:
        steps[:] = 0, 0
        return odeint(net, net.start, times, method="dopri5", **keywords)[-1], tuple(steps)

    task = _torch_task(net, solve, lambda record: record)
    task.discrete = not adjoint
    return task


def _torchode(flow: Flow, adaptive: bool) -> Task:
    import torchode

    net = TorchFlow(flow)
    batch = flow.shape[0]
    zero, one = torch.zeros(batch, dtype=torch.float64), torch.ones(batch, dtype=torch.float64)
    term = torchode.ODETerm(lambda t, y: net(t, y.view(flow.shape)).flatten(1), with_stats=False)
    # The sum of the steps must not end just before 1.
    first = None if adaptive else one * ((1.0 + 1e-13) / flow.steps)
    controller: Any = torchode.FixedStepController()
    if adaptive:
        controller = torchode.IntegralController(1e-2 * flow.rtol, flow.rtol, term=term)
    adjoint = torchode.AutoDiffAdjoint(
        torchode.Dopri5(term), controller, backprop_through_step_size_control=False
    )

    def solve() -> tuple[Any, Any]:
        problem = torchode.InitialValueProblem(net.start.flatten(1), zero, one)
        solution = adjoint.solve(problem, dt0=first)
        if bool(solution.status.any()):
            raise SolveFailed(f"torchode: status {solution.status.max().item()}")
        return solution.ys[:, -1], solution.stats

    def steps(stats: Any) -> tuple[int, int]:
        accepted, taken = stats["n_accepted"], stats["n_steps"]
        return int(accepted.max()), int((taken - accepted).max())

    return _torch_task(net, solve, steps)


def _bare(flow: Flow, adaptive: bool, tape: bool) -> Task:
    """6 N + 1 evaluations and 6 N VJPs; with ``tape`` these use the graphs of the evaluations."""
    if adaptive:
        raise Unavailable("the number of steps is everybody's own choice")
    net = TorchFlow(flow)
    start = net.start.detach()
    inputs, cotangent = tuple(net.parameters()), torch.ones_like(start)
    time = torch.zeros((), dtype=torch.float64)

    def linearise() -> tuple[Any, Any]:
        u = start.clone().requires_grad_()
        return u, net(time, u)

    def run() -> None:
        with torch.no_grad():
            for _ in range(6 * flow.steps + 1):
                net(time, start)
        for _ in range(6 * flow.steps):
            u, slope = linearise()
            torch.autograd.grad(slope, (u, *inputs), cotangent)

    def run_with_tape() -> None:
        graphs = [linearise() for _ in range(6 * flow.steps)]
        while graphs:
            u, slope = graphs.pop()
            torch.autograd.grad(slope, (u, *inputs), cotangent)

    return Task(run_with_tape if tape else run)


def jax_field(flow: Flow) -> Callable[[Any, Any, Any], Any]:
    """Return the vector field in JAX.

    Convolutions are products of matrices: within a compiled loop XLA's own convolution of float64
    takes ten times as long on a CPU.
    """
    import jax.numpy as jnp

    def convolution(images: Any, weight: Any, bias: Any) -> Any:
        """Of images whose channels come last."""
        *_, height, width, channels = images.shape
        padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        matrix = weight.transpose(2, 3, 1, 0).reshape(9 * channels, -1)
        return jnp.concatenate(patches, -1) @ matrix + bias

    def slope(t: Any, y: Any, weights: Any) -> Any:
        w1, b1, w2, b2 = weights
        if flow.convolutional:
            hidden = jnp.tanh(convolution(y.transpose(0, 2, 3, 1), w1, b1))
            return convolution(hidden, w2, b2).transpose(0, 3, 1, 2)
        return jnp.tanh(y @ w1.T + b1) @ w2.T + b2

    return slope


def _diffrax(flow: Flow, adaptive: bool, backsolve: bool) -> Task:
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    start, weights = flow.numbers()
    y0, weights = jnp.array(start), tuple(map(jnp.array, weights))
    term = diffrax.ODETerm(jax_field(flow))
    controller: Any = diffrax.ConstantStepSize()
    if adaptive:
        controller = diffrax.PIDController(rtol=flow.rtol, atol=1e-2 * flow.rtol)

    def solve(y0: Any, weights: Any, limit: int) -> Any:
        adjoint: Any = diffrax.RecursiveCheckpointAdjoint(checkpoints=limit)
        if backsolve:
            adjoint = diffrax.BacksolveAdjoint()
        return diffrax.diffeqsolve(
            term, diffrax.Dopri5(), 0.0, 1.0, None if adaptive else 1.0 / flow.steps, y0, weights,
            saveat=diffrax.SaveAt(t1=True), stepsize_controller=controller, adjoint=adjoint,
            max_steps=limit,
        )  # fmt: skip

    limit = flow.steps
    if adaptive:  # as many as it will take
        limit = int(jax.jit(solve, static_argnums=2)(y0, weights, 4096).stats["num_steps"])
    # Backwards the steps are others, and not stored.
    limit = 4096 if backsolve else limit

    def value(y0: Any, weights: Any) -> Any:
        solved = solve(y0, weights, limit)
        return jnp.square(solved.ys[-1]).sum(), solved.stats

    program = jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))

    def run() -> Any:
        return jax.block_until_ready(program(y0, weights))

    def read(raw: Any) -> Outcome:
        (result, stats), (by_start, by_weights) = raw
        steps = (int(stats[f"num_{kind}_steps"]) for kind in ("accepted", "rejected"))
        return Outcome(float(result), joined((by_start, *by_weights)), *steps)

    return Task(run, read, discrete=not backsolve)


@dataclass(frozen=True)
class Variant:
    """How one solver makes a task of a flow, and the package it needs."""

    package: str
    create: Callable[..., Task]
    arguments: tuple[Any, ...] = field(default=())


VARIANTS = {
    **{name: Variant("pnode", _pnode, (name,)) for name in PNODE},
    "torchdiffeq backprop": Variant("torchdiffeq", _torchdiffeq, (False,)),
    "torchdiffeq adjoint": Variant("torchdiffeq", _torchdiffeq, (True,)),
    "torchode": Variant("torchode", _torchode),
    "diffrax": Variant("diffrax", _diffrax, (False,)),
    "diffrax backsolve": Variant("diffrax", _diffrax, (True,)),
    "bare torch": Variant("torch", _bare, (False,)),
    "bare torch, tape": Variant("torch", _bare, (True,)),
}


def create_flow_task(name: str, flow: Flow, adaptive: bool) -> Task:
    """Return the task of one of :data:`VARIANTS`.

    Raises
    ------
    Unavailable
        If it is not installed or cannot run the flow.
    """
    chosen = VARIANTS[name]
    if find_spec(chosen.package) is None:
        raise Unavailable(f"{chosen.package} is not installed")
    return chosen.create(flow, adaptive, *chosen.arguments)

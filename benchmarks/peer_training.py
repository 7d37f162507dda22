"""One training iteration of ``examples/robertson.py``: pnode, and the same program in JAX.

Both do the same: Crank-Nicolson steps from observation to observation, Newton's method from the
last state until the step is below 1e-10 of the state or the residual below 1e-11 of the first, the
mean absolute error, its gradient by one transposed solve a step, clipping, AdamW. The learning rate
is so small that the weights stay where they are.

The JAX program is one compiled function: ``lax.scan`` over the intervals, ``lax.while_loop`` for
Newton's method, implicit differentiation by ``custom_vjp``.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peer_flows import OTHERWISE, PNODE, Outcome, Task, joined, variant
from stiff_solvers import Unavailable

__all__ = ["TRAINING", "create_training_task"]

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
RATE = 1e-15
DECAY = 0.01
BETAS = (0.9, 0.999)
EPSILON = 1e-8
TRAINING = (*OTHERWISE, "JAX program")


def _example() -> tuple[Any, Any, Any]:
    """Return the example's module, its observations and its network."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    import robertson

    observations = robertson.robertson_observations()
    network = robertson.Kinetics(observations.rates, observations.scaled[1:].mean(0), seed=0)
    return robertson, observations, network


def _pnode(name: str) -> Task:
    robertson, observations, network = _example()
    longest = float(observations.times.diff().max())
    solver = variant(name, network, method="cn", step_size=2.0 * longest, jacobian="dense")
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=RATE, betas=BETAS, eps=EPSILON, weight_decay=DECAY
    )
    result = robertson.Result(method="cn")

    def run() -> float:
        network.zero_grad()
        loss = robertson.scaled_mae(solver, observations, result)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), robertson.CLIP)
        optimizer.step()
        return float(loss)

    def read(value: float) -> Outcome:
        gradient = joined(parameter.grad for parameter in network.parameters())
        return Outcome(value, gradient, len(observations.times) - 1, 0)

    return Task(run, read)


def _jax(clip: float) -> Task:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    _, observations, network = _example()
    # In the order of network.parameters(): the output layer comes first.
    weights = [jnp.array(parameter.detach().numpy()) for parameter in network.parameters()]
    rates, data = jnp.array(observations.rates.numpy()), jnp.array(observations.scaled.numpy())
    steps = jnp.diff(jnp.array(observations.times.numpy()))
    identity = jnp.eye(data.shape[1])

    def field(p: Any, y: Any) -> Any:
        w, b, *hidden = p
        for weight, bias in zip(hidden[::2], hidden[1::2], strict=True):
            y = jax.nn.gelu(weight @ y + bias, approximate=False)
        return rates * (w @ y + b)

    def newton(p: Any, h: Any, y: Any) -> Any:
        constant = y + 0.5 * h * field(p, y)

        def residual(x: Any) -> Any:
            return x - 0.5 * h * field(p, x) - constant

        first = residual(y)
        enough = 1e-11 * jnp.linalg.norm(first)

        def going(state: Any) -> Any:
            x, f, dx, iteration = state
            return (
                (jnp.linalg.norm(f) > enough)
                & (jnp.linalg.norm(dx) > 1e-10 * jnp.linalg.norm(x))
                & (iteration < 50)
            )

        def iterate(state: Any) -> Any:
            x, f, _, iteration = state
            dx = jnp.linalg.solve(jax.jacfwd(residual)(x), f)
            x = x - dx
            return x, residual(x), dx, iteration + 1

        return jax.lax.while_loop(going, iterate, (y, first, jnp.full_like(y, jnp.inf), 0))[0]

    @jax.custom_vjp
    def step(p: Any, h: Any, y: Any) -> Any:
        return newton(p, h, y)

    def step_forward(p: Any, h: Any, y: Any) -> Any:
        x = newton(p, h, y)
        return x, (p, h, y, x)

    def step_backward(saved: Any, cotangent: Any) -> Any:
        p, h, y, x = saved
        matrix = identity - 0.5 * h * jax.jacfwd(field, 1)(p, x)
        adjoint = jnp.linalg.solve(matrix.T, cotangent)
        (by_weights,) = jax.vjp(lambda p: field(p, x), p)[1](0.5 * h * adjoint)
        more, by_start = jax.vjp(field, p, y)[1](0.5 * h * adjoint)
        return jax.tree.map(jnp.add, by_weights, more), jnp.zeros_like(h), adjoint + by_start

    step.defvjp(step_forward, step_backward)

    def loss(p: Any) -> Any:
        def advance(y: Any, h: Any) -> Any:
            y = step(p, h, y)
            return y, y

        _, ys = jax.lax.scan(advance, data[0], steps)
        return jnp.abs(ys - data[1:]).mean()

    @jax.jit
    def iterate(p: Any, m: Any, v: Any, count: Any) -> Any:
        value, gradient = jax.value_and_grad(loss)(p)
        norm = jnp.sqrt(sum(jnp.square(g).sum() for g in gradient))
        gradient = [g * jnp.minimum(1.0, clip / (norm + 1e-6)) for g in gradient]
        m = [BETAS[0] * a + (1.0 - BETAS[0]) * g for a, g in zip(m, gradient, strict=True)]
        v = [BETAS[1] * a + (1.0 - BETAS[1]) * g**2 for a, g in zip(v, gradient, strict=True)]
        m_scale, v_scale = (1.0 - beta**count for beta in BETAS)
        p = [
            w * (1.0 - RATE * DECAY) - RATE * (a / m_scale) / (jnp.sqrt(b / v_scale) + EPSILON)
            for w, a, b in zip(p, m, v, strict=True)
        ]
        return p, m, v, count + 1.0, value, gradient

    zeros = [jnp.zeros_like(weight) for weight in weights]
    state: list[Any] = [weights, zeros, zeros, 1.0]

    def run() -> Any:
        *state[:], value, gradient = jax.block_until_ready(iterate(*state))
        return float(value), gradient

    def read(raw: Any) -> Outcome:
        value, gradient = raw
        return Outcome(value, joined(gradient), len(steps), 0)

    return Task(run, read)


def create_training_task(name: str) -> Task:
    """Return the task of one of :data:`TRAINING`.

    Raises
    ------
    Unavailable
        If it is not installed or does not exist.
    """
    if name in PNODE:
        return _pnode(name)
    if find_spec("jax") is None:
        raise Unavailable("jax is not installed")
    return _jax(_example()[0].CLIP)

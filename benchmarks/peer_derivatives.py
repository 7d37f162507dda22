"""Second derivatives and sensitivities by others, for ``derivatives.py``: diffrax, SciPy, CVODE.

diffrax takes the same classical RK4 steps, compiled, ``jax.jvp`` and a Hessian product by
``jax.jvp`` of ``jax.grad``. It compiles first, and that is not in its time. SciPy's BDF and CVODE
solve the state with its sensitivities, written by hand, as one system.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

import pnode

D = torch.float64


def diffrax_calls(
    f: torch.nn.Module, y0: torch.Tensor, v: Sequence[torch.Tensor], steps: int
) -> dict[str, Callable[[], Any]] | None:
    """Return a tangent by y0 and a Hessian product of the sum of squares at t = 1.

    ``f`` is a network of two layers minus half of y, as in ``derivatives.py``; v is the direction,
    of y0 and its parameters.
    """
    if find_spec("diffrax") is None:
        return None
    import diffrax
    import jax

    jax.config.update("jax_enable_x64", True)
    jnp = jax.numpy

    class RK4(diffrax.AbstractERK):
        tableau = diffrax.ButcherTableau(
            c=np.array([0.5, 0.5, 1.0]),
            a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
            b_sol=np.array([1, 2, 2, 1]) / 6.0, b_error=np.zeros(4),
        )  # fmt: skip
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms: Any) -> int:
            return 4

    def field(t: Any, y: Any, p: Any) -> Any:
        return jnp.tanh(y @ p[0].T + p[1]) @ p[2].T + p[3] - 0.5 * y

    def end(y: Any, p: Any, adjoint: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(field), RK4(), 0.0, 1.0, 1.0 / steps, y, p,
            stepsize_controller=diffrax.ConstantStepSize(), max_steps=steps, adjoint=adjoint,
        ).ys[-1]  # fmt: skip

    y, *p = (jnp.asarray(one.detach().numpy()) for one in (y0, *f.parameters()))
    vy, *vp = (jnp.asarray(one.numpy()) for one in v)

    def ahead(y: Any) -> Any:
        return end(y, p, diffrax.ForwardMode())

    def loss(both: Any) -> Any:
        return (end(*both, diffrax.DirectAdjoint()) ** 2).sum()

    tangent = jax.jit(lambda y, v: jax.jvp(ahead, (y,), (v,))[1])
    product = jax.jit(lambda both, v: jax.jvp(jax.grad(loss), (both,), (v,))[1])
    return {
        "jvp": lambda: jax.block_until_ready(tangent(y, vy)),
        "Hessian product": lambda: jax.block_until_ready(product((y, p), (vy, vp))),
    }


def stiff_sensitivities(
    ratio: Callable[..., float], repeats: int
) -> Iterator[tuple[str, float, float, float]]:
    """Yield Robertson's kinetics against others: name, ratio, and both errors.

    All states at three times by the three rates, at equal tolerances; errors are relative, beside
    pnode at 1e-11.
    """
    times = np.array([0.0, 0.4, 4.0, 40.0])
    k, start = np.array([0.04, 3e7, 1e4]), np.array([1.0, 0.0, 0.0])
    t, y0 = torch.from_numpy(times), torch.from_numpy(start)

    class Robertson(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logs = torch.nn.Parameter(torch.from_numpy(k).log())

        def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            k1, k2, k3 = self.logs.exp()
            a, b, c = y
            r1, r2, r3 = k1 * a, k2 * b * b, k3 * b * c
            return torch.stack([r3 - r1, r1 - r2 - r3, r2])

    net = np.array([[-1.0, 0.0, 1.0], [1.0, -1.0, -1.0], [0.0, 1.0, 0.0]])

    def pair(t: float, x: np.ndarray) -> np.ndarray:
        (a, b, c), S = x[:3], x[3:].reshape(3, 3)
        rates = k * np.array([a, b * b, b * c])
        J = k[:, None] * np.array([[1.0, 0.0, 0.0], [0.0, 2.0 * b, 0.0], [0.0, c, b]])
        return np.concatenate([net @ rates, (net @ (J @ S + np.diag(rates))).ravel()])

    def solver_of(tolerance: float, method: str = "bdf", compile: bool = False) -> pnode.Solver:
        return pnode.Solver(
            Robertson(), method=method, rtol=tolerance, atol=1e-4 * tolerance, compile=compile
        )

    def ours(solver: pnode.Solver) -> np.ndarray:
        found = pnode.sensitivities(solver, y0, t, wrt=["logs"], mode="forward")
        return found["logs"].numpy()

    x0, rtol = np.concatenate([start, np.zeros(9)]), 1e-6

    def scipy() -> np.ndarray:
        from scipy.integrate import solve_ivp

        options = {"method": "BDF", "rtol": rtol, "atol": 1e-4 * rtol}
        return solve_ivp(pair, (0.0, 40.0), x0, t_eval=times, **options).y[3:].T.reshape(-1, 3, 3)

    def cvode() -> np.ndarray:
        from sksundae.cvode import CVODE

        def right(t: float, x: np.ndarray, rate: np.ndarray) -> None:
            rate[:] = pair(t, x)

        solver = CVODE(right, rtol=rtol, atol=1e-4 * rtol, max_num_steps=100_000)
        return solver.solve(times, x0).y[:, 3:].reshape(-1, 3, 3)

    exact = ours(solver_of(1e-11, "radau5"))

    def error(found: np.ndarray) -> float:
        return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))

    solvers = {"": solver_of(rtol), ", compiled": solver_of(rtol, compile=True)}
    for name, package, call in (("SciPy", "scipy", scipy), ("CVODE", "sksundae", cvode)):
        if find_spec(package) is None:
            continue
        for how, solver in solvers.items():
            value = ratio(lambda solver=solver: ours(solver), call, repeats)
            yield name + how, value, error(ours(solver)), error(call())

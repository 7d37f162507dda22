"""How exact derivatives are: each family of methods by each kind of derivative, in one table.

``python benchmarks/derivative_errors.py [--quick]``. Fixed steps, float64. Relative errors:

jvp    a tangent of the outputs, by y0 and parameters, against central differences of fourth order
vjp    a backward sweep against that tangent: <w, J v> and <J^T w, v>, no differences in it
hvp    a Hessian product against such differences of the gradient
sym    <u, H v> against <v, H u>, no differences in it
cost   the gradient of a cost integral against such differences

and whether torch's ``gradcheck`` (forward mode too) and ``gradgradcheck`` pass; ``--quick`` leaves
these out. Differences leave 1e-12 to 1e-11; of implicit methods also what Newton's method leaves,
over the step of the difference.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch.autograd import grad
from torch.func import functional_call, jvp

import pnode

D = torch.float64
T = torch.tensor([0.0, 0.2, 0.5], dtype=D)
#: One method of each family.
METHODS = {
    "explicit Runge-Kutta": "rk4",
    "explicit, FSAL": "dopri5",
    "strong stability": "ssprk43",
    "symplectic": "forest_ruth",
    "theta": "cn",
    "DIRK": "es325",
    "Rosenbrock": "rodaspr",
    "IMEX": "ark3",
    "BDF": "bdf2",
    "Radau": "radau5",
    "Gauss": "gauss4",
}
#: Newton's method goes on until nothing is left.
EXACT = {"snes_rtol": 1e-14, "snes_atol": 1e-15, "snes_stol": 1e-15}

Tensors = Sequence[torch.Tensor]


class Field(torch.nn.Module):
    """Depends on time, state and parameters; separable if y is a pair."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(0.7 * torch.randn(3, 3, dtype=D))
        self.bias = torch.nn.Parameter(torch.randn(3, dtype=D))

    def forward(self, t: torch.Tensor, y: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
        if isinstance(y, tuple):
            q, p = y
            return torch.tanh(self.weight @ p + t), -torch.sin(q * self.bias)
        return torch.tanh(self.weight @ y + self.bias) * torch.cos(t) - 0.5 * y


class Damping(torch.nn.Module):
    """The explicit part of a split field."""

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -0.3 * torch.sin(y) * t


def problem(method: str) -> tuple[Callable[..., tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """Return a solve as a function, whose results are outputs and perhaps integrals, and where."""
    symplectic, field = method == "forest_ruth", Field()
    options: dict[str, object] = {"method": method, "step_size": 0.05, "compile": False}
    if not symplectic:
        options["cost"] = lambda t, y: (y.square() * t.exp() + y * y.roll(1)).sum()
    if method not in ("rk4", "dopri5", "ssprk43", "forest_ruth", "rodaspr"):
        options["petsc_options"] = EXACT
    if method == "ark3":
        solver = pnode.Solver(implicit=field, explicit=Damping(), **options)
    else:
        solver = pnode.Solver(field, **options)
    keys = [next(k for k, one in solver.named_parameters() if one is p) for p in field.parameters()]

    def solve(y0: torch.Tensor, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        start = tuple(y0.split(3)) if symplectic else y0
        solution = functional_call(solver, dict(zip(keys, parameters, strict=True)), (start, T))
        if symplectic:
            return (torch.cat(solution.ys, 1),)
        return solution.ys, solution.costs

    y0 = torch.linspace(-1.0, 0.8, 6 if symplectic else 3, dtype=D)
    return solve, [y0, *(p.detach() for p in field.parameters())]


def differences(
    function: Callable[..., torch.Tensor], at: Tensors, v: Tensors, step: float = 1e-3
) -> torch.Tensor:
    """Return the derivative along v by central differences of fourth order."""

    def moved(by: float) -> torch.Tensor:
        return function(*(x + by * d for x, d in zip(at, v, strict=True))).detach()

    near, far = moved(step) - moved(-step), moved(2.0 * step) - moved(-2.0 * step)
    return (8.0 * near - far) / (12.0 * step)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative difference."""
    return float((found - expected).norm() / expected.norm())


def dot(one: Tensors, other: Tensors) -> torch.Tensor:
    """Return the sum of products."""
    return torch.stack([(a * b).sum() for a, b in zip(one, other, strict=True)]).sum()


def leaves(given: Tensors) -> list[torch.Tensor]:
    """Return copies that require grad."""
    return [one.clone().requires_grad_() for one in given]


def errors(method: str) -> dict[str, float]:
    """Return the errors of a method."""
    solve, at = problem(method)
    generator = torch.Generator().manual_seed(3)
    u, v = ([torch.randn(x.shape, generator=generator, dtype=D) for x in at] for _ in range(2))

    def outputs(*given: torch.Tensor) -> torch.Tensor:
        return torch.cat([one.flatten() for one in solve(*given)])

    def gradient(*given: torch.Tensor, of: int = 0) -> torch.Tensor:
        inputs = leaves(given)
        loss = solve(*inputs)[of][-1].pow(3).sum()
        return torch.cat([one.flatten() for one in grad(loss, inputs)])

    def product(w: Tensors) -> Tensors:
        inputs = leaves(at)
        first = grad(solve(*inputs)[0][-1].pow(3).sum(), inputs, create_graph=True)
        return grad(dot(first, w), inputs)

    _, tangent = jvp(outputs, tuple(at), tuple(v))
    found = {"jvp": error(tangent, differences(outputs, at, v))}
    inputs, seed = leaves(at), torch.cos(torch.arange(len(tangent), dtype=D))
    ahead, back = dot([seed], [tangent]), dot(grad(outputs(*inputs), inputs, seed), v)
    found["vjp"] = float((ahead - back).abs() / ahead.abs())
    along, other = product(v), product(u)
    flat = torch.cat([one.flatten() for one in along])
    found["hvp"] = error(flat, differences(gradient, at, v))
    found["sym"] = float((dot(u, along) - dot(v, other)).abs() / dot(u, along).abs())
    if len(solve(*at)) > 1:
        slope = differences(lambda *given: solve(*given)[1][-1].pow(3).reshape(1), at, v)
        parts = torch.cat([one.flatten() for one in v])
        found["cost"] = error((gradient(*at, of=1) * parts).sum().reshape(1), slope)
    return found


def passes(method: str) -> str:
    """Return what torch's own checks say."""
    solve, at = problem(method)
    inputs = tuple(leaves(at))
    # Repeated sweeps of some methods differ by what Newton's method leaves.
    loose = {"nondet_tol": 1e-9}
    checks = (
        lambda: torch.autograd.gradcheck(solve, inputs, check_forward_ad=True, **loose),
        lambda: torch.autograd.gradgradcheck(solve, inputs, **loose),
    )
    found = []
    for check in checks:
        try:
            found.append("yes" if check() else "NO")
        except RuntimeError as reason:
            found.append(f"NO: {str(reason).splitlines()[0][:60]}")
    return " ".join(found)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="without torch's own checks")
    quick = parser.parse_args().quick
    names = ("jvp", "vjp", "hvp", "sym", "cost")
    print(f"{'family':21} {'method':11} " + " ".join(f"{name:>8}" for name in names), end="")
    print("" if quick else "  gradcheck gradgradcheck")
    for family, method in METHODS.items():
        found = errors(method)
        cells = " ".join(f"{found[n]:8.1e}" if n in found else f"{'-':>8}" for n in names)
        print(f"{family:21} {method:11} {cells}", end="", flush=True)
        print("" if quick else f"  {passes(method)}", flush=True)


if __name__ == "__main__":
    main()

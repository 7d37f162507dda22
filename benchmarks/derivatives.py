"""What derivatives beyond the first gradient, and cost integrals, cost: ratios in one run.

``python benchmarks/derivatives.py [--quick]``. CPU time of this process; each line is the median of
alternating runs of both. Peers are left out where they are not installed: ``peer_derivatives.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from peer_derivatives import diffrax_calls, stiff_sensitivities
from torch.autograd import grad

import pnode

D = torch.float64


class Network(torch.nn.Module):
    """The vector field: two layers."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(size, width, dtype=D), torch.nn.Tanh(),
            torch.nn.Linear(width, size, dtype=D),
        )  # fmt: skip

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.net(y) - 0.5 * y


def ratio(one: Callable[[], object], other: Callable[[], object], repeats: int) -> float:
    """Return the median of how many times as long ``one`` takes as ``other``."""
    one(), other()
    found = []
    for _ in range(repeats):
        spent = []
        for call in (one, other):
            start = time.process_time()
            call()
            spent.append(time.process_time() - start)
        found.append(spent[0] / spent[1])
    return statistics.median(found)


def rows(
    method: str, batch: int, size: int, width: int, repeats: int
) -> Iterator[tuple[str, float]]:
    """Yield what was measured of a method."""
    f = Network(size, width)
    y0 = torch.randn(batch, size, dtype=D)
    t = torch.linspace(0.0, 1.0, 3, dtype=D)
    options = {"method": method, "step_size": 0.05}
    if method not in ("rk4", "dopri5"):
        options["jacobian"] = "block"
    solver = pnode.Solver(f, compile=False, **options)
    leaf = y0.clone().requires_grad_()
    inputs = [leaf, *f.parameters()]
    v = [torch.randn_like(x) for x in inputs]

    def forward() -> object:
        with torch.no_grad():
            return solver(y0, t)

    def gradient(create_graph: bool = False) -> tuple[torch.Tensor, ...]:
        return grad((solver(leaf, t).ys ** 2).sum(), inputs, create_graph=create_graph)

    def hessian_product() -> object:
        first = gradient(True)
        return grad(sum((g * d).sum() for g, d in zip(first, v, strict=True)), inputs)

    def tangent() -> object:
        return torch.func.jvp(lambda y: solver(y, t).ys, (y0,), (v[0],))

    directions = torch.randn(16, *y0.shape, dtype=D)

    def tangents() -> object:
        with torch.no_grad():
            return torch.func.vmap(
                lambda d: torch.func.jvp(lambda y: solver(y, t).ys, (y0,), (d,))[1]
            )(directions)

    seeds = torch.randn(16, len(t), *y0.shape, dtype=D)

    def cotangents() -> object:
        return grad(solver(leaf, t).ys, inputs, seeds, is_grads_batched=True)

    with_cost = pnode.Solver(f, compile=False, cost=lambda t, y: y.square().mean(), **options)

    def cost_gradient() -> object:
        solution = with_cost(leaf, t)
        return grad((solution.ys**2).sum() + solution.costs[-1], inputs)

    if method == "rk4":  # the same steps, written out, and by others
        for what, call in (diffrax_calls(f, y0, v, 20) or {}).items():
            own = {"jvp": tangent, "Hessian product": hessian_product}[what]
            yield f"{what} / diffrax, compiled", ratio(own, call, repeats)

        def loop(y: torch.Tensor) -> torch.Tensor:
            h, ys = 0.05, [y]
            for step in range(20):
                at = torch.tensor(h * step, dtype=D)
                k1 = f(at, y)
                k2 = f(at, y + 0.5 * h * k1)
                k3 = f(at, y + 0.5 * h * k2)
                y = y + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + f(at, y + h * k3))
                ys += [y] if step in (9, 19) else []
            return torch.stack(ys)

        def loop_product() -> object:
            first = grad((loop(leaf) ** 2).sum(), inputs, create_graph=True)
            return grad(sum((g * d).sum() for g, d in zip(first, v, strict=True)), inputs)

        def loop_tangents() -> object:
            return torch.func.vmap(lambda d: torch.func.jvp(loop, (y0,), (d,))[1])(directions)

        yield (
            "jvp / torch.func of a loop",
            ratio(tangent, lambda: torch.func.jvp(loop, (y0,), (v[0],)), repeats),
        )
        yield "16 tangents / torch.func of a loop", ratio(tangents, loop_tangents, repeats)
        yield (
            "gradient / autograd of a loop",
            ratio(gradient, lambda: grad((loop(leaf) ** 2).sum(), inputs), repeats),
        )
        yield "Hessian product / autograd of a loop", ratio(hessian_product, loop_product, repeats)
    yield "jvp / forward", ratio(tangent, forward, repeats)
    yield "16 tangents / forward", ratio(tangents, forward, repeats)
    yield "gradient / forward", ratio(gradient, forward, repeats)
    yield "16 cotangents / gradient", ratio(cotangents, gradient, repeats)
    yield "Hessian product / gradient", ratio(hessian_product, gradient, repeats)
    yield "gradient with a cost integral / without", ratio(cost_gradient, gradient, repeats)


def cheap_cost(method: str, batch: int, repeats: int) -> float:
    """Return what the integral of y . y adds to a gradient whose f is a wide network."""
    f = Network(8, 512)
    leaf = torch.randn(batch, 8, dtype=D).requires_grad_()
    t, inputs = torch.linspace(0.0, 1.0, 3, dtype=D), [leaf, *f.parameters()]
    options = {"method": method, "step_size": 0.05, "compile": False}
    if method not in ("rk4", "dopri5"):
        options["jacobian"] = "block"
    plain = pnode.Solver(f, **options)
    integral = pnode.Solver(f, cost=lambda t, y: (y * y).sum(), **options)

    def without() -> object:
        return grad(plain(leaf, t).ys.square().sum(), inputs)

    def with_cost() -> object:
        solution = integral(leaf, t)
        return grad(solution.ys.square().sum() + solution.costs[-1], inputs)

    return ratio(with_cost, without, repeats)


class Rates(torch.nn.Module):
    """16 states with three parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = torch.nn.Parameter(torch.tensor([0.5, 1.0, 0.2], dtype=D))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b, c = self.rates
        return a * torch.roll(y, 1) - b * y - c * y * torch.roll(y, -1)


def output_jacobian(method: str, repeats: int) -> float:
    """Return what the Jacobian of 16 outputs by three parameters costs, in forward solves."""
    solver = pnode.Solver(Rates(), compile=False, method=method, step_size=0.05)
    y0, t = torch.rand(16, dtype=D), torch.tensor([0.0, 1.0], dtype=D)

    def forward() -> object:
        with torch.no_grad():
            return solver(y0, t)

    return ratio(lambda: pnode.sensitivities(solver, y0, t, wrt=["rates"]), forward, repeats)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small and few")
    repeats, batch = (3, 8) if parser.parse_args().quick else (9, 64)
    for method in ("rk4", "dopri5", "cn", "es325", "rodaspr", "bdf2"):
        for what, value in rows(method, batch, 8, 64, repeats):
            print(f"{method:8} {what:42} {value:6.2f}", flush=True)
        value = cheap_cost(method, 4 * batch, repeats)
        print(f"{method:8} {'as before, cheap beside f':42} {value:6.2f}", flush=True)
        value = output_jacobian(method, repeats)
        print(f"{method:8} {'Jacobian of 16 outputs by 3 / forward':42} {value:6.2f}", flush=True)
    for name, value, own, other in stiff_sensitivities(ratio, repeats):
        what = f"Robertson's sensitivities / {name}"
        print(f"{'bdf':8} {what:42} {value:6.2f}  errors {own:.1e} {other:.1e}", flush=True)


if __name__ == "__main__":
    main()

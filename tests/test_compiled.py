"""compile=True: whole explicit steps and their adjoints as compiled graphs.

Most tests run the graphs without the compiler (``interpreted``), which takes its place in the last
group: what it makes of one graph is what it makes of the others.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compile_cache import share_headers
from representatives import representatives

import pnode
from pnode.errors import ConfigurationError, NonFiniteVectorField
from pnode.solvers.compiled import inductor, libraries, trace
from pnode.solvers.methods import METHODS, Method, find_method

EXPLICIT = representatives(method for method in METHODS if method.ts_type in ("rk", "ssp"))
TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


class Net(torch.nn.Module):
    """Depends on time, on a buffer, and on a parameter that it does not use."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = torch.nn.Linear(3, 9)
        self.second = torch.nn.Linear(9, 3)
        self.rate = torch.nn.Parameter(torch.tensor(0.7))
        self.idle = torch.nn.Parameter(torch.tensor(1.0))
        self.register_buffer("shift", torch.tensor([0.1, -0.2, 0.3]))
        self.to(dtype)
        self.calls = 0

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.second(torch.tanh(self.first(y + self.shift))) - self.rate * torch.sin(t) * y


def layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Return what machine code relies on."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return (tensor.dtype, *((size, stride) for size, stride in sizes if size > 1))


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Run graphs with torch instead of compiling them; counts the calls of each.

    Machine code takes whatever it is given for tensors of its examples' kinds and strides.
    """
    calls: dict[str, int] = {}

    def run_graph(name: str, function: Callable[..., Any], examples: Any) -> Any:
        graph, kind = inductor.prepare(function, examples), name.split("-")[0]
        expected = [layout(tensor) for tensor in examples]

        def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            assert [layout(tensor) for tensor in inputs] == expected
            calls[kind] = calls.get(kind, 0) + 1
            with torch.no_grad():
                # Inductor's matrix products write into what they return.
                return [result.clone().copy_(result) for result in graph(*inputs)]

        return run

    monkeypatch.setattr(inductor, "compile_graph", run_graph)
    return calls


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A fall-back to the other path would hide what is to be tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile=True")
        yield


def gradients(
    func: Any,
    y0: Any,
    times: torch.Tensor = TIMES,
    tensors: tuple[torch.Tensor, ...] = (),
    **keywords: Any,
) -> tuple[list[torch.Tensor], Any]:
    """Return outputs and the gradients with respect to y0, t and the parameters; the ledger."""
    starts = tuple(
        part.clone().requires_grad_() for part in (y0 if isinstance(y0, tuple) else [y0])
    )
    t = times.clone().requires_grad_()
    solution = pnode.Solver(func, **keywords)(starts if isinstance(y0, tuple) else starts[0], t)
    parts = solution.ys if isinstance(y0, tuple) else (solution.ys,)
    loss = sum(
        (part * torch.cos(torch.arange(part.numel()).view(part.shape))).sum() for part in parts
    )
    inputs = [*starts, t, *tensors]
    if isinstance(func, torch.nn.Module):
        inputs += list(func.parameters())
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    return [*(part.detach() for part in parts), *found], solution.stats


def assert_same(found: list[Any], expected: list[Any], rtol: float = 1e-12) -> None:
    assert [item is None for item in found] == [item is None for item in expected]
    for mine, theirs in zip(found, expected, strict=True):
        if mine is not None:
            assert mine.dtype is theirs.dtype
            scale = float(theirs.abs().max())
            torch.testing.assert_close(mine, theirs, rtol=rtol, atol=rtol * scale)


def start(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=dtype)


def both(*arguments: Any, within: float = 1e-12, **keywords: Any) -> tuple[Any, Any]:
    """Compare compile=True with the other path; return the two ledgers."""
    eager, expected = gradients(*arguments, **keywords)
    compiled, ledger = gradients(*arguments, compile=True, **keywords)
    assert_same(compiled, eager, within)
    return ledger, expected


# ----------------------------------------------------------------------- the same numbers as eager


@pytest.mark.parametrize("method", [method.name for method in EXPLICIT])
def test_fixed_steps_of_every_method(method: str, interpreted: dict[str, int]) -> None:
    ledger, expected = both(Net(), start(4, 3), method=method, step_size=0.1)
    # One stage of two methods is for their error estimates only, and left out.
    idle = ledger.steps if method in ("verner7", "verner8") else 0
    assert (ledger.steps, ledger.rhs) == (expected.steps, expected.rhs - idle)
    assert ledger.backward.vjp == expected.backward.vjp
    assert (ledger.backward.rhs, ledger.backward.recomputed) == (3, 0)  # for t, none for the steps
    assert interpreted == {"step": ledger.steps, "adjoint": ledger.steps}


@pytest.mark.parametrize("method", [method.name for method in EXPLICIT if method.adaptive])
def test_adaptive_steps_of_every_method(method: str, interpreted: dict[str, int]) -> None:
    # The step sizes follow from an error estimate, a difference of nearly equal numbers. Its
    # round-off, 1e-16 against 1e-5, moves steps by 1e-11 of their length; the sum of their
    # lengths is fixed, but not the stages' places in between.
    keywords = {"method": method, "rtol": 1e-5, "atol": 1e-7, "first_step": 0.3}
    ledger, expected = both(Net(), start(4, 3), within=1e-9, **keywords)
    assert (ledger.steps, ledger.rejected) == (expected.steps, expected.rejected)
    # The slope at the start of a rejected step is not evaluated again.
    saved = ledger.rejected if find_method(method).fsal else 0
    assert ledger.rhs == expected.rhs - saved


def test_rejected_steps_and_entrywise_tolerances(interpreted: dict[str, int]) -> None:
    def oscillator(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([y[1], 5.0 * (1.0 - y[0] ** 2) * y[1] - y[0]])

    y0, times = torch.tensor([2.0, 0.0], dtype=torch.float64), torch.tensor([0.0, 5.0, 10.0])
    atol = torch.tensor([1e-6, 1e-4])
    keywords = {"rtol": 1e-4, "atol": atol, "first_step": 1.0, "max_step": 0.8}
    # Error growth between the eager and the compiled steps on this problem: see above.
    ledger, expected = both(oscillator, y0, times.double(), within=1e-7, **keywords)
    assert expected.rejected > 5
    assert (ledger.steps, ledger.rejected) == (expected.steps, expected.rejected)


@pytest.mark.parametrize("first", [1.0, 0.0])
@pytest.mark.parametrize("samples", ["joint", "independent"])
def test_a_zero_without_a_tolerance_counts_for_nothing(
    samples: str, first: float, interpreted: dict[str, int]
) -> None:
    def feeds(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        a, b, c = y.split(1, dim=-1)
        return torch.cat([-a, -3.0 * b, a * a - c], dim=-1)

    y0 = torch.tensor([[first, 0.0, 0.0]], dtype=torch.float64)
    found = []
    for compiled in (False, True):
        solver = pnode.Solver(feeds, rtol=1e-4, atol=0.0, samples=samples, compile=compiled)
        found.append(solver(y0, TIMES))
    torch.testing.assert_close(found[1].ys, found[0].ys, rtol=1e-12, atol=0.0)
    assert found[1].stats.steps == found[0].stats.steps < 20


def test_accepted_steps_are_those_of_petsc(interpreted: dict[str, int]) -> None:
    lengths: dict[bool, list[float]] = {}
    for compiled in (False, True):
        times: list[float] = []
        solver = pnode.Solver(
            Net(), rtol=1e-6, compile=compiled, monitor=lambda n, t, y, times=times: times.append(t)
        )
        solver(start(4, 3), TIMES)
        lengths[compiled] = times
    torch.testing.assert_close(lengths[True], lengths[False], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_decreasing_times(method: str, interpreted: dict[str, int]) -> None:
    both(Net(), start(4, 3), TIMES.flip(0), method=method, step_size=0.1)


def test_decreasing_times_adaptive(interpreted: dict[str, int]) -> None:
    both(Net(), start(4, 3), TIMES.flip(0), rtol=1e-5, within=1e-9)


def test_single_precision(interpreted: dict[str, int]) -> None:
    # f computes with 1e-7; sums over 10 steps in another order.
    both(Net(torch.float32), start(4, 3, dtype=torch.float32), step_size=0.1, within=1e-5)


def test_tuple_state(interpreted: dict[str, int]) -> None:
    def pair(t: torch.Tensor, state: Any) -> Any:
        a, b = state
        return torch.cos(t) * b.sum() * a, b * a.mean()

    both(pair, (start(2, 2), start(3)), step_size=0.1)


@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4)])
def test_shapes_of_the_state(shape: tuple[int, ...], interpreted: dict[str, int]) -> None:
    both(lambda t, y: torch.sin(y) * t, start(*shape), step_size=0.25)


def test_field_of_many_operations(interpreted: dict[str, int]) -> None:
    """Operations in place, without gradient, on columns, with several results, and branches."""
    weight = start(3, 3).requires_grad_()
    norm = torch.nn.LayerNorm(3).double()

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = norm(y) @ weight
        z[:, 0] += y[:, 1] ** 3
        (a, b, _), (c, d, _) = y.unbind(1), torch.sin(y).unbind(1)
        z[:, 1] += a * b + c * d
        with torch.no_grad():
            scale = y.norm()
        top, _ = torch.max(z, dim=1, keepdim=True)
        z = z - top / (1.0 + scale)
        z.mul_(0.5)
        copy = y.clone()
        copy.view(-1)[1:] *= weight[:, ::2].sum()
        z = z + torch.where(y > 0.1, copy, 0.3)
        return torch.nn.functional.silu(z) + torch.where(y > 0, y, 0.1 * y) * torch.tensor(0.2)

    both(
        field, start(4, 3), tensors=(weight, *norm.parameters()), step_size=0.1,
        params=[weight, *norm.parameters()],
    )  # fmt: skip


@pytest.mark.parametrize("method", ["euler", "rk4", "dopri5"])
def test_activations_that_are_not_contiguous(method: str, interpreted: dict[str, int]) -> None:
    """Stacked, those of channels-last convolutions keep their strides."""
    layers = (
        torch.nn.Conv2d(2, 3, 3, padding=1),
        torch.nn.Tanh(),
        torch.nn.Conv2d(3, 2, 3, padding=1),
    )
    net = torch.nn.Sequential(*layers).double().to(memory_format=torch.channels_last)
    weights = list(net.parameters())
    keywords = {"method": method, "step_size": 0.25, "params": weights, "tensors": weights}
    both(lambda t, y: net(y), start(2, 2, 4, 4), **keywords)
    assert "adjoint" in interpreted


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("batch", "size", "width"),
    [(6, 2, 37), (6, 1, 16), (20, 3, 50), (40, 30, 50), (300, 20, 130), (1, 90, 90)],
)
def test_products_of_all_sizes(
    batch: int, size: int, width: int, bias: bool, interpreted: dict[str, int]
) -> None:
    """Sums over rows, along rows, lane by lane; products for all stages, or for each."""
    net = torch.nn.Sequential(
        torch.nn.Linear(size, width, bias), torch.nn.Tanh(), torch.nn.Linear(width, size, bias)
    ).double()
    y0 = 0.1 * start(batch, size)
    parameters = tuple(net.parameters())
    both(lambda t, y: net(y), y0, tensors=parameters, params=parameters, step_size=0.3)


def test_convolutions(interpreted: dict[str, int]) -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1),
        torch.nn.Softplus(),
        torch.nn.Conv2d(4, 2, 3, padding=1),
    ).double()
    parameters = tuple(net.parameters())
    both(
        lambda t, y: net(y), start(2, 2, 5, 5), tensors=parameters, params=parameters, step_size=0.5
    )


def test_parameters_that_are_not_leaves(interpreted: dict[str, int]) -> None:
    leaf = torch.tensor([0.3, -0.4, 0.5], dtype=torch.float64, requires_grad=True)
    derived = leaf.exp()
    both(
        lambda t, y: torch.sin(derived * y),
        start(4, 3),
        tensors=(derived,),
        params=[derived],
        step_size=0.2,
    )


def test_custom_derivative_is_kept(interpreted: dict[str, int]) -> None:
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

        @staticmethod
        def backward(ctx: Any, w: torch.Tensor) -> torch.Tensor:
            return 2.0 * w

    both(lambda t, y: Doubled.apply(y), start(3), step_size=0.2)


# ------------------------------------------------------------- checkpoints, outputs, other features


@pytest.mark.parametrize("method", ["dopri5", "rk4"])
@pytest.mark.parametrize("chosen", [{"memory": 2000}, {"store": "stages"}, {"memory": 10**6}])
def test_limited_memory(
    method: str,
    chosen: dict[str, Any],
    interpreted: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Compiled steps keep no graphs within a limit.
    monkeypatch.setattr(Method, "keeps_graphs", False)
    checkpointing = pnode.Checkpointing(**chosen)
    ledger, expected = both(
        Net(), start(4, 3), method=method, step_size=0.1, checkpointing=checkpointing
    )
    assert ledger.rhs == expected.rhs
    assert ledger.backward == expected.backward
    assert ledger.ram_bytes == expected.ram_bytes
    assert (ledger.backward.recomputed > 0) == (chosen.get("memory") == 2000)


def test_disk(tmp_path: Path, interpreted: dict[str, int]) -> None:
    both(Net(), start(4, 3), step_size=0.1, checkpointing=pnode.Checkpointing("1KiB", tmp_path))


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
@pytest.mark.parametrize("steps", [{"step_size": 0.2}, {"rtol": 1e-5}])
def test_dense_output(method: str, steps: dict[str, Any], interpreted: dict[str, int]) -> None:
    both(Net(), start(4, 3), method=method, dense=True, within=1e-9, **steps)


def test_event(interpreted: dict[str, int]) -> None:
    def fall(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([y[1], -9.81 - 0.1 * y[1]])

    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64)
    for steps in ({"step_size": 0.05}, {"rtol": 1e-8}):
        both(fall, y0, event_fn=lambda t, y: y[0], within=1e-9, **steps)


def test_going_on_from_an_event(interpreted: dict[str, int]) -> None:
    """Three bounces without putting the ball on the floor, as by steps that are not compiled."""

    def fall(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([y[1], -9.81 - 0.0 * y[1]])

    def solve(compiled: bool) -> list[torch.Tensor]:
        y0 = torch.tensor([0.3, 0.0], dtype=torch.float64, requires_grad=True)
        solver = pnode.Solver(
            fall, event_fn=lambda t, y: y[0], method="rk4", step_size=0.1, compile=compiled
        )
        y, t = y0, torch.zeros((), dtype=torch.float64)
        for _ in range(3):
            solution = solver(y, torch.stack([t, t.detach() + 2.0]))
            t, y = solution.event_time, solution.ys[-1] * torch.tensor([1.0, -0.8]).double()
        return [*torch.autograd.grad(t + y[1], y0), t.detach(), y.detach()]

    for ours, plain in zip(solve(True), solve(False), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-10, atol=1e-12)
    assert interpreted


def test_time_of_one_output(interpreted: dict[str, int]) -> None:
    both(Net(), start(4, 3), TIMES[:1], step_size=0.1)


def test_without_gradients(interpreted: dict[str, int]) -> None:
    with torch.no_grad():
        found = pnode.Solver(Net(), step_size=0.1, compile=True)(start(4, 3), TIMES)
        expected = pnode.Solver(Net(), step_size=0.1)(start(4, 3), TIMES)
    assert_same([found.ys], [expected.ys])
    assert found.stats == expected.stats
    assert "adjoint" not in interpreted


@pytest.mark.parametrize("steps", [{"step_size": 0.1}, {"rtol": 1e-5}])
def test_second_backward(steps: dict[str, Any], interpreted: dict[str, int]) -> None:
    net = Net()
    ys = pnode.Solver(net, compile=True, **steps)(start(4, 3), TIMES).ys
    first, second = (
        torch.autograd.grad(ys.square().sum(), list(net.first.parameters()), retain_graph=True)
        for _ in range(2)
    )
    assert_same(list(first), list(second), 0.0)


def test_two_forwards_before_the_backwards(interpreted: dict[str, int]) -> None:
    net = Net()
    solver = pnode.Solver(net, step_size=0.1, compile=True)
    one, two = start(4, 3).requires_grad_(), (2.0 * start(4, 3)).requires_grad_()
    (solver(one, TIMES).ys.sum() + solver(two, TIMES).ys.sum()).backward()
    for y in (one, two):
        (expected,) = torch.autograd.grad(pnode.Solver(net, step_size=0.1)(y, TIMES).ys.sum(), y)
        assert_same([y.grad], [expected])


# ------------------------------------------------------------- how often the interpreter is entered


def test_one_call_per_step(interpreted: dict[str, int]) -> None:
    """Once to trace the field, twice to check that, once to see what it asks, and once a solve.

    And when it is first looked at without a graph, once for that, and twice to see whether torch's
    functions tell what it does.
    """
    net = Net()
    solver = pnode.Solver(net, step_size=0.02, compile=True)
    for solves in (1, 2, 3):
        y0 = start(4, 3).requires_grad_()
        solution = solver(y0, TIMES)
        solution.ys.sum().backward()
        assert interpreted == {"step": 50 * solves, "adjoint": 50 * solves}
        assert net.calls == 4 + solves + 3 * (solves > 1)
        assert (solution.stats.rhs, solution.stats.backward.vjp) == (301, 300)


def test_results_per_step(interpreted: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of dopri5 gives 6 tensors, one for all stages, and one for what they save."""
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3)
    ).double()
    original, sizes = inductor.compile_graph, {}

    def counting(name: str, function: Any, examples: Any) -> Any:
        run, kind = original(name, function, examples), name.split("-")[0]

        def count(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            results = run(inputs)
            sizes[kind] = (len(inputs), len(results))
            return results

        return count

    monkeypatch.setattr(inductor, "compile_graph", counting)
    solver = pnode.Solver(lambda t, y: net(y), params=net.parameters(), step_size=0.1, compile=True)
    stats = solver(start(4, 3), TIMES).stats
    solver(start(4, 3), TIMES).ys.sum().backward()
    # t, h, y, k_1, 4 parameters, and one of them transposed; what to look at, u', k_s, the stages,
    # what they save, what the last saves.
    assert sizes["step"] == (9, 6)
    # Of every step: 6 stages of 12 entries, 6 hidden layers of 36.
    assert stats.ram_bytes == 10 * 6 * (12 + 36) * 8


# ---------------------------------------------------------------------------------- what may change


def test_changes_in_place_take_effect(interpreted: dict[str, int]) -> None:
    net, captured = Net(), torch.tensor(0.5, dtype=torch.float64)

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return net(t, y) * captured

    parameters = tuple(net.parameters())
    solver = pnode.Solver(field, params=parameters, step_size=0.1, compile=True)
    other = pnode.Solver(field, params=parameters, step_size=0.1)
    for _ in range(3):
        found, expected = (each(start(4, 3), TIMES).ys for each in (solver, other))
        assert_same([found.detach()], [expected.detach()])
        with torch.no_grad():
            captured += 0.1
            net.shift += 0.1
            net.first.weight *= 1.1
    # Traced once, whatever the values.
    assert len(solver._engine.compiler._codes) == 1


def test_changes_of_python_objects_are_noticed(interpreted: dict[str, int]) -> None:
    class Scaled:
        factor: Any = 1.0

        def __call__(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return -self.factor * y

    field = Scaled()
    solver = pnode.Solver(field, step_size=0.1, compile=True)
    other = pnode.Solver(field, step_size=0.1)
    for factor in (1.0, 2.0, torch.tensor(3.0), torch.tensor(4.0)):
        field.factor = factor
        assert_same([solver(start(3), TIMES).ys], [other(start(3), TIMES).ys])


def test_replaced_parameters_get_gradients(interpreted: dict[str, int]) -> None:
    net = Net()
    solver = pnode.Solver(net, step_size=0.1, compile=True)
    for _ in range(2):
        solver(start(4, 3), TIMES).ys.sum().backward()
        assert net.first.weight.grad is not None
        net.first.weight = torch.nn.Parameter(net.first.weight.detach().clone())  # same values


def test_other_data_in_the_same_tensors(interpreted: dict[str, int]) -> None:
    """Strides and dtypes that graphs rely on: ``data=`` and ``Module.to`` change them in place."""
    net = Net()
    solver = pnode.Solver(net, step_size=0.1, compile=True)
    layout = solver(start(4, 3), TIMES)
    weight = net.first.weight
    weight.data = 2.0 * weight.detach().t().contiguous().t()
    assert weight.stride() == (1, 9)
    (entry,) = solver._engine.compiler._traces.values()
    assert [x.stride() for x in entry.graph.captured] != [x[1] for x in entry.graph.layouts]
    given = entry.graph.inputs()[: len(entry.graph.captured)]
    assert [x.stride() for x in given] == [x[1] for x in entry.graph.layouts]
    expected = pnode.Solver(net, step_size=0.1)(start(4, 3), TIMES).ys
    assert_same([solver(start(4, 3), TIMES).ys.detach()], [expected.detach()])
    assert not torch.equal(layout.ys, expected)
    net.float()
    half = solver(start(4, 3).float(), TIMES).ys
    expected = pnode.Solver(net, step_size=0.1)(start(4, 3).float(), TIMES).ys
    assert_same([half.detach()], [expected.detach()], 1e-5)


def test_ever_new_numbers_fall_back(interpreted: dict[str, int]) -> None:
    factor = 1.0

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -factor * y

    solver = pnode.Solver(field, step_size=0.1, compile=True)
    other = pnode.Solver(field, step_size=0.1)
    with pytest.warns(UserWarning, match=r"compile=True.*different again: let numbers") as caught:
        for _ in range(12):
            factor += 1.0
            found, expected = solver(start(3), TIMES), other(start(3), TIMES)
            assert_same([found.ys], [expected.ys])
            assert found.stats.rhs == expected.stats.rhs
    assert len([w for w in caught if "compile=True" in str(w.message)]) == 1


def test_modules_copied_with_their_solver(interpreted: dict[str, int]) -> None:
    import copy

    solver = pnode.Solver(Net(), step_size=0.1, compile=True)
    solver(start(4, 3), TIMES)
    twin = copy.deepcopy(solver)
    with torch.no_grad():
        twin.rhs.first.weight.mul_(2.0)
    expected = pnode.Solver(twin.rhs, step_size=0.1)(start(4, 3), TIMES).ys
    assert_same([twin(start(4, 3), TIMES).ys.detach()], [expected.detach()])


# ------------------------------------------------------------------------------------- falling back


def test_what_torch_cannot_trace(interpreted: dict[str, int]) -> None:
    def branch(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -y if y.sum() > 0 else y

    def numpy(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -y * float(y.detach().numpy().max())

    def number(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -torch.sin(y) * y.max().detach().item()

    def masked(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = torch.sin(y)
        z[z > 0.3] *= 0.5
        return -z

    here = start(3)

    def close_to_the_edge(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return -1e-2 * torch.linalg.cholesky((1e-6 - (y - here) ** 2).diag()).sum(1)

    for field, reason in (
        (branch, "values of tensors"), (numpy, ""), (number, "values of tensors"),
        (masked, "how many entries"), (close_to_the_edge, "fails near y0"),
    ):  # fmt: skip
        solver = pnode.Solver(field, step_size=0.1, compile=True)
        with pytest.warns(UserWarning, match=f"compile=True has no effect.*{reason}") as caught:
            found = [solver(start(3), TIMES).ys for _ in range(2)]
        assert len([w for w in caught if "compile=True" in str(w.message)]) == 1
        assert_same(found, [pnode.Solver(field, step_size=0.1)(start(3), TIMES).ys] * 2, 0.0)


@pytest.mark.parametrize(
    "keywords",
    [
        {"method": "bdf2", "step_size": 0.1, "jacobian": "matrix-free"},
        {"controller": "pi"},
        {"petsc_options": {"ts_adapt_safety": 0.8}},
    ],
)
def test_what_has_no_compiled_steps_has_a_compiled_field(
    keywords: dict[str, Any], interpreted: dict[str, int]
) -> None:
    """See test_compiled_fields.py."""
    both(Net(), start(4, 3), within=1e-9, **keywords)
    assert {"value", "product"} <= set(interpreted)
    assert not {"step", "adjoint"} & set(interpreted)


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PNODE_CACHE_DIR", str(tmp_path))

    def fail(*arguments: Any, **keywords: Any) -> Any:
        raise RuntimeError("InvalidCxxCompiler")

    for name in ("aot_compile", "aoti_compile_and_package"):
        monkeypatch.setattr(f"torch._inductor.{name}", fail)
    with pytest.warns(UserWarning, match="compile=True has no effect.*InvalidCxxCompiler"):
        found, _ = gradients(Net(), start(4, 3), step_size=0.1, compile=True)
    assert_same(found, gradients(Net(), start(4, 3), step_size=0.1)[0], 0.0)


def test_inductor_builds_what_we_cannot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where another torch writes another text; what inductor makes is kept and loaded."""
    monkeypatch.setenv("PNODE_CACHE_DIR", str(tmp_path))
    asked = []

    def fail(*arguments: Any) -> None:
        raise ValueError("inductor writes its interface in another way")

    def build(graph: torch.fx.GraphModule, examples: Any, package: Path) -> None:
        asked.append(graph(*examples))
        package.write_bytes(b"a package")

    monkeypatch.setattr(libraries, "build", fail)
    monkeypatch.setattr(inductor, "_build_by_inductor", build)
    monkeypatch.setattr(inductor, "_load", inductor._read)
    monkeypatch.setattr(libraries, "is_right", lambda *arguments: True)  # bytes cannot be called
    made = inductor.compile_graph("graph", lambda x: (2 * x,), [torch.ones(2)])
    assert made == b"a package"
    assert len(asked) == 1
    assert torch.equal(asked[0][0], torch.full((2,), 2.0))


def test_undeclared_tensors_are_errors(interpreted: dict[str, int]) -> None:
    weight = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    solver = pnode.Solver(lambda t, y: -weight * y, step_size=0.1, compile=True)
    with pytest.raises(ConfigurationError, match="was not declared"):
        solver(start(3).requires_grad_(), TIMES)


def test_dropout_is_an_error_as_ever(interpreted: dict[str, int]) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout(0.5)).double()
    solver = pnode.Solver(lambda t, y: net(y), params=net.parameters(), step_size=0.1, compile=True)
    with pytest.raises(pnode.PnodeError, match="random numbers"):
        solver(start(4, 3), TIMES)
    with torch.no_grad(), pytest.warns(UserWarning, match="compile=True has no effect"):
        solver(start(4, 3), TIMES)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_bad_argument(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"compile=.*give True or False"):
        pnode.Solver(Net(), compile=value)


@pytest.mark.parametrize("steps", [{"step_size": 0.1}, {"rtol": 1e-6}])
def test_non_finite_values(steps: dict[str, Any], interpreted: dict[str, int]) -> None:
    def blow_up(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(t > 0.55, torch.nan, 1.0) * y

    errors = []
    for compiled in (False, True):
        with pytest.raises(NonFiniteVectorField) as caught:
            pnode.Solver(blow_up, method="dopri5", compile=compiled, **steps)(start(3), TIMES)
        errors.append(caught.value)
    assert errors[1].time == pytest.approx(errors[0].time, rel=1e-9)
    if "step_size" in steps:
        assert errors[1].step == errors[0].step
    # Adaptive steps halve towards the wall until they are a few spacings of t long, which is where
    # the round-off of a proposed length decides how many there are of the last.
    assert abs(errors[1].step - errors[0].step) <= 4


# ------------------------------------------------------------------------------------- the compiler

PROGRAM = """
import sys, torch, pnode
from pnode.solvers.compiled import inductor
built = []
build = inductor._build
inductor._build = lambda *arguments: (built.append(arguments[0].name), build(*arguments))[1]
inductor._build_by_inductor = None  # the longer way, which nothing of this needs
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
y0 = torch.ones(5, 2, dtype=torch.float64, requires_grad=True)
t = torch.linspace(0, 1, 3, dtype=torch.float64)
results = []
for compiled in (True, False):
    solver = pnode.Solver(lambda t, y: net(y), params=net.parameters(), method="euler",
                          step_size=0.1, compile=compiled)
    loss = solver(y0, t).ys.square().sum()
    results.append([loss.detach(), *torch.autograd.grad(loss, [y0, *net.parameters()])])
for mine, theirs in zip(*results):
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
print(len(built))
"""


def run_program(folder: Path, **more: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PNODE_CACHE_DIR": str(folder), "PYTHONWARNINGS": "ignore", **more}
    return subprocess.Popen(
        [sys.executable, "-W", "error:compile=True", "-c", PROGRAM], env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that two processes have filled at the same time."""
    folder = tmp_path_factory.mktemp("compiled")
    share_headers(folder)
    programs = [run_program(folder) for _ in range(2)]
    for program in programs:
        _, err = program.communicate(timeout=500)
        assert program.returncode == 0, err
    return folder


def test_compiled_graphs_are_kept(cache: Path, tmp_path: Path) -> None:
    """Those who load them compile nothing, and leave nothing of torch's in the system's folder."""
    made = [path for path in cache.glob("[!.]*") if path.suffix != ".lock"]
    names = sorted(path.name.split("-")[0] for path in made)
    assert names == ["adjoint", "driver", "step"]
    program = run_program(cache, TMPDIR=str(tmp_path))
    out, err = program.communicate(timeout=500)
    assert program.returncode == 0, err
    assert out.split()[-1] == "0"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_damaged_files_are_made_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PNODE_CACHE_DIR", str(cache))
    (path,) = cache.glob("step-*")
    contents = path.read_bytes()
    path.write_bytes(contents[:1000])
    made = []
    monkeypatch.setattr(
        inductor, "_build", lambda path, *rest: made.append(path.write_bytes(contents))
    )
    run = inductor.compile_graph(path.stem, lambda: None, [])
    assert len(made) == 1
    assert callable(run)


def test_names_depend_on_what_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {inductor.fingerprint("a"), inductor.fingerprint("b")}
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    names.add(inductor.fingerprint("a"))
    torch.set_num_threads(threads)
    monkeypatch.setattr(torch, "__version__", "0.0")
    inductor._machine.cache_clear()
    names.add(inductor.fingerprint("a"))
    monkeypatch.undo()
    inductor._machine.cache_clear()
    assert len(names) == 4
    assert inductor.fingerprint("a") in names


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PNODE_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert inductor.cache_folder() == tmp_path / "own"
    monkeypatch.delenv("PNODE_CACHE_DIR")
    assert inductor.cache_folder() == tmp_path / "xdg" / "pnode"


def test_graphs_keep_only_what_the_product_needs() -> None:
    """Of a layer tanh(W y + b): its result. Of y^3: nothing, y is at hand."""
    from pnode.base.ledger import Ledger
    from pnode.field.vectorfield import vector_field
    from pnode.problems.problem import InitialValueProblem

    layer = torch.nn.Linear(3, 5).double()
    cases = (lambda t, y: torch.tanh(layer(y)).sum(1, True) * y, 5 + 1), (lambda t, y: y**3, 0)
    parameters = tuple(layer.parameters())
    for function, saved in cases:
        problem = InitialValueProblem.create(function, start(2, 3), TIMES, parameters)
        graph = trace.trace_field(vector_field(problem, Ledger()))
        assert graph.saved_bytes == saved * 2 * 8


def test_parameters_that_are_new_tensors_each_time(interpreted: dict[str, int]) -> None:
    """A network's output as parameters: exact, and old ones are let go of."""
    base = torch.tensor([0.5, 1.5], dtype=torch.float64, requires_grad=True)
    y0, t = torch.ones(2, dtype=torch.float64), torch.tensor([0.0, 0.5])
    held: list[torch.Tensor] = [base]

    def solve_often(compile: bool) -> tuple[pnode.Solver, list[torch.Tensor]]:
        solver = pnode.Solver(
            lambda t, y: -held[0] * y, params=held, method="rk4", step_size=0.25, compile=compile
        )
        gradients = []
        for number in range(12):
            held[0] = base * (1.0 + number)
            solver._params = tuple(held)
            (gradient,) = torch.autograd.grad(solver(y0, t).ys[-1].sum(), base)
            gradients.append(gradient)
        return solver, gradients

    solver, compiled = solve_often(True)
    _, eager = solve_often(False)
    for one, two in zip(compiled, eager, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0.0)
    assert interpreted["step"] == 12 * 2
    assert len(solver._engine.compiler._traces) <= 8

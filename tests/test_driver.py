"""Compiled explicit steps taken all at once: the same numbers as one by one, and no more calls."""

import gc
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import pnode
from pnode.errors import NonFiniteVectorField, StepLimitReached, StepSizeUnderflow
from pnode.solvers.compiled import driver, graph_steps, inductor, libraries
from pnode.solvers.compiled.graph_steps import ExplicitSteps
from pnode.solvers.compiled.inductor import CompilationFailed
from pnode.solvers.methods import find_method

TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)


class Net(torch.nn.Module):
    """Of time and state; ``limit``: the time from which on it is not finite."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = torch.nn.Linear(2, 16), torch.nn.Linear(16, 2)
        self.register_buffer("limit", torch.tensor(torch.inf))
        self.register_buffer("rate", torch.tensor(1.0))
        self.to(dtype)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        slope = self.second(torch.tanh(self.first(self.rate * y))) - torch.sin(t) * y
        return torch.where(t < self.limit, slope, torch.nan)


# Graphs are compiled once for all tests. Without need of another method they take those of dopri5
# with fixed steps, or of bosh3 with adaptive ones; where they need their own, of few stages.
FEW_STAGES = {"method": "heun2", "step_size": 0.1}
ADAPTIVE = {"rtol": 1e-7, "atol": 1e-9, "method": "bosh3"}
OF_EACH_ENTRY: dict[str, Any] = {
    "rtol": 1e-6, "atol": torch.full((4, 2), 1e-8), "method": "bosh3",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """A fall-back to the other path would hide what is to be tested."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="compile")
        yield


class Counted:
    """The driver's library, whose calls it counts."""

    def __init__(self, library: Any) -> None:
        self.library = library
        self.calls: dict[str, int] = {}

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.library, name)

        def call(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            return function(*arguments)

        return call


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    own = Counted(driver.library())
    monkeypatch.setattr(driver, "library", lambda: own)
    return own


def start(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    y0 = torch.randn(4, 2, generator=torch.Generator().manual_seed(2), dtype=dtype)
    return y0.requires_grad_()


def one_by_one(*arguments: Any) -> None:
    return None


def solve(net: Net, y0: torch.Tensor, times: torch.Tensor = TIMES, **keywords: Any) -> Any:
    solution = pnode.Solver(net, compile=True, **keywords)(y0, times)
    loss = (solution.ys[1:] * torch.linspace(0.5, 1.0, 8).view(4, 2)).sum() + solution.ys[0].sum()
    gradients = torch.autograd.grad(loss, (y0, *net.parameters()))
    return [solution.ys.detach(), *gradients], solution.stats


def first_step(times: torch.Tensor, **keywords: Any) -> float:
    solution = pnode.Solver(Net(), compile=True, **keywords)(start(), times)
    return abs(solution.stage_sweep.solved()[1].sweep.recorded()[0][0].length)


@pytest.mark.parametrize(
    "keywords",
    [
        {"step_size": 0.07},
        {
            "step_size": 0.07,
            "method": "bosh3",
            "checkpointing": pnode.Checkpointing(store="stages"),
        },
        FEW_STAGES,
        ADAPTIVE,
        {"first_step": 0.9, "max_step": 0.31, **OF_EACH_ENTRY},
        {**ADAPTIVE, "rtol": 1e-5, "min_step": 1e-5},
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_same_bits_as_step_by_step(
    keywords: dict[str, Any], backwards: bool, monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    times = TIMES.flip(0) if backwards else TIMES
    found, stats = solve(Net(), start(), times, **keywords)
    assert (counted.calls["pnode_forward"], counted.calls["pnode_reverse"]) == (1, 1)
    chooses = "rtol" in keywords and "first_step" not in keywords
    mine = first_step(times, **keywords)
    monkeypatch.setattr(ExplicitSteps, "_kernel", one_by_one)
    if chooses:  # by sums in another order than torch's, and a difference of f over 1 % of y / y'
        assert mine == pytest.approx(first_step(times, **keywords), rel=1e-11)
        keywords = {**keywords, "first_step": mine}
    expected, other = solve(Net(), start(), times, **keywords)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    # The evaluation that checks the graph is the first of the two that choose the first step.
    other.rhs += chooses
    assert stats == other
    assert stats.steps > 2


def test_single_precision(monkeypatch: pytest.MonkeyPatch, counted: Counted) -> None:
    found, _ = solve(Net(torch.float32), start(torch.float32), method="bosh3", step_size=0.1)
    assert counted.calls["pnode_forward"] == 1
    assert {x.dtype for x in found} == {torch.float32}
    monkeypatch.setattr(ExplicitSteps, "_kernel", one_by_one)
    expected, _ = solve(Net(torch.float32), start(torch.float32), method="bosh3", step_size=0.1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_interrupts_are_noticed_between_calls(
    monkeypatch: pytest.MonkeyPatch, counted: Counted
) -> None:
    expected, stats = solve(Net(), start(), step_size=0.07)
    counted.calls.clear()
    monkeypatch.setattr(driver, "PATIENCE", 0.0)
    found, _ = solve(Net(), start(), step_size=0.07)
    assert counted.calls["pnode_forward"] == stats.steps + 1
    assert counted.calls["pnode_reverse"] == stats.steps
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("steps", [{"step_size": 0.07}, ADAPTIVE])
def test_second_backward_repeats_the_steps(steps: dict[str, Any]) -> None:
    net, y0 = Net(), start()
    solution = pnode.Solver(net, compile=True, **steps)(y0, TIMES)
    loss = solution.ys.square().sum()
    first, second, third = (
        torch.autograd.grad(loss, (y0, *net.parameters()), retain_graph=True) for _ in range(3)
    )
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one, two) and torch.equal(one, three)
    assert solution.stats.backward.recomputed == 2 * solution.stats.steps
    stages = 3 if steps is ADAPTIVE else 6
    assert solution.stats.backward.vjp == 3 * stages * solution.stats.steps


def test_several_forwards_alive() -> None:
    net = Net()
    solver = pnode.Solver(net, step_size=0.07, compile=True)
    starts = [start(), (2.0 * start()).detach().requires_grad_()]
    (solver(starts[0], TIMES).ys.sum() + solver(starts[1], TIMES).ys.sum()).backward()
    for y0 in starts:
        (expected,) = torch.autograd.grad(solver(y0, TIMES).ys.sum(), y0)
        assert torch.equal(y0.grad, expected)


def test_nothing_is_left_behind() -> None:
    """Tensors go with the backward sweep, or with the solution if there is none."""
    net, y0 = Net(), start()
    solvers = [pnode.Solver(net, compile=True, **steps) for steps in (FEW_STAGES, OF_EACH_ENTRY)]
    owned = driver.library().pnode_owned
    gc.collect()
    before = owned()
    for solver in solvers:
        for _ in range(20):
            solver(y0, TIMES).ys.sum().backward()
            solver(y0, TIMES)
            with torch.no_grad():
                solver(y0, TIMES)
            net.limit.fill_(0.5)
            with pytest.raises(NonFiniteVectorField):
                solver(y0, TIMES)
            net.limit.fill_(torch.inf)
    gc.collect()
    assert owned() == before


# ----------------------------------------------------------------------------------------- failures


def failure(kind: type[Exception], net: Net, **keywords: Any) -> Any:
    with pytest.raises(kind) as caught:
        pnode.Solver(net, compile=True, **keywords)(start(), TIMES)
    return caught.value


@pytest.mark.parametrize(
    ("kind", "change", "keywords"),
    [
        (NonFiniteVectorField, {"limit": 0.55}, {"step_size": 0.07}),
        (NonFiniteVectorField, {"limit": 0.55}, ADAPTIVE),
        (StepLimitReached, {}, {"step_size": 0.07, "max_steps": 5}),
        (StepLimitReached, {}, {**ADAPTIVE, "max_steps": 5}),
        (StepSizeUnderflow, {"rate": 1e5}, {**ADAPTIVE, "min_step": 0.05}),
    ],
)
def test_errors_are_those_of_single_steps(
    kind: type[Exception], change: dict[str, float], keywords: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    net = Net()
    for name, value in change.items():
        getattr(net, name).fill_(value)
    found = failure(kind, net, **keywords)
    monkeypatch.setattr(ExplicitSteps, "_kernel", one_by_one)
    expected = failure(kind, net, **keywords)
    assert str(found) == str(expected)
    method = keywords.get("method", "dopri5")
    assert (found.time, found.step, found.method) == (expected.time, expected.step, method)


def test_without_the_driver_solves_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = solve(Net(), start(), step_size=0.07)

    def fail() -> Any:
        raise CompilationFailed("no such compiler")

    monkeypatch.setattr(driver, "library", fail)
    graph_steps._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"one by one from Python.*no such compiler") as caught:
        found = [solve(Net(), start(), step_size=0.07)[0] for _ in range(2)]
    assert len(caught) == 1
    for each in found:
        assert all(torch.equal(a, b) for a, b in zip(each, expected, strict=True))


# ------------------------------------------------------------- how often the interpreter is entered


class Calls(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.number += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", ["fixed", "adaptive"])
def test_calls_do_not_grow_with_the_steps(steps: str, counted: Counted) -> None:
    """Neither of torch, nor of the field, nor of compiled code."""
    net, y0 = Net(), start()
    numbers, taken = [], []
    for fine in (False, True):
        chosen: dict[str, Any] = {"step_size": 0.02 if fine else 0.07}
        if steps == "adaptive":
            chosen = {**ADAPTIVE, "rtol": 1e-9 if fine else 1e-6, "first_step": 0.1}
        solver = pnode.Solver(net, compile=True, **chosen)
        solver(y0, TIMES).ys.sum().backward()
        counted.calls.clear()
        with Calls() as calls:
            solution = solver(y0, TIMES)
            forward = calls.number
            solution.ys.sum().backward()
        taken.append(solution.stats.steps)
        numbers.append((forward, calls.number))
        assert {name: n for name, n in counted.calls.items() if "free" not in name} == {
            "pnode_graph_steps": 1, "pnode_sweep": 1, "pnode_forward": 1, "pnode_whole": 1,
            "pnode_restart": 1, "pnode_reverse": 1, "pnode_finish": 1,
        }  # fmt: skip
    assert taken[1] > 2 * taken[0]
    assert numbers[0] == numbers[1]
    assert numbers[0][0] <= 100 and numbers[0][1] <= 150, numbers


def test_allocations_per_step() -> None:
    """Tensors that a step of dopri5 and its adjoint make, by the code that was compiled."""
    solver = pnode.Solver(Net(), step_size=0.07, compile=True)
    solver(start(), TIMES)
    (trace,) = solver._engine.compiler._traces.values()
    (graphs,) = trace.codes.values()
    numbers = []
    for graph in (graphs.compile_step(()), graphs.adjoint):
        with zipfile.ZipFile(graph.path) as package:
            (name,) = (n for n in package.namelist() if n.endswith(".wrapper.cpp"))
            code = package.read(name).decode()
        code = code[code.index("::run_impl(") :]
        numbers.append(code.count("aoti_torch_empty_strided("))
    assert numbers[0] <= 30 and numbers[1] <= 40, numbers
    assert find_method("dopri5").stages == 7


def test_operations_that_torch_alone_can_call() -> None:
    """Without a C interface, they are taken from Python."""

    def field(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        upper = torch.eye(2, dtype=y.dtype) + 0.1 * y[:2].T @ y[:2]
        return torch.linalg.solve_triangular(upper, y.T, upper=True).T

    graph_steps._warn_once.cache_clear()
    y0 = start().detach()
    with pytest.warns(RuntimeWarning, match=r"one by one from Python.*only torch can call"):
        found = pnode.Solver(field, method="euler", step_size=0.5, compile=True)(y0, TIMES)
    expected = pnode.Solver(field, method="euler", step_size=0.5)(y0, TIMES)
    torch.testing.assert_close(found.ys, expected.ys, rtol=1e-12, atol=1e-13)


def test_results_are_laid_out_as_the_driver_takes_them():
    """One stage is stacked alone, which inductor copies with the strides that f saves it in."""
    decomposition = pytest.importorskip("torch._inductor.decomposition")
    graph = inductor.prepare(lambda x: (torch.stack([x.t()]),), [torch.zeros(3, 2)])
    table = decomposition.select_decomp_table()
    seen = make_fx(graph, table, tracing_mode="fake")(torch.zeros(3, 2))
    (found,) = seen.graph.output_node().args[0]
    assert found.meta["val"].shape == (1, 2, 3) and found.meta["val"].is_contiguous()


def test_results_that_lie_elsewhere_than_the_graph_says():
    """Inductor's results are looked at once: who reads them relies on their strides."""
    graph = inductor.prepare(lambda x: (x.t().sin(), x[:0]), [torch.zeros(3, 2)])
    right, empty = torch.zeros(3, 2).t(), torch.zeros(2, 0).t()
    assert libraries.agree_in_layout(graph, [right, empty])
    assert not libraries.agree_in_layout(graph, [right.contiguous(), empty])

    def fails(inputs):
        raise RuntimeError

    assert not libraries.is_right(graph, fails, [torch.zeros(3, 2)])
    singular = inductor.prepare(lambda x: (torch.linalg.inv(x),), [torch.eye(2)])
    assert libraries.is_right(singular, fails, [torch.zeros(2, 2)])  # as torch itself does

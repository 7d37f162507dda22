"""One measurement of ``memory.py``: peak memory and time of one gradient, in a process of its own.

    python benchmarks/memory_measure.py SERIES STEPS [--limit BYTES] [--repeats 3]

The gradient is that of the sum of squares of the final state, with respect to the parameters and
the initial state, of a 64-256-64 tanh network on a batch of 256, float64, from t = 0 to 1. A
warm-up of a few steps comes first: it sets up what every solve needs (libraries, PETSc's objects
and work vectors, diffrax's compiled program). Freed memory is then given back to the system
(malloc_trim), and resident memory is the base. The peak is the one of the first gradient after it:
``VmHWM`` of ``/proc/self/status``, which writing 5 to ``/proc/self/clear_refs`` resets. Where that
does not work, ``ru_maxrss`` stands in for both; it never falls, so small gradients then show as
nothing. Times, wall and CPU, are medians of up to ``--repeats`` gradients, fewer if they take long.

Beyond ``--limit`` bytes above the base, by RLIMIT_DATA, an allocation fails.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false")

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from peak_memory import PeakMemory, status

SIZE, WIDTH, BATCH = 64, 256, 256
STATE_BYTES = 8 * SIZE * BATCH
WARM_UP = 3  # steps
ENOUGH = 5.0  # seconds, after which no gradient is repeated
OVER_LIMIT = 3  # exit code


@dataclass(frozen=True)
class Series:
    """A way to take the gradient.

    Attributes
    ----------
    name, label : str
        On the command line; in tables and plots.
    package : str
        What it needs.
    method : str
        The method; all have four stages.
    bounded : bool
        Whether its memory does not grow in proportion to the steps.
    memory : int, optional
        Budget of pnode's checkpoints, bytes.
    disk : bool
        Whether there is a disk beside it.
    store : str
        What pnode keeps of a step.
    derivative : {"gradient", "tangent", "product"}
        What is taken: one by y0, or a Hessian product, instead of the gradient.
    """

    name: str
    label: str
    package: str
    method: str
    bounded: bool
    memory: int | None = None
    disk: bool = False
    store: str = "auto"
    derivative: str = "gradient"


CLASSICAL = "classical RK4"
SERIES = {
    series.name: series
    for series in (
        Series("pnode", "pnode, no limit", "pnode", CLASSICAL, False),
        Series("pnode-stages", "pnode, stages", "pnode", CLASSICAL, False, store="stages"),
        Series("pnode-64MB", "pnode, 64 MB", "pnode", CLASSICAL, True, 64 * 10**6),
        Series("pnode-16MB", "pnode, 16 MB", "pnode", CLASSICAL, True, 16 * 10**6),
        Series(
            "pnode-16MB-disk", "pnode, 16 MB + disk", "pnode", CLASSICAL, True, 16 * 10**6, True
        ),
        *(
            Series(
                f"{name}-{limit // 10**6}MB",
                f"{label}, {limit // 10**6} MB",
                "pnode",
                CLASSICAL,
                True,
                limit,
                derivative=name,
            )
            for name, label in (("tangent", "tangent"), ("product", "Hessian product"))
            for limit in (64 * 10**6, 16 * 10**6)
        ),
        Series("torchdiffeq", "torchdiffeq odeint", "torchdiffeq", "3/8 rule", False),
        Series("torchdiffeq-adjoint", "torchdiffeq adjoint", "torchdiffeq", "3/8 rule", True),
        Series("diffrax", "diffrax checkpointed", "diffrax", CLASSICAL, True),
    )
}


@dataclass
class Task:
    """What is measured.

    Attributes
    ----------
    warm_up, gradient : callable
        Take one gradient, of a few steps and of all; the latter returns its norm.
    facts : callable
        Whatever else is known after the first gradient.
    """

    warm_up: Callable[[], Any]
    gradient: Callable[[], float]
    facts: Callable[[], dict[str, Any]]


def network() -> tuple[list[np.ndarray], np.ndarray]:
    """Return weights and biases, and the initial state."""
    random = np.random.default_rng(0)
    shapes = [((WIDTH, SIZE), SIZE), ((WIDTH,), SIZE), ((SIZE, WIDTH), WIDTH), ((SIZE,), WIDTH)]
    weights = [random.uniform(-1, 1, shape) / fan_in**0.5 for shape, fan_in in shapes]
    return weights, random.standard_normal((BATCH, SIZE))


def torch_task(
    solve: Callable[[Any, Any, float], Any], facts: Callable[[], dict[str, Any]], steps: int,
    derivative: str = "gradient",
) -> Task:  # fmt: skip
    """Return the task of a torch solver: ``solve(field, y0, end)`` is the final state."""
    import torch

    torch.set_num_threads(1)
    weights, start = network()
    y0 = torch.from_numpy(start).requires_grad_()
    calls = [0]

    class TanhNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(
                torch.nn.Linear(SIZE, WIDTH), torch.nn.Tanh(), torch.nn.Linear(WIDTH, SIZE)
            ).double()

        def forward(self, t: Any, y: Any) -> Any:
            calls[0] += 1
            return self.layers(y)

    field = TanhNet()
    with torch.no_grad():
        for parameter, values in zip(field.parameters(), weights, strict=True):
            parameter.copy_(torch.from_numpy(values))
    wanted = [y0, *field.parameters()]

    def gradient(end: float = 1.0) -> float:
        calls[0] = 0
        if derivative == "tangent":
            with torch.no_grad():
                ahead = torch.func.jvp(lambda y: solve(field, y, end), (y0,), (y0.sin(),))
            return float(ahead[1].norm())
        loss = solve(field, y0, end).square().sum()
        parts = torch.autograd.grad(loss, wanted, create_graph=derivative == "product")
        if derivative == "product":
            along = [one.detach().sin() for one in wanted]
            parts = torch.autograd.grad(parts, wanted, along)
        return float(sum(part.square().sum() for part in parts)) ** 0.5

    return Task(
        lambda: gradient(min(WARM_UP, steps) / steps), gradient,
        lambda: {"evaluations": calls[0], **facts()},
    )  # fmt: skip


def pnode_task(series: Series, steps: int) -> Task:
    """Return the task of pnode: the ledger and the plan are facts."""
    import torch

    import pnode

    folder = tempfile.TemporaryDirectory() if series.disk else None
    disk = None if folder is None else folder.name
    limits = {"memory": series.memory, "disk": disk, "store": series.store}
    solvers: list[Any] = []
    found: dict[str, Any] = {}

    def solve(field: Any, y0: Any, end: float) -> Any:
        if not solvers:
            solvers.append(
                pnode.Solver(
                    field, method="rk4", step_size=1 / steps,
                    checkpointing=pnode.Checkpointing(**limits),
                )
            )  # fmt: skip
        solution = solvers[0](y0, torch.tensor([0.0, end], dtype=torch.float64))
        found["stats"] = solution.stats
        return solution.ys[-1]

    def facts() -> dict[str, Any]:
        assert folder is None or folder.name
        stats = found["stats"]
        if series.derivative != "gradient":  # solves of a pair, too, whose plan is their own
            ledgers = (stats, stats.backward, stats.tangents)
            most = max(one.ram_bytes for one in ledgers)
            recomputed = sum(one.recomputed for one in ledgers)
            within = series.memory is None or most <= series.memory
            return {"recomputed": recomputed, "ram_bytes": most, "as_planned": within}
        plan = pnode.plan("rk4", steps, STATE_BYTES, **limits)
        ledger = {
            "recomputed": stats.backward.recomputed,
            "ram_bytes": max(stats.ram_bytes, stats.backward.ram_bytes),
            "disk_bytes": max(stats.disk_bytes, stats.backward.disk_bytes),
        }
        planned = {name: getattr(plan, name) for name in ledger}
        return {
            "taken": stats.steps, **ledger, "tape_bytes": stats.tape_bytes, "planned": planned,
            "as_planned": planned == ledger,
        }  # fmt: skip

    return torch_task(solve, facts, steps, series.derivative)


def torchdiffeq_task(series: Series, steps: int) -> Task:
    """Return the task of torchdiffeq, by backpropagation or by its continuous adjoint."""
    import torch
    import torchdiffeq

    function = torchdiffeq.odeint_adjoint if series.bounded else torchdiffeq.odeint

    def solve(field: Any, y0: Any, end: float) -> Any:
        times = torch.tensor([0.0, end], dtype=torch.float64)
        return function(field, y0, times, method="rk4", options={"step_size": 1 / steps})[-1]

    return torch_task(solve, dict, steps)


def diffrax_task(series: Series, steps: int) -> Task:
    """Return the task of diffrax, with as many checkpoints as it chooses itself."""
    import diffrax
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)

    class ClassicalRK4(diffrax.AbstractERK):
        tableau = diffrax.ButcherTableau(
            c=np.array([0.5, 0.5, 1.0]),
            b_sol=np.array([1.0, 2.0, 2.0, 1.0]) / 6,
            b_error=np.zeros(4),
            a_lower=(np.array([0.5]), np.array([0.0, 0.5]), np.array([0.0, 0.0, 1.0])),
        )
        interpolation_cls = diffrax.ThirdOrderHermitePolynomialInterpolation.from_k

        def order(self, terms: Any) -> int:
            return 4

    def field(t: Any, y: Any, weights: Any) -> Any:
        w1, b1, w2, b2 = weights
        return jnp.tanh(y @ w1.T + b1) @ w2.T + b2

    def loss(parts: Any, step_size: Any) -> Any:
        weights, y0 = parts
        solution = diffrax.diffeqsolve(
            diffrax.ODETerm(field), ClassicalRK4(), 0.0, 1.0, step_size, y0, weights,
            saveat=diffrax.SaveAt(t1=True), adjoint=diffrax.RecursiveCheckpointAdjoint(),
            max_steps=steps + 1,  # the last step may fall short of 1 by round-off
        )  # fmt: skip
        return jnp.sum(solution.ys[-1] ** 2), solution.stats["num_steps"]

    weights, start = network()
    parts = ([jnp.asarray(values) for values in weights], jnp.asarray(start))
    compiled = jax.jit(jax.grad(loss, has_aux=True))
    found = {}

    def gradient(step_size: float = 1 / steps) -> float:
        gradients, taken = jax.block_until_ready(compiled(parts, step_size))
        found["taken"] = int(taken)
        return float(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(gradients))) ** 0.5

    return Task(lambda: gradient(1 / min(WARM_UP, steps)), gradient, lambda: dict(found))


TASKS = {"pnode": pnode_task, "torchdiffeq": torchdiffeq_task, "diffrax": diffrax_task}


def measure(series: Series, steps: int, limit: int | None, repeats: int) -> dict[str, Any]:
    """Take the gradient and return what it took."""
    task = TASKS[series.package](series, steps)
    for _ in range(2):  # the second finds everything in place
        task.warm_up()
    memory = PeakMemory()
    if limit is not None and memory.source == "VmHWM":
        allowed = status("VmData") + limit
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    result: dict[str, Any] = {}
    while len(seconds) < repeats and sum(seconds) < ENOUGH:
        begin, cpu = time.perf_counter(), time.process_time()
        norm = task.gradient()
        seconds.append(time.perf_counter() - begin)
        cpu_seconds.append(time.process_time() - cpu)
        if len(seconds) == 1:
            result = {"peak_bytes": memory.above_base(), "gradient_norm": norm, **task.facts()}
    return {
        "counter": memory.source, **result,
        "seconds": statistics.median(seconds), "cpu_seconds": statistics.median(cpu_seconds),
    }  # fmt: skip


def main() -> int:
    """Measure once and print the result as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("series", choices=SERIES)
    parser.add_argument("steps", type=int)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    try:
        result = measure(
            SERIES[arguments.series], arguments.steps, arguments.limit, arguments.repeats
        )
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, MemoryError) and "llocat" not in str(error):
            raise
        return OVER_LIMIT
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""Learn Robertson's stiff chemical kinetics from 40 observations with a neural ODE.

Three species react, one slowly, one very fast and one fast::

    A      -> B        k1 = 0.04
    B + B  -> C + B    k2 = 3e7
    B + C  -> A + C    k3 = 1e4

and are observed at 40 times, evenly spaced in log(t) between 1e-5 and 100. A network f with 5
neurons a layer is to stand for the right-hand side: y' = f(y), starting from y(0) = (1, 0, 0),
shall pass through the observations. Run it (about two minutes with the peers) with::

    python examples/robertson.py

It prints a table and writes figure, table and numbers into the folder robertson.

**Why an implicit method.** Within a millisecond B reaches a balance between its creation and its
consumption, which from then on is restored some 2000 times a second, while A takes minutes to be
used up. An explicit method must follow the fast balance all the way, in steps of a millisecond;
Crank-Nicolson takes one step from observation to observation, up to 34 s long. See for yourself::

    python examples/robertson.py --method dopri5

**How the gradient comes about.** Every step solves a nonlinear system by Newton's method.
``loss.backward()`` does not differentiate through Newton's iterations: it solves one transposed
linear system a step, backwards in time. That is the discrete adjoint, and it is the exact
gradient of the numbers that the solver returned.

**Why it trains.** Three things matter, and all are taken from the data alone:

1. *Scales.* Each species is scaled to [0, 1], and its component of f is multiplied by the
   steepest slope in the data. So the network's outputs are of order one, although B moves ten
   thousand times as fast as A and C.
2. *A dissipative start.* The hidden layers begin as random rotations, nearly linear ones, and the
   output layer is fitted so that f(y) = -rate * (y - mean of the data): every species relaxes to
   its mean at its own rate. Trajectories of such a field stay bounded for any step size, and so
   do the gradients. With arbitrary weights they grow exponentially over 100 s.
3. *A warm-up of the learning rate.* Without it AdamW's first updates, whose sizes do not depend
   on the gradient's, can destroy that property at once.

Measured with pnode 0.2.0, diffrax 0.7.2 and torchdiffeq 0.2.5 on 2026-11-30, seed 0, 400 updates
(114 s of CPU in all, 40 of them for the peers); per sweep of 40 steps:

==============================  =======  ========
what                            forward  backward
==============================  =======  ========
evaluations of f                270      41
products with a Jacobian        0        80
Jacobians assembled             54       40
Newton iterations               215      0
scaled mean error at the end    2.3e-3
the same in 1/8 of the steps    2.5e-3
==============================  =======  ========

One gradient before training, CPU time relative to es325's 2.8 ms; errors are those against the
gradient of the exact solution, which the long steps of cn are not to follow:

=========================  ======  ====  =============
gradient by                error   CPU   first call, s
=========================  ======  ====  =============
pnode, es325, compiled     8.5e-8  1     0.29
pnode, cn, compiled        2.5e-3  0.82  0.41
pnode, cn                  2.5e-3  75    0.24
diffrax, Kvaerno3, jitted  2.6e-7  19    12.8
torchdiffeq, SciPy's BDF   fails
=========================  ======  ====  =============

(es325 and the peers at rtol = 1e-6. SciPy's solvers are the only stiff ones of torchdiffeq, with
the continuous adjoint, whose backward solve overflows; it takes 19 s to find out. pnode's machine
code was in its cache; without, es325's first call took 1.9 s.) So ``--compile`` is worth having
where it works.

What did not work: the last observations of A are missed by one hundredth, where the loss no longer
falls.

**Your own data.** ``--data file.csv`` reads a time column, strictly increasing, and one column
for each observed quantity, with or without a header; the first row is the initial state.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from gallery_common import Outcome, arguments, at_least, launch, measure, peer, plain, say
from gallery_physics import diffrax_gradient
from mpi4py import MPI
from observations import DataError, Observations, read_csv, refine, robertson_observations
from report import draw
from training import GaveUp, Training, train

import pnode

WARM_UP = 20  # iterations
FINAL_RATE = 0.01  # share of the peak learning rate
CLIP = 1.0  # longest gradient that AdamW gets to see
MAX_RECOVERIES = 8
RTOL, ATOL = 1e-6, 1e-8  # of the peers, and of pnode's bdf beside them
UNUSABLE = 1.0  # a scaled MAE above this is worse than any constant
FINE = 8  # steps per interval of the check on a finer grid
COUNTS = {
    "steps": "steps", "rejected": "rejected steps", "rhs": "evaluations of f",
    "jvp": "Jacobian-vector products", "vjp": "vector-Jacobian products",
    "jacobians": "assembled Jacobians", "newton": "Newton iterations",
    "krylov": "Krylov iterations",
}  # fmt: skip


# ------------------------------------------------------------------------------------ the model


class Kinetics(torch.nn.Module):
    """The vector field f(y) = rates * network(y), for scaled states.

    Parameters
    ----------
    rates : Tensor
        Scale of each component of f.
    rest : Tensor
        State to which the untrained field relaxes.
    seed : int
        Seed of the random rotations.
    width, maps : int
        Neurons in a hidden layer; number of linear maps, GELUs in between.
    """

    rates: torch.Tensor

    def __init__(
        self, rates: torch.Tensor, rest: torch.Tensor, seed: int, width: int = 5, maps: int = 7
    ) -> None:
        super().__init__()
        quantities = len(rates)
        # Fewer neurons than quantities could not pass the state on.
        sizes = [quantities, *[max(width, quantities + 2)] * (maps - 1), quantities]
        *hidden, self.output = (
            torch.nn.Linear(inputs, outputs, dtype=torch.float64)
            for inputs, outputs in pairwise(sizes)
        )
        self.hidden = torch.nn.ModuleList(hidden)
        self.register_buffer("rates", rates)
        self._initialise(rest, torch.Generator().manual_seed(seed))

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Evaluate f; the kinetics do not depend on the time."""
        for layer in self.hidden:
            y = torch.nn.functional.gelu(layer(y))
        scaled: torch.Tensor = self.rates * self.output(y)
        return scaled

    @torch.no_grad()
    def _initialise(self, rest: torch.Tensor, generator: torch.Generator) -> None:
        """Random rotations in the hidden layers; an output layer that relaxes to ``rest``."""
        states = torch.rand(512, len(rest), generator=generator, dtype=torch.float64) * 1.2 - 0.1
        signal = states
        for layer in self.hidden:
            weight, bias = layer.parameters()
            torch.nn.init.orthogonal_(weight, generator=generator)
            signal = signal @ weight.T
            # Centred on 1, the arguments lie where GELU is nearly linear.
            bias.copy_(1.0 - signal.mean(0))
            signal = torch.nn.functional.gelu(signal + bias)
        inputs = torch.cat([signal, torch.ones(len(states), 1, dtype=torch.float64)], dim=1)
        fitted = torch.linalg.lstsq(inputs, rest - states).solution
        self.output.weight.copy_(fitted[:-1].T)
        self.output.bias.copy_(fitted[-1])


def row_of(method: str) -> Any:
    """Return pnode's row of a method, None if it has none of this name."""
    return next((row for row in pnode.methods() if method in (row.name, *row.aliases)), None)


def is_explicit(method: str) -> bool:
    """Whether pnode lists the method as an explicit one."""
    row = row_of(method)
    return row is not None and row.kind == "explicit"


def make_solver(
    kinetics: Kinetics,
    observations: Observations,
    method: str,
    max_steps: int,
    compiled: bool = False,
) -> pnode.Solver:
    """One step per interval for an implicit method; an explicit one chooses its steps if it can."""
    adaptive = is_explicit(method) and row_of(method).adaptive
    longest = float(observations.times.diff().max())
    return pnode.Solver(
        kinetics,
        method=method,
        # One step from each output time to the next: no interval is longer than this.
        step_size=None if adaptive else 2.0 * longest,
        max_steps=max_steps if adaptive else None,
        jacobian="auto" if is_explicit(method) else "dense",
        compile=compiled,
    )


# --------------------------------------------------------------------------------- the training


@dataclass
class Result:
    """What a run found, and what it cost.

    Attributes
    ----------
    training : Training
        Losses and gradient norms, one per iteration; NaN where a solve failed.
    mae : float
        Mean absolute error of the scaled states, with the best weights; NaN if no solve succeeded.
    fine_mae : float
        The same, with the learned equations solved in smaller steps than in training.
    stats : list of pnode.Stats
        Of the solves of this training, without those before an interruption.
    explanation : str or None
        Why the run failed, in one sentence.
    last_seconds : float
        Of the last solve.
    learned : Tensor or None
        Scaled states on a grid that cuts each interval into equal parts, with the best weights.
    """

    method: str
    training: Training = field(default_factory=Training)
    mae: float = math.nan
    fine_mae: float = math.nan
    stats: list[pnode.Stats] = field(default_factory=list)
    explanation: str | None = None
    last_seconds: float = 0.0
    learned: torch.Tensor | None = None

    @property
    def iterations(self) -> int:
        """Iterations that were completed."""
        return sum(math.isfinite(norm) for norm in self.training.norms)

    def counts(self, backward: bool) -> dict[str, int]:
        """Return sums over all solves, of the forward or the backward sweeps."""
        stats = [each.backward if backward else each for each in self.stats]
        return {name: sum(getattr(each, name) for each in stats) for name in COUNTS}


def learning_rate(iteration: int, iterations: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    warm_up = min(WARM_UP, iterations / 2)
    if iteration < warm_up:
        return peak * (iteration + 1) / (warm_up + 1)
    wave = 0.5 * (1.0 + math.cos(math.pi * (iteration - warm_up) / (iterations - warm_up)))
    return peak * (FINAL_RATE + (1.0 - FINAL_RATE) * wave)


def scaled_mae(solver: pnode.Solver, observations: Observations, result: Result) -> torch.Tensor:
    """Solve from observation to observation; return the loss."""
    data, begin = observations.scaled, time.perf_counter()
    try:
        solution = solver(data[0], observations.times)
    finally:
        result.last_seconds = time.perf_counter() - begin
    result.stats.append(solution.stats)
    return (solution.ys[1:] - data[1:]).abs().mean()


def fit(
    solver: pnode.Solver, kinetics: Kinetics, observations: Observations, result: Result,
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Fit the kinetics to the observations; they end with the best weights that were seen."""
    share = partial(learning_rate, iterations=options.iterations, peak=1.0)
    try:
        result.training = train(
            kinetics, lambda: scaled_mae(solver, observations, result), options,
            optimizer=partial(torch.optim.AdamW, lr=options.lr),
            schedule=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, share),
            clip=CLIP, recover=MAX_RECOVERIES,
        )  # fmt: skip
    except GaveUp as end:
        result.training, why = end.training, end.__cause__
        assert why is not None
        result.explanation = explain(why, result.method, observations, result.last_seconds)


def explain(
    error: BaseException, method: str, observations: Observations, seconds: float = math.nan
) -> str:
    """Say in one sentence why training stopped."""
    if not is_explicit(method):
        return f"Training stopped: {error}"
    intervals = len(observations.times) - 1
    start, end = float(observations.times[0]), float(observations.times[-1])
    remedy = f"an implicit method (--method cn) takes one step per interval, {intervals} in all."
    if isinstance(error, (pnode.StepLimitReached, pnode.StepSizeUnderflow)):
        steps, reached = error.step or 0, error.time if error.time is not None else start
        share = max((reached - start) / (end - start), 1e-12)
        return (
            f"{method} is explicit, so stability keeps its steps near "
            f"{(reached - start) / max(steps, 1):.1e} however smooth the solution is: "
            f"{steps} steps ({seconds:.1f} s) led to t = {reached:.3g} of {end:g}, so that one "
            f"solve would take about {steps / share:,.0f} steps ({seconds / share:.0f} s), "
            f"while {remedy}"
        )
    return (
        f"{method} is explicit, and steps as long as the intervals are far beyond its stability "
        f"limit, so the solution blows up ({error}), while {remedy}"
    )


def evaluate(
    solver: pnode.Solver, observations: Observations, substeps: int
) -> tuple[float, torch.Tensor]:
    """Solve with ``substeps`` output times per interval; return the scaled MAE and all states."""
    data = observations.scaled
    with torch.no_grad():
        states = solver(data[0], refine(observations.times, substeps)).ys
    return float((states[substeps::substeps] - data[1:]).abs().mean()), states


# -------------------------------------------------------------------------------------- the peers


def by_diffrax(kinetics: Kinetics, observations: Observations) -> Any:
    """Return a function that computes the loss's gradient by diffrax; None where it is missing."""
    data, layers = observations.scaled.numpy(), len(kinetics.hidden)

    def field(jax: Any, y: Any, w: Any) -> Any:
        for name in (f"hidden.{index}" for index in range(layers)):
            y = jax.nn.gelu(w[f"{name}.weight"] @ y + w[f"{name}.bias"], approximate=False)
        return kinetics.rates.numpy() * (w["output.weight"] @ y + w["output.bias"])

    return diffrax_gradient(
        field, kinetics, observations.scaled[:1], observations.times,
        lambda states: abs(states[0, 1:] - data[1:]).mean(), rtol=RTOL, atol=ATOL,
    )  # fmt: skip


def gradients(options: argparse.Namespace, observations: Observations) -> list[dict[str, Any]]:
    """Measure one gradient of the loss before training, by pnode and its peers."""
    kinetics = Kinetics(observations.rates, observations.scaled[1:].mean(0), options.seed)
    data, times = observations.scaled, observations.times

    def by(solve: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
        loss = (solve(data[0], times)[1:] - data[1:]).abs().mean()
        found = torch.autograd.grad(loss, list(kinetics.parameters()))
        return torch.cat([part.reshape(-1) for part in found])

    def by_pnode(solver: pnode.Solver) -> Callable[[], torch.Tensor]:
        return lambda: by(lambda y0, t: solver(y0, t).ys)

    def adaptive(share: float = 1.0) -> Callable[[], torch.Tensor]:
        rtol, atol = share * RTOL, share * ATOL
        return by_pnode(pnode.Solver(kinetics, method="es325", compile=True, rtol=rtol, atol=atol))

    method, most = options.method, options.max_steps
    ways: dict[str, Callable[[], torch.Tensor] | None] = {
        f"pnode, {method}": by_pnode(make_solver(kinetics, observations, method, most)),
        f"pnode, {method}, compiled": by_pnode(
            make_solver(kinetics, observations, method, most, True)
        ),
        "pnode, es325, compiled": adaptive(),
        "diffrax, Kvaerno3": by_diffrax(kinetics, observations),
    }
    package = peer("torchdiffeq")
    if package is not None:  # whose only stiff solvers are SciPy's, by the continuous adjoint
        ways["torchdiffeq, SciPy's BDF"] = lambda: by(
            lambda y0, t: package.odeint_adjoint(
                kinetics, y0, t, rtol=RTOL, atol=ATOL, method="scipy_solver",
                options={"solver": "BDF"},
            )
        )  # fmt: skip
    exact, rows = adaptive(1e-3)(), list[dict[str, Any]]()
    for name, call in ways.items():
        if call is None:
            continue
        row: dict[str, Any] = {"what": f"gradient, {name}"}
        rows.append(row)
        try:
            first = measure(call)
            measured = measure(call, 3)
        except ValueError as error:  # of SciPy's, of a backward solve that overflows
            row["failed"] = str(error)
            continue
        row |= {
            "error": float((measured.value - exact).norm() / exact.norm()),
            "CPU ms": 1e3 * measured.cpu_seconds, "first, s": first.cpu_seconds,
            "MiB": measured.peak_mib,
        }  # fmt: skip
    return rows


# ---------------------------------------------------------------------------------- the program


def learn(options: argparse.Namespace, observations: Observations) -> Result:
    """Train and evaluate."""
    method = options.method
    kinetics = Kinetics(observations.rates, observations.scaled[1:].mean(0), options.seed)
    solver = make_solver(kinetics, observations, method, options.max_steps, options.compile)
    result = Result(method)
    fit(solver, kinetics, observations, result, options)
    if not result.iterations:
        return result
    result.mae, result.learned = evaluate(solver, observations, 1)
    try:
        result.fine_mae, result.learned = evaluate(solver, observations, FINE)
    except pnode.SolveError:
        pass  # an adaptive method may need more steps than allowed; the figure is coarser then
    if is_explicit(method) and result.mae > UNUSABLE:
        largest = max(norm for norm in result.training.norms if math.isfinite(norm))
        blown_up = FloatingPointError(
            f"the scaled MAE stays at {result.mae:.3g}, with gradient norms up to {largest:.1e}"
        )
        result.explanation = explain(blown_up, method, observations)
    return result


def run(options: argparse.Namespace, observations: Observations, results: list[Result]) -> Outcome:
    """Learn, and lay out what was found; the result is added to ``results``."""
    result = learn(options, observations)
    results.append(result)
    training, title = result.training, observations.title
    say(MPI.COMM_WORLD, f"{title}: method {options.method}, seed {options.seed}")
    forward, backward = result.counts(False), result.counts(True)
    norms = [norm for norm in training.norms if math.isfinite(norm)]
    numbers = {
        "title": title, "method": options.method, "seed": options.seed, "mae": result.mae,
        "fine_mae": result.fine_mae, "iterations": result.iterations, "losses": training.losses,
        "gradient_norms": training.norms, "forward": forward, "backward": backward,
        "recoveries": training.recoveries, "explanation": result.explanation,
        "training_seconds": training.seconds,
    }  # fmt: skip
    found = {
        "final scaled MAE": result.mae, f"the same in 1/{FINE} of the steps": result.fine_mae,
        "iterations": result.iterations, "failed solves": training.recoveries,
        "largest gradient norm": max(norms, default=None),
        "wall time of training (s)": training.seconds,
    }  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"what": name, "value": plain(value)} for name, value in found.items()
    ]
    sweeps = max(1, len(result.stats))
    rows += [
        {
            "what": name, "forward": forward[key], "a sweep": forward[key] / sweeps,
            "backward": backward[key], "one back": backward[key] / sweeps,
        }
        for key, name in COUNTS.items()
    ]  # fmt: skip
    learned = result.learned
    if learned is None:
        return Outcome(numbers, rows)
    if not (options.quick or is_explicit(options.method)) and find_spec("diffrax") is not None:
        rows += gradients(options, observations)
    shown = f"{title}, learned with {options.method}: scaled MAE {result.mae:.4f}"
    return Outcome(
        numbers, rows, lambda: draw(observations, learned, training.losses, shown)
    )  # fmt: skip


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""

    def options(parser: argparse.ArgumentParser) -> None:
        add, smallest = parser.add_argument, sys.float_info.min
        add("--method", default="cn", help="any method of pnode (cn); dopri5 shows why not")
        add("--lr", type=at_least(float, smallest), default=0.02, help="peak learning rate (0.02)")
        add(
            "--max-steps",
            type=at_least(int, 1),
            default=2000,
            help="most steps in one solve, for explicit methods that choose their steps (2000)",
        )
        add("--data", metavar="FILE.csv", help="time, then one column per quantity")
        add("--compile", action="store_true", help="compile the solves (see docs/compile.md)")

    quick = {"iterations": 40}
    return arguments("robertson", __doc__, argv, iterations=400, quick=quick, add=options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    options, results = parse(argv), list[Result]()
    try:
        data = read_csv(Path(options.data)) if options.data else robertson_observations()
    except DataError as error:
        print(f"robertson.py: error: {error}", file=sys.stderr)
        return 2
    code = launch(options, partial(run, observations=data, results=results))
    explanation = results[0].explanation if results else None
    if explanation is not None:
        print(f"\n{explanation}")
    return code or int(explanation is not None and not is_explicit(options.method))


if __name__ == "__main__":
    sys.exit(main())

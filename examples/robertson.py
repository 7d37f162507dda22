"""Learn Robertson's stiff chemical kinetics from 40 observations with a neural ODE.

Three species react, one slowly, one very fast and one fast::

    A      -> B        k1 = 0.04
    B + B  -> C + B    k2 = 3e7
    B + C  -> A + C    k3 = 1e4

and are observed at 40 times, evenly spaced in log(t) between 1e-5 and 100. A network f with 5
neurons a layer is to stand for the right-hand side: y' = f(y), starting from y(0) = (1, 0, 0),
shall pass through the observations. Run it (about a minute) with::

    python examples/robertson.py

It prints a table and writes robertson.png and robertson.json.

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

**Your own data.** ``--data file.csv`` reads a time column, strictly increasing, and one column
for each observed quantity, with or without a header; the first row is the initial state.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import torch
from common import at_least
from observations import DataError, Observations, read_csv, refine, robertson_observations
from report import COUNTS, FINE, plot, table, write_json
from tqdm import tqdm

import pnode

WARM_UP = 20  # iterations
FINAL_RATE = 0.01  # share of the peak learning rate
CLIP = 1.0  # longest gradient that AdamW gets to see
MAX_RECOVERIES = 8
UNUSABLE = 1.0  # a scaled MAE above this is worse than any constant


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


def is_explicit(method: str) -> bool:
    """Whether pnode lists the method as an explicit one."""
    rows = (row for row in pnode.methods() if method in (row.name, *row.aliases))
    return any(row.kind == "explicit" for row in rows)


def can_adapt(method: str) -> bool:
    """Whether pnode lists the method as one that chooses its steps."""
    rows = (row for row in pnode.methods() if method in (row.name, *row.aliases))
    return any(row.adaptive for row in rows)


def make_solver(
    kinetics: Kinetics,
    observations: Observations,
    method: str,
    max_steps: int,
    compiled: bool = False,
) -> pnode.Solver:
    """One step per interval for an implicit method; an explicit one chooses its steps if it can."""
    adaptive = is_explicit(method) and can_adapt(method)
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
    mae : float
        Mean absolute error of the scaled states, with the best weights; NaN if no solve succeeded.
    fine_mae : float
        The same, with the learned equations solved in smaller steps than in training.
    losses, gradient_norms : list of float
        One per iteration; NaN where a solve failed.
    forward, backward : dict of str to int
        Sums of ``solution.stats`` and ``solution.stats.backward`` over the iterations.
    recoveries : int
        How often a solve failed and training went back to the best weights.
    explanation : str or None
        Why the run failed, in one sentence.
    seconds : float
        Wall time of the training.
    learned : Tensor or None
        Scaled states on a grid that cuts each interval into equal parts, with the best weights.
    """

    method: str
    seed: int
    mae: float = math.nan
    fine_mae: float = math.nan
    losses: list[float] = field(default_factory=list)
    gradient_norms: list[float] = field(default_factory=list)
    forward: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    backward: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    recoveries: int = 0
    explanation: str | None = None
    seconds: float = 0.0
    learned: torch.Tensor | None = None

    @property
    def iterations(self) -> int:
        """Iterations that were completed."""
        return sum(math.isfinite(norm) for norm in self.gradient_norms)

    def count(self, stats: pnode.Stats) -> None:
        """Add what one iteration cost."""
        for name in COUNTS:
            self.forward[name] += getattr(stats, name)
            self.backward[name] += getattr(stats.backward, name)


class Unstable(Exception):
    """The loss or its gradient is not finite."""


def learning_rate(iteration: int, iterations: int, peak: float) -> float:
    """Linear warm-up, then half a cosine down to a hundredth of the peak."""
    warm_up = min(WARM_UP, iterations / 2)
    if iteration < warm_up:
        return peak * (iteration + 1) / (warm_up + 1)
    wave = 0.5 * (1.0 + math.cos(math.pi * (iteration - warm_up) / (iterations - warm_up)))
    return peak * (FINAL_RATE + (1.0 - FINAL_RATE) * wave)


def train(
    solver: pnode.Solver,
    kinetics: Kinetics,
    observations: Observations,
    result: Result,
    iterations: int,
    peak: float,
    quiet: bool = False,
) -> None:
    """Fit the kinetics to the observations; they end with the best weights that were seen."""
    best_loss, best = math.inf, deepcopy(kinetics.state_dict())
    optimizer = torch.optim.AdamW(kinetics.parameters())
    begin = time.perf_counter()
    progress = tqdm(range(iterations), desc="training", disable=quiet, mininterval=0.2)
    for iteration in progress:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(iteration, iterations, peak)
        loss = norm = math.nan
        solve_begin = time.perf_counter()
        try:
            loss, norm = loss_and_gradient(solver, kinetics, observations, result)
        except (pnode.SolveError, Unstable) as error:
            result.recoveries += 1
            if best_loss == math.inf or result.recoveries > MAX_RECOVERIES:
                elapsed = time.perf_counter() - solve_begin
                result.explanation = explain(error, result.method, observations, elapsed)
        result.losses.append(loss)
        result.gradient_norms.append(norm)
        if result.explanation is not None:
            break
        if math.isnan(norm):  # the last update spoiled the field: go back, go on more slowly
            kinetics.load_state_dict(best)
            optimizer, peak = torch.optim.AdamW(kinetics.parameters()), 0.5 * peak
            continue
        if loss < best_loss:
            best_loss, best = loss, deepcopy(kinetics.state_dict())
        optimizer.step()
        progress.set_postfix(loss=f"{loss:.4f}", gradient=f"{norm:.2e}", refresh=False)
    progress.close()
    kinetics.load_state_dict(best)
    result.seconds = time.perf_counter() - begin


def loss_and_gradient(
    solver: pnode.Solver, kinetics: Kinetics, observations: Observations, result: Result
) -> tuple[float, float]:
    """Solve forward, go back with the adjoint, and clip the gradient; return loss and norm."""
    data = observations.scaled
    kinetics.zero_grad()
    solution = solver(data[0], observations.times)
    loss = (solution.ys[1:] - data[1:]).abs().mean()
    loss.backward()
    result.count(solution.stats)
    value = loss.item()
    norm = float(torch.nn.utils.clip_grad_norm_(kinetics.parameters(), CLIP))
    if not (math.isfinite(value) and math.isfinite(norm)):
        raise Unstable(f"the loss is {value:.1e} and its gradient has the norm {norm:.1e}")
    return value, norm


def explain(
    error: Exception, method: str, observations: Observations, seconds: float = math.nan
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


# ---------------------------------------------------------------------------------- the program


def run(
    observations: Observations | None = None,
    *,
    method: str = "cn",
    seed: int = 0,
    iterations: int = 400,
    lr: float = 0.02,
    max_steps: int = 2000,
    compiled: bool = False,
    quiet: bool = True,
) -> Result:
    """Train and evaluate.

    Parameters
    ----------
    observations : Observations, optional
        What to learn; Robertson's kinetics by default.
    method, seed, iterations, lr, max_steps, compiled, quiet
        As on the command line; ``lr`` is the peak learning rate.

    Returns
    -------
    Result
        The error reached and the counts.
    """
    observations = observations if observations is not None else robertson_observations()
    kinetics = Kinetics(observations.rates, observations.scaled[1:].mean(0), seed)
    solver = make_solver(kinetics, observations, method, max_steps, compiled)
    result = Result(method=method, seed=seed)
    train(solver, kinetics, observations, result, iterations, lr, quiet)
    if not result.iterations:
        return result
    result.mae, result.learned = evaluate(solver, observations, 1)
    try:
        result.fine_mae, result.learned = evaluate(solver, observations, FINE)
    except pnode.SolveError:
        pass  # an adaptive method may need more steps than allowed; the figure is coarser then
    if is_explicit(method) and result.mae > UNUSABLE:
        largest = max(norm for norm in result.gradient_norms if math.isfinite(norm))
        blown_up = Unstable(
            f"the scaled MAE stays at {result.mae:.3g}, with gradient norms up to {largest:.1e}"
        )
        result.explanation = explain(blown_up, method, observations)
    return result


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="robertson.py",
        description="Learn stiff kinetics from data: a neural ODE, Crank-Nicolson and the "
        "discrete adjoint.",
    )
    add = parser.add_argument
    smallest = sys.float_info.min
    add("--method", default="cn", help="any method of pnode (cn); dopri5 shows why not")
    add("--seed", type=at_least(int, 0), default=0, help="seed of the initial weights (0)")
    add("--iterations", type=at_least(int, 1), default=400, help="updates of the weights (400)")
    add("--lr", type=at_least(float, smallest), default=0.02, help="peak learning rate (0.02)")
    add(
        "--max-steps",
        type=at_least(int, 1),
        default=2000,
        help="most steps in one solve, for explicit methods that choose their steps (2000)",
    )
    add("--data", type=Path, metavar="FILE.csv", help="time, then one column per quantity")
    add(
        "--output",
        type=Path,
        default=Path("robertson"),
        metavar="PREFIX",
        help="write PREFIX.png and PREFIX.json (robertson)",
    )
    add("--compile", action="store_true", help="compile the solves (see docs/compile.md)")
    add("--no-plot", action="store_true", help="write no figure")
    add("--quiet", action="store_true", help="show no progress bar")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    options = parse(argv)
    torch.set_num_threads(1)  # the maps are 5 by 5: more threads would be in each other's way
    try:
        observations = read_csv(options.data) if options.data else robertson_observations()
        png, report = output_files(options.output, figure=not options.no_plot)
        result = run(
            observations,
            method=options.method,
            seed=options.seed,
            iterations=options.iterations,
            lr=options.lr,
            max_steps=options.max_steps,
            compiled=options.compile,
            quiet=options.quiet,
        )
        write_json(result, observations, report)
        written = [report]
        if png is not None and result.learned is not None:
            plot(result, observations, result.learned, png)
            written.insert(0, png)
    except (DataError, pnode.ConfigurationError, OSError) as error:
        print(f"robertson.py: error: {error}", file=sys.stderr)
        return 2
    print(table(result, observations))
    if result.explanation is not None:
        print(f"\n{result.explanation}")
    print("\nwrote " + " and ".join(map(str, written)))
    return 0 if result.explanation is None or is_explicit(options.method) else 1


def output_files(prefix: Path, figure: bool) -> tuple[Path | None, Path]:
    """Name the figure and the JSON file, and make sure before the training that both can be."""
    if prefix.is_dir():
        prefix = prefix / "robertson"
    report = prefix.with_name(prefix.name + ".json")
    report.parent.mkdir(parents=True, exist_ok=True)
    report.touch()
    if not figure:
        return None, report
    if find_spec("matplotlib") is None:
        raise OSError("the figure needs matplotlib: install it, or give --no-plot")
    return prefix.with_name(prefix.name + ".png"), report


if __name__ == "__main__":
    sys.exit(main())

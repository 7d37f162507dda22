"""Digits classified by ODE blocks: memory and work of every way to the gradient.

A convolution lifts 8 x 8 images to 8 channels; two ODE blocks, y' = conv(tanh(conv(y))) from t = 0
to 1, follow, the second on 4 x 4 pixels; then a linear layer. This is the classifier of ANODE
(A. Gholami, K. Keutzer & G. Biros, 2019), ACA (J. Zhuang et al., 2020) and PNODE (H. Zhang &
W. Zhao, 2022), small enough for the digits that scikit-learn brings along (1797 images, 8 x 8
pixels, of E. Alpaydin & C. Kaynak, 1998). Batches of 64, float64: a state of the first block has
0.25 MiB.

Run it (about three minutes on one core)::

    python examples/digits.py

Measured with pnode 0.2.0 on 2026-11-30, seed 0 (172 s of CPU in all), one gradient with rk4, 8 and
32 steps a block. MiB is the peak of what malloc had handed out in a first call (some 3 MiB of
pnode's are work vectors), f how often the two fields are evaluated; each gradient also takes 64 or
256 products. "Error" is the relative difference from backpropagation's gradient. CPU times are of
single calls, on a computer so busy that a third apart means nothing.

============================  =====  ====  =====  ======  ====  ======  =====
gradient by                   MiB 8  f 8   CPU 8  MiB 32  f 32  CPU 32  error
============================  =====  ====  =====  ======  ====  ======  =====
backpropagation               21.3   64    0.41   83.9    256   1.24    0
checkpoint per block (ANODE)  18.9   128   0.51   68.6    512   1.63    0
checkpoint per step (ACA)     6.5    128   0.43   13.7    512   1.86    0
NODE-continuous               14.4   128   0.51   14.4    512   1.82    1e-8
pnode, tape                   24.7   64    0.41   85.6    256   1.58    7e-16
pnode, stages                 14.3   128   0.46   44.4    512   2.14    7e-16
pnode, segments               10.1   128   0.68   13.0    512   2.39    7e-16
pnode, starts of steps        9.2    128   0.61   15.3    512   1.63    7e-16
pnode, 20 states              11.2   144   0.70   12.9    744   2.65    7e-16
pnode, 9 states               8.5    184   0.71   8.5     960   3.02    7e-16
============================  =====  ====  =====  ======  ====  ======  =====

The continuous adjoint's gradient is off by 1.2 % with Euler's method and 8 steps. After
80 updates, 95.0 % of the 360 digits that were not learned from are classified correctly, trained by
pnode or by the continuous adjoint alike, and with other methods in place of the four steps of rk4
that were trained with: 94.7 % by cn in 4 steps, 93.9 % by Euler's in 2, 95.0 % by dopri5 in 2 or 8.

What did not work: to be below all others everywhere. A checkpoint before each step, written out in
torch, repeats a step with all its graphs. pnode does so too where its budget has room for them:
with the starts of all steps (``store="solutions"``) it evaluates f as often as this peer. A budget
that has no room for graphs evaluates f once to repeat a step and once more for each product, 744
times where 512 are enough. Segments that torch keeps the starts of, each solved by pnode with all
its graphs, need no more evaluations either; the earlier ones are longer, as fewer starts are kept
while they are repeated. With 32 steps this takes less memory than a checkpoint per step. With 8
it does not: 3 MiB of it all are work vectors, PETSc's solution and a copy of it, two stages and one
for each slope, and in the adjoint of a step three more; those of the other block are held, too, a
quarter as large; outputs and their cotangents, at both times, are another 1 MiB. So the smallest
budget, 4 states, takes 7.3 MiB and 352 evaluations. Beyond 32 steps this peer's memory grows on,
and that of pnode's budgets does not. Without a limit pnode takes the memory and the time of
backpropagation.
(torch's checkpoints stop a repeated evaluation once they have all they need, which for the last
stage is before its second convolution.)
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gallery_common import (
    Measured,
    Outcome,
    UsageError,
    arguments,
    at_least,
    figure,
    launch,
    measure,
    peer,
    train,
)
from torch.utils.checkpoint import checkpoint

import pnode

CHANNELS, BATCH = 8, 64
TRAINED = 1437  # images; the other 360 are for the test
SPAN = torch.tensor([0.0, 1.0], dtype=torch.float64)
Solve = Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]

# Coefficients of the methods as pnode has them, for the peers that are written out in torch.
TABLEAUS: dict[str, tuple[tuple[tuple[float, ...], ...], tuple[float, ...]]] = {
    "euler": (((),), (1,)),
    "midpoint": (((), (1 / 2,)), (0, 1)),
    "bosh3": (((), (1 / 2,), (0, 3 / 4)), (2 / 9, 1 / 3, 4 / 9)),
    "rk4": (((), (1 / 2,), (0, 1 / 2), (0, 0, 1)), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
    "dopri5": (
        (
            (),
            (1 / 5,),
            (3 / 40, 9 / 40),
            (44 / 45, -56 / 15, 32 / 9),
            (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
            (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
        ),
        (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
    ),
}


# ------------------------------------------------------------------------------------- the model


class Field(torch.nn.Module):
    """y' = conv(tanh(conv(y))), the same at all times."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(channels, channels, 3, padding=1, dtype=torch.float64)
        self.second = torch.nn.Conv2d(channels, channels, 3, padding=1, dtype=torch.float64)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(torch.tanh(self.first(y)))
        return result


class Classifier(torch.nn.Module):
    """Two ODE blocks between convolutions; ``solve`` takes a state through a block."""

    def __init__(self, channels: int, solve: Callable[[Field], Solve]) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(1, channels, 3, padding=1, dtype=torch.float64)
        self.down = torch.nn.Conv2d(channels, channels, 2, stride=2, dtype=torch.float64)
        self.head = torch.nn.Linear(16 * channels, 10, dtype=torch.float64)
        self.fields = torch.nn.ModuleList([Field(channels), Field(channels)])
        self.solve_by(solve)

    def solve_by(self, solve: Callable[[Field], Solve]) -> None:
        """Take another way through the blocks."""
        self.solves = [solve(field) for field in self.fields if isinstance(field, Field)]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        y = self.solves[0](self.fields[0], torch.tanh(self.stem(images)))
        y = self.solves[1](self.fields[1], torch.tanh(self.down(y)))
        scores: torch.Tensor = self.head(y.flatten(1))
        return scores


def rk_step(field: torch.nn.Module, y: torch.Tensor, h: float, method: str) -> torch.Tensor:
    """One step of a Runge-Kutta method, for autograd."""
    slopes: list[torch.Tensor] = []
    rows, weights = TABLEAUS[method]
    for row in rows:
        stage = y
        for a, slope in zip(row, slopes, strict=True):
            if a:
                stage = stage + (h * a) * slope
        slopes.append(field(None, stage))
    for weight, slope in zip(weights, slopes, strict=True):
        if weight:
            y = y + (h * weight) * slope
    return y


def in_torch(method: str, steps: int, where: str) -> Callable[[Field], Solve]:
    """Return a solve by plain torch; checkpoints before each ``where``: block, step or nothing."""

    def step(field: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
        return rk_step(field, y, 1 / steps, method)

    def solve(field: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
        for _ in range(steps):
            if where == "step":
                y = checkpoint(step, field, y, use_reentrant=False)
            else:
                y = step(field, y)
        return y

    def block(field: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = checkpoint(solve, field, y, use_reentrant=False)
        return found

    return lambda field: block if where == "block" else solve


def by_pnode(
    method: str, steps: int, states: int | None = None, store: str = "auto", **more: Any
) -> Callable[[Field], Solve]:
    """Return a solve by pnode, whose checkpoints may hold as much as so many states."""

    def make(field: Field) -> Solve:
        solvers: list[pnode.Solver] = []
        keywords: dict[str, Any] = {
            "method": method,
            "step_size": 1 / steps,
            "compile": False,
            **more,
        }

        def solve(_: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
            if not solvers:
                if states is not None:
                    keywords["checkpointing"] = pnode.Checkpointing(states * y.nbytes, store=store)
                solvers.append(pnode.Solver(field, **keywords))
            return solvers[0](y, SPAN).ys[-1]

        return solve

    return make


def in_segments(method: str, steps: int) -> Callable[[Field], Solve]:
    """Return a solve by pnode in segments, which are repeated with the graphs of all their steps.

    torch keeps the start of each, and f does not depend on the time.
    """
    lengths = segments(steps, 2 * len(TABLEAUS[method][0]) + 1)  # f keeps two states

    def make(field: Field) -> Solve:
        solver = pnode.Solver(
            field, method=method, step_size=1 / steps, compile=False,
            checkpointing=pnode.Checkpointing(store="tape"),
        )  # fmt: skip

        def segment(y: torch.Tensor, length: int) -> torch.Tensor:
            # A copy, as the output lies beside the start, which would be kept too.
            return solver(y, SPAN * (length / steps)).ys[-1].clone()

        def solve(_: torch.nn.Module, y: torch.Tensor) -> torch.Tensor:
            for length in lengths:
                y = checkpoint(segment, y, length, use_reentrant=True)
            return y

        return solve

    return make


def segments(steps: int, graph: int) -> list[int]:
    """Return lengths of segments for the least memory, a step's graphs taking so many states.

    While one is repeated the starts of those before it are kept, so that it may be the longer the
    earlier it is.
    """
    most = graph  # states
    found: list[int] = []
    while sum(found) < steps:
        most, found = most + 1, []
        while sum(found) < steps and (length := (most - 1 - len(found)) // graph):
            found.append(min(length, steps - sum(found)))
    return found


# ---------------------------------------------------------------------------------- measurements

WAYS: dict[str, Callable[[str, int], Callable[[Field], Solve]]] = {
    "backpropagation": lambda method, steps: in_torch(method, steps, ""),
    "checkpoint per block (ANODE)": lambda method, steps: in_torch(method, steps, "block"),
    "checkpoint per step (ACA)": lambda method, steps: in_torch(method, steps, "step"),
    "NODE-continuous": lambda method, steps: by_pnode(method, steps, gradient="continuous"),
    "pnode, tape": lambda method, steps: by_pnode(
        method, steps, checkpointing=pnode.Checkpointing(store="tape")
    ),
    "pnode, stages": lambda method, steps: by_pnode(
        method, steps, checkpointing=pnode.Checkpointing(store="stages")
    ),
    "pnode, segments": in_segments,
    "pnode, starts of steps": lambda method, steps: by_pnode(
        method, steps, steps + 14, "solutions"
    ),
    "pnode, 20 states": lambda method, steps: by_pnode(method, steps, 20),
    "pnode, 9 states": lambda method, steps: by_pnode(method, steps, 9),
}
FEW = ("backpropagation", "checkpoint per step (ACA)", "NODE-continuous", "pnode, 9 states")


def gradient(
    make: Callable[[Field], Solve], images: torch.Tensor, labels: torch.Tensor, channels: int
) -> tuple[Measured, torch.Tensor, int]:
    """Return what a gradient takes, all its entries, and how often the fields are evaluated."""
    torch.manual_seed(0)
    model = Classifier(channels, make)
    calls = [0]
    for field in model.fields:
        # Before it: torch's checkpoints stop a repeated evaluation when they have all they need.
        field.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))

    def call() -> int:
        model.zero_grad()
        calls[0] = 0
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        return calls[0]

    measured = measure(call, in_use=True)
    parts = [
        parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None
    ]
    return measured, torch.cat(parts), measured.value


def compare(
    cases: Sequence[tuple[str, int, Sequence[str]]],
    images: torch.Tensor,
    labels: torch.Tensor,
    channels: int,
) -> list[dict[str, Any]]:
    """Return a row for each method, number of steps and way."""
    rows: list[dict[str, Any]] = []
    gradient(by_pnode("euler", 1), images, labels, channels)  # sets up what all need
    for method, steps, ways in cases:
        expected: torch.Tensor | None = None
        for name in ways:
            measured, found, evaluations = gradient(
                WAYS[name](method, steps), images, labels, channels
            )
            expected = found if expected is None else expected
            rows.append({
                "gradient by": name, "method": method, "steps": steps,
                "MiB": measured.peak_mib, "evaluations": evaluations,
                "CPU s": measured.cpu_seconds,
                "difference": float((found - expected).norm() / expected.norm()),
            })  # fmt: skip
    return rows


# --------------------------------------------------------------------------------- the training


def data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return scikit-learn's images, between 0 and 1, and labels, in an order that is mixed."""
    sklearn = peer("sklearn.datasets")
    if sklearn is None:
        raise UsageError("the digits come with scikit-learn: pip install scikit-learn")
    images, labels = sklearn.load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    tensor = torch.from_numpy(images).reshape(-1, 1, 8, 8) / 16.0
    return tensor[order], torch.from_numpy(labels)[order]


def accuracy(model: Classifier, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the share of images that are classified correctly."""
    with torch.no_grad():
        return float((model(images).argmax(1) == labels).double().mean())


def learn(
    make: Callable[[Field], Solve], options: argparse.Namespace, label: str
) -> tuple[Classifier, list[float]]:
    """Train a classifier; return it and its losses."""
    images, labels = data()
    generator = torch.Generator().manual_seed(options.seed)
    torch.manual_seed(options.seed)
    model = Classifier(options.channels, make)

    def loss() -> torch.Tensor:
        chosen = torch.randint(TRAINED, (options.batch,), generator=generator)
        return torch.nn.functional.cross_entropy(model(images[chosen]), labels[chosen])

    found = train(model, loss, options, label=label, rate=1e-2, generator=generator)
    return model, found.losses


# ----------------------------------------------------------------------------------- the program


def draw(rows: list[dict[str, Any]], accuracies: list[dict[str, Any]], losses: Any) -> Any:
    """Draw memory against evaluations and against steps, and what was learned."""
    drawn, axes = figure(
        1, 3, "ODE blocks on 8 x 8 digits: what a gradient takes, and what it is for"
    )
    names = list(dict.fromkeys(row["gradient by"] for row in rows))
    steps = max(row["steps"] for row in rows if row["method"] == "rk4")
    axis = axes[0, 0]
    for index, name in enumerate(names):
        ours = name.startswith("pnode")
        chosen = [row for row in rows if row["gradient by"] == name and row["method"] == "rk4"]
        last = [row for row in chosen if row["steps"] == steps]
        if last:
            marker, color = ("o" if ours else "s"), f"C{index}"
            axes[0, 1].loglog(
                [row["steps"] for row in chosen], [row["MiB"] for row in chosen],
                marker=marker, ms=4, color=color, label=name,
            )  # fmt: skip
            axis.plot(last[0]["MiB"], last[0]["evaluations"], marker, color=color, ms=7, label=name)
    axis.set(xlabel="peak memory in use (MiB)", ylabel="evaluations of the two fields")
    axis.set_title(f"one gradient, rk4, {steps} steps a block", fontsize=10)
    axis.legend(fontsize=7)
    axes[0, 1].set(xlabel="steps a block", ylabel="peak memory in use (MiB)")
    axes[0, 1].set_title("memory of one gradient, rk4", fontsize=10)
    counts = sorted({row["steps"] for row in rows if row["method"] == "rk4"})
    axes[0, 1].set_xticks(counts, map(str, counts))
    axes[0, 1].minorticks_off()
    axis = axes[0, 2]
    for name, values in losses.items():
        axis.semilogy(values, "-" if "pnode" in name else "--", label=name)
    final = accuracies[0]["accuracy"]
    axis.set(xlabel="iteration", ylabel="loss (cross entropy)")
    axis.set_title(f"training; {100 * final:.1f} % of unseen digits correct", fontsize=10)
    axis.legend(fontsize=7)
    return drawn


def run(options: argparse.Namespace) -> Outcome:
    """Measure gradients, train, and look what other methods make of the trained network."""
    images, labels = data()
    batch = images[: options.batch], labels[: options.batch]
    everything, few = tuple(WAYS), FEW
    cases: list[tuple[str, int, Sequence[str]]] = [("rk4", 8, everything)]
    if options.quick:
        cases = [("rk4", 4, everything)]
    else:
        cases = [("rk4", steps, everything) for steps in (2, 8, 32)]
        cases += [(method, 8, few) for method in ("euler", "midpoint", "bosh3", "dopri5")]
    rows = compare(cases, *batch, options.channels)

    losses: dict[str, list[float]] = {}
    model, losses["pnode"] = learn(by_pnode("rk4", 4), options, "pnode")
    unseen = images[TRAINED:], labels[TRAINED:]
    accuracies = [{"trained by": "pnode", "method": "rk4", "steps": 4,
                   "accuracy": accuracy(model, *unseen)}]  # fmt: skip
    other, losses["NODE-continuous"] = learn(
        by_pnode("rk4", 4, gradient="continuous"), options, "continuous"
    )
    accuracies.append({"trained by": "NODE-continuous", "method": "rk4", "steps": 4,
                       "accuracy": accuracy(other, *unseen)})  # fmt: skip
    solves = [("cn", 4)] if not options.quick else []
    solves += [(method, steps) for method in TABLEAUS for steps in (2, 8, 64)][
        : 1 if options.quick else None
    ]
    for method, steps in solves:
        model.solve_by(by_pnode(method, steps))
        accuracies.append({"trained by": "pnode", "method": method, "steps": steps,
                           "accuracy": accuracy(model, *unseen)})  # fmt: skip
    numbers = {"accuracies": accuracies, "losses": losses}
    return Outcome(numbers, rows, lambda: draw(rows, accuracies, losses))


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this example's own options."""
    add = parser.add_argument
    add("--channels", type=at_least(int, 1), default=CHANNELS, help=f"of the states ({CHANNELS})")
    add("--batch", type=at_least(int, 1), default=BATCH, help=f"images of a gradient ({BATCH})")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    quick = {"iterations": 3, "batch": 16}
    return arguments("digits", __doc__, argv, iterations=80, quick=quick, add=add_options)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    return launch(parse(argv), run)


if __name__ == "__main__":
    sys.exit(main())

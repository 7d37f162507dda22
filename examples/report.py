"""Table, figure and JSON file of the Robertson example's result."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from observations import Observations, refine

if TYPE_CHECKING:
    from robertson import Result

FINE = 8  # steps per interval of the check on a finer grid
COUNTS = ("steps", "rejected", "rhs", "jvp", "vjp", "jacobians", "newton", "krylov")
LABELS = (
    "steps",
    "rejected steps",
    "evaluations of f",
    "Jacobian-vector products",
    "vector-Jacobian products",
    "assembled Jacobians",
    "Newton iterations",
    "Krylov iterations",
)


def table(result: Result, observations: Observations) -> str:
    """Lay out the result for a terminal."""
    lines = [f"{observations.title}: method {result.method}, seed {result.seed}", ""]

    def row(text: str, *cells: str) -> None:
        lines.append(f"  {text:<28}" + "".join(f"{cell:>14}" for cell in cells))

    if math.isfinite(result.mae):
        row("final scaled MAE", f"{result.mae:.5f}")
        row(f"the same in 1/{FINE} of the steps", f"{result.fine_mae:.5f}")
    row("iterations", f"{result.iterations:,}")
    row("failed solves", f"{result.recoveries:,}")
    if result.iterations:
        norms = [norm for norm in result.gradient_norms if math.isfinite(norm)]
        row("largest gradient norm", f"{max(norms):.3g}")
    row("wall time of training", f"{result.seconds:.1f} s")
    if result.iterations:
        sweeps = result.iterations
        lines.append("")
        row("", "forward", "per sweep", "backward", "per sweep")
        for name, text in zip(COUNTS, LABELS, strict=True):
            ahead, back = result.forward[name], result.backward[name]
            row(text, f"{ahead:,}", f"{ahead / sweeps:.1f}", f"{back:,}", f"{back / sweeps:.1f}")
    return "\n".join(lines)


def plot(result: Result, observations: Observations, learned: torch.Tensor, path: Path) -> None:
    """Draw every quantity (truth, data, learned) and the loss curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = observations.times.numpy()
    logarithmic = times[0] >= 0 and times[-1] > 1e3 * times[1]
    substeps = (len(learned) - 1) // (len(times) - 1)
    fine_times = refine(observations.times, substeps).numpy()
    fine = (learned * observations.span + observations.low).numpy()
    panels = len(observations.names) + 1
    rows = (panels + 1) // 2
    figure, axes = pyplot.subplots(
        rows, 2, figsize=(10.0, 3.1 * rows + 0.7), layout="constrained", squeeze=False
    )
    for index, name in enumerate(observations.names):
        axis = axes.flat[index]
        factor, label = readable_unit(observations.states[:, index])
        if observations.curve is not None:
            smooth, truth = observations.curve
            axis.plot(smooth, truth[:, index] * factor, color="0.75", lw=5, label="truth")
        data = observations.states[:, index].numpy() * factor
        axis.plot(times, data, "o", ms=4.5, mfc="white", mec="black", label="data")
        axis.plot(fine_times, fine[:, index] * factor, color="C3", lw=1.6, label="learned")
        if logarithmic:
            axis.set_xscale("log")
            axis.set_xlim(times[1] / 1.5, times[-1] * 1.5)
        axis.set(xlabel="time", ylabel=name + label)
        axis.grid(alpha=0.25)
    _plot_loss(axes.flat[panels - 1], result)
    for axis in axes.flat[panels:]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(
        f"{observations.title}, learned with {result.method}: scaled MAE {result.mae:.4f}"
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _plot_loss(axis: Any, result: Result) -> None:
    axis.semilogy(result.losses, color="C0", lw=1.0)
    axis.set(xlabel="iteration", ylabel="loss (scaled MAE)")
    axis.grid(alpha=0.25)


def readable_unit(values: torch.Tensor) -> tuple[float, str]:
    """Choose a power of ten that makes small numbers readable, and its label."""
    largest = float(values.abs().max())
    if largest == 0.0 or 0.01 <= largest < 1e4:
        return 1.0, ""
    exponent = -math.floor(math.log10(largest))
    return 10.0**exponent, rf" $\times\ 10^{{{exponent}}}$"


def write_json(result: Result, observations: Observations, path: Path) -> None:
    """Write the result, with null for what is not finite."""

    def clean(value: object) -> object:
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return [clean(item) for item in value] if isinstance(value, list) else value

    content = {name: clean(value) for name, value in asdict(result).items() if name != "learned"}
    content = {"title": observations.title, "iterations": result.iterations, **content}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")

"""Figure of the Robertson example's result."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from gallery_common import DATA, LEARNED, TRUTH, figure
from observations import Observations, refine


def draw(
    observations: Observations, learned: torch.Tensor, losses: Sequence[float], title: str
) -> Any:
    """Draw every quantity (truth, data, learned) and the loss curve."""
    times = observations.times.numpy()
    logarithmic = times[0] >= 0 and times[-1] > 1e3 * times[1]
    fine_times = refine(observations.times, (len(learned) - 1) // (len(times) - 1)).numpy()
    fine = (learned * observations.span + observations.low).numpy()
    panels = len(observations.names) + 1
    rows = (panels + 1) // 2
    drawn, axes = figure(rows, 2, title, figsize=(10.0, 3.1 * rows + 0.7))
    for index, name in enumerate(observations.names):
        axis = axes.flat[index]
        factor, label = readable_unit(observations.states[:, index])
        if observations.curve is not None:
            smooth, truth = observations.curve
            axis.plot(smooth, truth[:, index] * factor, **TRUTH)
        axis.plot(times, observations.states[:, index].numpy() * factor, **DATA)
        axis.plot(fine_times, fine[:, index] * factor, **LEARNED)
        if logarithmic:
            axis.set_xscale("log")
            axis.set_xlim(times[1] / 1.5, times[-1] * 1.5)
        axis.set(xlabel="time", ylabel=name + label)
    loss = axes.flat[panels - 1]
    loss.semilogy(losses, color="C0", lw=1.0)
    loss.set(xlabel="iteration", ylabel="loss (scaled MAE)")
    for axis in axes.flat[panels:]:
        axis.set_axis_off()
    handles, labels = axes.flat[0].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return drawn


def readable_unit(values: torch.Tensor) -> tuple[float, str]:
    """Choose a power of ten that makes small numbers readable, and its label."""
    largest = float(values.abs().max())
    if largest == 0.0 or 0.01 <= largest < 1e4:
        return 1.0, ""
    exponent = -math.floor(math.log10(largest))
    return 10.0**exponent, rf" $\times\ 10^{{{exponent}}}$"

"""Pictures of solutions, by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pnode.base.errors import ConfigurationError
from pnode.base.optional import need
from pnode.solutions.series import array, chosen_names, entry_names, leaves

__all__ = ["plot"]

_MOST_LINES = 20
_SCALES = ("auto", "linear", "log")
_DECADES = 100.0  # of time, from where on its axis is logarithmic
_APART = 1000.0  # values of series, likewise
_MOST_LABELS = 10


def plot(solution: Any, axes: Any, names: Sequence[str] | None, xscale: str, yscale: str) -> Any:
    """Draw the states over time; see ``Solution.plot``."""
    for name, scale in (("xscale", xscale), ("yscale", yscale)):
        if scale not in _SCALES:
            raise ConfigurationError(f"{name}={scale!r}: choose one of {', '.join(_SCALES)}")
    pyplot = need("matplotlib.pyplot", "plot", "plot()")
    parts = list(leaves(solution.ys))
    default = [label for name, part in parts for label in entry_names(name, part.shape[1:])]
    if axes is None:
        axes = pyplot.subplots(layout="constrained")[1]
    times = array(solution.ts)
    values = np.concatenate([array(part).reshape(len(part), -1) for _, part in parts], axis=1)
    many = times.ndim == 1 and values.shape[1] > _MOST_LINES and names is None
    if many:
        _image(axes, times, values)
    else:
        _lines(axes, times, values, chosen_names(names, len(default), default))
        if yscale == "log" or (yscale == "auto" and _magnitudes_differ(values)):
            axes.set_yscale("log", nonpositive="mask")
    _scale_time(axes, times, xscale)
    _mark_events(axes, solution.events, many)
    axes.set_xlabel("t")
    if not many and axes.get_legend_handles_labels()[1]:
        axes.legend()
    return axes


def _lines(axes: Any, times: np.ndarray, values: np.ndarray, names: Sequence[str]) -> None:
    # Few points are shown as such; without it a single one would not be seen at all.
    marker = "." if len(values) <= 50 else ""
    for index, name in enumerate(names):
        label = name if len(names) <= _MOST_LABELS else None
        clock = times if times.ndim == 1 else times[:, index // (len(names) // times.shape[1])]
        axes.plot(clock, values[:, index].real, marker=marker, label=label)
    if len(names) == 1:
        axes.set_ylabel(names[0])


def _image(axes: Any, times: np.ndarray, values: np.ndarray) -> None:
    """Draw the entries of a large state as colors, one below the other."""
    mesh = axes.pcolormesh(times, np.arange(values.shape[1]), values.real.T, shading="nearest")
    axes.set_ylabel("entry of y")
    axes.figure.colorbar(mesh, ax=axes)


def _scale_time(axes: Any, times: np.ndarray, scale: str) -> None:
    positive = times[times > 0]
    if scale == "auto":
        span = (
            len(times) > 2
            and bool(np.all(np.isfinite(times)))
            and times.min() >= 0
            and positive.max() >= _DECADES * positive.min()
            # Even steps from nearly zero span decades, too: their middle is half way.
            and np.median(times) < 0.1 * times.max()
        )
        scale = "log" if span else "linear"
    if scale != "log":
        return
    if not len(positive) or times.min() < 0:
        raise ConfigurationError("xscale='log' needs times that are positive, or zero at one end")
    if times.min() == 0:  # linear up to the first output, so that the start is seen
        axes.set_xscale("symlog", linthresh=positive.min(), linscale=1.0)
        axes.set_xlim(0.0, 1.3 * positive.max())  # its margins would be decades below zero
        first, last = math.ceil(np.log10(positive.min())), math.floor(np.log10(positive.max()))
        every = max(1, (last - first) // 8)
        axes.set_xticks([0.0, *(10.0**power for power in range(first, last + 1, every))])
    else:
        axes.set_xscale("log")


def _magnitudes_differ(values: np.ndarray) -> bool:
    """Whether none is negative, and some are usually so small that an even scale hides them."""
    if np.iscomplexobj(values) or not len(values) or not np.all(values >= 0):
        return False
    usual = [np.median(series[series > 0]) for series in values.T if np.any(series > 0)]
    return bool(usual) and values.max() >= _APART * min(usual)


def _mark_events(axes: Any, events: Sequence[Any], image: bool) -> None:
    """Draw a dotted line at each time of an event, and the states there as circles."""
    for index, event in enumerate(events):
        times = array(event.times)
        color = f"C{(index + 7) % 10}"
        for number, time in enumerate(times):
            label = f"event {index}" if number == 0 else None
            axes.axvline(time, linestyle=":", color=color, label=label, zorder=1)
        if not image and len(times):
            for _, states in leaves(event.states):
                rows = array(states).reshape(len(times), -1).real
                axes.plot(times, rows, "o", color=color, fillstyle="none")

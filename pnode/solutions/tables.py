"""A solution as text: one line, a table, and a table for notebooks."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import torch

from pnode.base.errors import ConfigurationError
from pnode.solutions.series import array, chosen_names, entry_names, leaves, single_clock

__all__ = ["as_html", "as_text", "short"]

_MOST_COLUMNS = 12


def short(solution: Any) -> str:
    """Return one line: times, what the states are, steps, why the solve ended."""
    ts = solution.ts
    times = f"{tuple(ts.shape)}"
    if ts.numel():
        first, last = ts.reshape(-1)[0].item(), ts.reshape(-1)[-1].item()
        times = f"{first:g} to {last:g} {times}"
    parts = [f"ts={times}", f"ys={_describe(solution.ys)}", f"steps={solution.stats.steps}"]
    if solution.costs is not None:
        parts.append(f"costs={_describe(solution.costs)}")
    if solution.events:
        parts.append(f"events={[len(each.times) for each in solution.events]}")
    return f"Solution({', '.join(parts)}, reason={solution.reason!r})"


def _describe(state: Any) -> str:
    if isinstance(state, torch.Tensor):
        kind = str(state.dtype).removeprefix("torch.")
        where = "" if state.device.type == "cpu" else f" on {state.device}"
        grad = ", grad" if state.requires_grad else ""
        return f"<{kind} {tuple(state.shape)}{where}{grad}>"
    if isinstance(state, dict):
        return "{" + ", ".join(f"{key!r}: {_describe(part)}" for key, part in state.items()) + "}"
    return "(" + ", ".join(map(_describe, state)) + ")"


def as_text(solution: Any, rows: int | None, names: Any) -> str:
    """Return a table in columns as wide as what is in them, numbers aligned on the right."""
    head, body = _cells(solution, rows, names)
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        for line in (head, *body)
    ]
    return "\n".join(lines)


def as_html(solution: Any) -> str:
    """Return the first and last rows for a notebook, below the one line."""
    caption = f"<pre>{html.escape(short(solution))}</pre>"
    if solution.ts.ndim != 1:
        return caption
    head, body = _cells(solution, 10, None)
    rows = [("th", head), *(("td", line) for line in body)]
    text = "".join(
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) + "</tr>"
        for tag, line in rows
    )
    return f"{caption}<table>{text}</table>"


def _cells(solution: Any, rows: int | None, names: Any) -> tuple[list[str], list[list[str]]]:
    """Return the head, and the rows, of which those in the middle give way if there are many."""
    if rows is not None and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 2):
        raise ConfigurationError(f"rows={rows!r} must be an int of at least 2, or None for all")
    times = single_clock(solution.ts, "table")
    shown = np.arange(len(times))
    if rows is not None and len(times) > rows:
        shown = np.concatenate([shown[: (rows + 1) // 2], shown[len(times) - rows // 2 :]])
    head, columns = ["t"], [_numbers(times[shown])]
    series = _columns(solution)
    limit = len(series) if names is not None else _MOST_COLUMNS
    labels = chosen_names(names, len(series), [name for name, _ in series])
    for label, (_, values) in list(zip(labels, series, strict=True))[:limit]:
        head.append(label)
        columns.append(_numbers(values[shown]))
    if len(series) > limit:
        head.append(f"... {len(series) - limit} more")
        columns.append([""] * len(shown))
    body = [list(line) for line in zip(*columns, strict=True)]
    if len(shown) < len(times):
        body.insert((len(shown) + 1) // 2, ["..."] + [""] * (len(head) - 1))
    return head, body


def _columns(solution: Any) -> list[tuple[str, np.ndarray]]:
    """Return the values over time of each entry of the state, and of the cost integrals."""
    given = list(leaves(solution.ys))
    if solution.costs is not None:
        given.append(("costs", solution.costs))
    found: list[tuple[str, np.ndarray]] = []
    for name, tensor in given:
        values = array(tensor).reshape(len(tensor), -1)
        found += zip(entry_names(name, tensor.shape[1:]), values.T, strict=True)
    return found


def _numbers(values: np.ndarray) -> list[str]:
    return [f"{value:.6g}" for value in values.tolist()]

"""The numbers of a solution under names: what tables, pictures and labelled arrays show."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from pnode.base.errors import ConfigurationError

__all__ = ["array", "chosen_names", "entry_names", "leaves", "single_clock"]


def array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values on the host, without its graph."""
    return tensor.detach().cpu().numpy()


def leaves(state: Any, name: str = "y") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a state, or of states over time, with their names in Python.

    Parameters
    ----------
    state : Tensor, or tuple, list or dict of these, nested
        The state.
    name : str
        Its own name.
    """
    if isinstance(state, torch.Tensor):
        yield name, state
    elif isinstance(state, dict):
        for key, part in state.items():
            yield from leaves(part, f"{name}[{key!r}]")
    elif hasattr(state, "_fields"):
        for key, part in zip(state._fields, state, strict=True):
            yield from leaves(part, f"{name}.{key}")
    else:
        for index, part in enumerate(state):
            yield from leaves(part, f"{name}[{index}]")


def entry_names(name: str, shape: Sequence[int]) -> list[str]:
    """Return the name of each entry of a tensor: ``y[0, 1]``, or ``y`` where there is but one."""
    if not shape:
        return [name]
    return [
        f"{name}[{', '.join(map(str, index))}]"
        for index in itertools.product(*(range(length) for length in shape))
    ]


def chosen_names(names: Sequence[str] | None, number: int, default: Sequence[str]) -> list[str]:
    """Return the user's names, if there are as many as there are things to be named."""
    if names is None:
        return list(default)
    if isinstance(names, str) or len(names) != number or len(set(names)) != number:
        raise ConfigurationError(
            f"names={names!r}: needed are {number} different names, for {', '.join(default[:8])}"
            f"{', ...' if len(default) > 8 else ''}"
        )
    return [str(name) for name in names]


def single_clock(ts: torch.Tensor, what: str) -> np.ndarray:
    """Return the output times, if all of the state shares them."""
    if ts.ndim != 1:
        raise ConfigurationError(
            f"{what}() needs output times of shape (T,), and these have {tuple(ts.shape)}, each "
            "sample its own: use plot(), or ts and ys themselves"
        )
    return array(ts)

"""How much memory checkpoints may take, and where they go."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import Any

from pnode.base.errors import ConfigurationError

__all__ = ["DEFAULT_GRAPHS", "Checkpointing", "parse_bytes"]

#: Bytes of graphs that store="auto" keeps if memory has no limit.
DEFAULT_GRAPHS = 128 * 2**20

_STORES = ("auto", "tape", "stages", "solutions")
_FACTORS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def parse_bytes(name: str, value: Any) -> int:
    """Return a number of bytes, from a whole number or a text such as ``"256MiB"``.

    Raises
    ------
    ConfigurationError
        For anything else, and for less than one byte.
    """
    number: float | None = None
    if isinstance(value, str):
        match = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", value)
        if match is not None and match[2].lower() in _FACTORS and match[1].count(".") < 2:
            digits = match[1] if match[1] != "." else "0"
            number = float(digits) * _FACTORS[match[2].lower()]
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        number = float(value)
    if number is None or not 1 <= number < 2**62:
        raise ConfigurationError(
            f"{name}={value!r} is not an amount of memory: give bytes, or a text such as '256MiB' "
            "or '2GB'"
        )
    return int(number)


@dataclass(frozen=True)
class Checkpointing:
    """A limit for the memory of checkpoints.

    Parameters
    ----------
    memory : int or str, optional
        What the checkpoints of one sweep may hold in memory at any instant: bytes, or a text such
        as ``"256MiB"``. Not y0, the outputs and PETSc's work vectors. None: no limit, and no step
        is repeated.
    device_memory : int or str, optional
        For states on a device: what the checkpoints of one sweep may hold there; the oldest of
        them move to pinned host memory beside the computation, where ``memory`` is their limit,
        and come back when they are wanted. None: they stay on the device, and ``memory`` is their
        limit there.
    disk : path, optional
        An existing folder for further checkpoints, when ``memory`` is used up. Each sweep makes a
        private folder in it and removes it.
    store : {"auto", "tape", "stages", "solutions"}
        What to keep of a step: its stages, with which its adjoint can be taken at once, or the
        state at its start, with which it is repeated. "auto" mixes both so that the fewest
        steps are repeated, and with explicit Runge-Kutta methods spends what is left of ``memory``
        on autograd's graphs of f at the stages of the last steps, whose adjoints then evaluate
        nothing again; without a limit 128 MiB. "tape" has no such limit of its own: without
        ``memory`` all steps keep their graphs, which is as fast and as large as backpropagation.
        "stages" keeps no graphs, "solutions" only those of steps that are repeated.
    reproducible : bool
        Whether every step starts afresh (costs one more evaluation of f per step with FSAL
        methods): gradients are then the same to the last bit whatever is repeated. BDF's steps
        depend on those before, and stay as they are.

    resume : str, optional
        A name under which the forward sweep can be taken up again after its process was killed:
        the same solve with the same name goes on from what is in ``disk``. The folder stays until
        the gradient has been taken. Not for BDF, adaptive radau5, events and dense output.

    Raises
    ------
    ConfigurationError
        For an unusable value.
    """

    memory: int | str | None = None
    disk: str | os.PathLike[str] | None = None
    store: str = "auto"
    reproducible: bool = False
    resume: str | None = None
    device_memory: int | str | None = None

    def __post_init__(self) -> None:
        """Check the values."""
        if self.device_memory is not None:
            limit = parse_bytes("device_memory", self.device_memory)
            object.__setattr__(self, "device_memory", limit)
        if self.device_memory is not None and self.store == "tape":
            raise ConfigurationError(
                "store='tape' with device_memory=: graphs stay on the device and cannot be moved; "
                "use store='auto', or memory= alone"
            )
        if self.memory is not None:
            object.__setattr__(self, "memory", parse_bytes("memory", self.memory))
        elif self.disk is not None:
            raise ConfigurationError(
                f"disk={self.disk!r} without memory=: say how much memory to use before the disk"
            )
        if self.resume is not None and (
            not isinstance(self.resume, str) or not re.fullmatch(r"[\w.-]+", self.resume)
        ):
            raise ConfigurationError(
                f"resume={self.resume!r} is not a name: use letters, digits, dots and dashes"
            )
        if self.resume is not None and self.disk is None:
            raise ConfigurationError(f"resume={self.resume!r} without disk=: give a folder")
        if not isinstance(self.reproducible, bool):
            raise ConfigurationError(f"reproducible={self.reproducible!r}: give True or False")
        if not isinstance(self.store, str) or self.store not in _STORES:
            choices = ", ".join(map(repr, _STORES))
            raise ConfigurationError(f"store={self.store!r} is unknown: choose one of {choices}")
        is_path = isinstance(self.disk, (str, os.PathLike))
        if self.disk is not None and not (is_path and os.path.isdir(self.disk)):
            raise ConfigurationError(f"disk={self.disk!r} is not a folder: create it first")
        if self.disk is not None:  # whatever the working directory will be
            object.__setattr__(self, "disk", os.path.abspath(self.disk))

    @property
    def graphs_limit(self) -> float:
        """Bytes that graphs of f may take at most, besides the limit of all; 0 for no graphs."""
        if self.store == "auto":
            return DEFAULT_GRAPHS if self.memory is None else math.inf
        return 0 if self.store == "stages" else math.inf

    @property
    def may_repeat(self) -> bool:
        """Whether steps may be repeated from the middle of a sweep."""
        return self.memory is not None or self.store == "solutions"

    @property
    def bytes(self) -> int | None:
        """The limit in bytes; None for none."""
        return None if self.memory is None else int(self.memory)

    @property
    def device_bytes(self) -> int | None:
        """The limit of a device in bytes; None where it is no level of its own."""
        return None if self.device_memory is None else int(self.device_memory)

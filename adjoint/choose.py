"""Which schedule the memory allows, and what it will come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from pnode.adjoint.online import OnlineSchedule
from pnode.adjoint.optimal import OptimalSchedule, minimal_units
from pnode.adjoint.schedule import (
    Adjoint,
    Advance,
    RestoreEnd,
    RestoreSolution,
    Schedule,
    StoreEverything,
)
from pnode.adjoint.store import CheckpointStore
from pnode.adjoint.trajectory import Trajectory
from pnode.base.errors import ConfigurationError
from pnode.base.ledger import Ledger
from pnode.base.vectors import REAL
from pnode.problems.checkpointing import Checkpointing
from pnode.solvers.checkpoint import Checkpoint
from pnode.solvers.methods import Method, find_method
from pnode.solvers.stepping import Step

__all__ = ["Plan", "choose_schedule", "memory_limit", "plan"]


def choose_schedule(
    method: Method, steps: int | None, state_bytes: int, memory: int | None, store: str, disk: bool
) -> Schedule:
    """Return the schedule that repeats the fewest steps within ``memory``.

    Parameters
    ----------
    method : Method
        Row of the table.
    steps : int or None
        Number of steps; None if it is not known in advance.
    state_bytes : int
        Bytes of one state.
    memory : int or None
        Bytes that checkpoints may hold; None for no limit.
    store : {"auto", "tape", "stages", "solutions"}
        What to keep of a step; graphs ("tape") take what the schedule leaves.
    disk : bool
        Whether there is a disk for what does not fit: no step is repeated then.

    Raises
    ------
    ConfigurationError
        If no schedule does with so little memory.
    """
    if store == "tape":
        if not method.keeps_graphs:
            raise ConfigurationError(
                f"store='tape' keeps the graphs of explicit Runge-Kutta stages, and "
                f"method={method.name!r} has none: use store='auto', or a method such as 'dopri5'"
            )
        store = "auto"
    if memory is None or disk or not method.restarts or steps == 0:
        if store == "solutions" and steps != 0:
            raise ConfigurationError(
                "store='solutions' repeats steps from states, which needs memory= (without disk=) "
                "and a method that can start from one state alone: drop it"
            )
        return StoreEverything()
    # The stages that are live count too: those of the step whose adjoint comes next.
    live = method.stage_units
    units = memory // state_bytes - live
    sizes = (live, method.holds_end)
    least = minimal_units(steps or 2, *sizes, initial_free=True, store=store) if steps else 0
    if units < least:
        raise ConfigurationError(
            f"memory={memory} is too little: the checkpoints of method={method.name!r} need at "
            f"least {(least + live) * state_bytes} bytes ({least + live} states of {state_bytes})"
        )
    if steps is None:
        if store != "auto":
            raise ConfigurationError(
                f"store={store!r} needs a number of steps that is known in advance: give "
                "step_size= (and no event_fn), or use store='auto'"
            )
        return OnlineSchedule(units, *sizes, initial_free=True)
    return OptimalSchedule(steps, units, *sizes, initial_free=True, store=store)


def memory_limit(chosen: Checkpointing, method: Method, state_bytes: int) -> int | None:
    """Return the bytes that a schedule may count on; None for no limit.

    Those of a device and of memory together, less what may stay free on both sides because the
    stages of a step stay together.

    Raises
    ------
    ConfigurationError
        If the device has no room for the stages of one step.
    """
    if chosen.device_bytes is None:
        return chosen.bytes
    live = method.stage_units * state_bytes
    if chosen.device_bytes < live:
        raise ConfigurationError(
            f"device_memory={chosen.device_bytes} is too little: the stages of one step of "
            f"method={method.name!r} need {live} bytes there"
        )
    if chosen.bytes is None:
        return None
    # Whole states on either side.
    whole = sum(limit // state_bytes for limit in (chosen.device_bytes, chosen.bytes))
    return (whole - (method.stage_units - 1)) * state_bytes


@dataclass(frozen=True)
class Plan:
    """What a gradient will cost in checkpoints.

    Attributes
    ----------
    recomputed : int
        Forward steps that are repeated.
    ram_bytes, disk_bytes : int
        Peak size of the checkpoints.
    """

    recomputed: int
    ram_bytes: int
    disk_bytes: int


def plan(
    method: str,
    steps: int,
    state_bytes: int,
    memory: Any = None,
    disk: Any = None,
    *,
    store: str = "auto",
) -> Plan:
    """Predict what a gradient through fixed steps costs. Not collective.

    Parameters
    ----------
    method : str
        Name or alias of a method that can restart from a state (not BDF).
    steps : int
        Number of steps.
    state_bytes : int
        Bytes of a state in PETSc's precision: 8 per entry as a rule.
    memory, disk, store
        As for :class:`pnode.Checkpointing`; nothing is written to ``disk``.

    Returns
    -------
    Plan
        What ``Solution.stats`` and ``stats.backward.recomputed`` will say after a backward sweep
        (a float32 vector field's stages are smaller than predicted; graphs of f, which take what
        is left, are not in it but in ``stats.tape_bytes``).

    Raises
    ------
    ConfigurationError
        For unusable arguments, and if ``memory`` is too little.

    Examples
    --------
    >>> plan("rk4", 100, 8000, memory=14 * 8000)
    Plan(recomputed=176, ram_bytes=112000, disk_bytes=0)
    """
    row = find_method(method)
    for name, value in (("steps", steps), ("state_bytes", state_bytes)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigurationError(f"{name}={value!r} must be a whole number of at least 1")
    if not row.restarts:
        raise ConfigurationError(
            f"method={method!r} keeps a history and every step's state: there is nothing to plan"
        )
    limit = Checkpointing(memory=memory, disk=disk, store=store).bytes
    schedule = choose_schedule(row, steps, state_bytes, limit, store, disk is not None)
    ledger = Ledger()
    folder: Any = None if disk is None else _NoFolder
    trajectory = Trajectory(schedule, CheckpointStore(ledger, limit, folder))
    shadow: Any = _Shadow(row, max(1, state_bytes // REAL.itemsize))
    for index in range(steps):
        trajectory.before_step(index, shadow)
        trajectory.record(Step(index, 0.0, 1.0, 1.0), shadow)
    trajectory.finish(shadow)
    recomputed = 0
    for action in schedule.reverse(steps):
        match action:
            case Advance():
                recomputed += 1
            case Adjoint(step):
                trajectory.stages(step, shadow)
                trajectory.forget_live(step)
            case RestoreSolution() | RestoreEnd():
                pass
            case _:
                trajectory.execute(action, shadow)
    trajectory.clear()
    return Plan(recomputed, ledger.ram_bytes, ledger.disk_bytes)


class _NoFolder(dict[str, Any]):
    """Stands for a folder of checkpoint files."""

    write = dict.__setitem__
    read = dict.__getitem__
    remove = dict.__delitem__
    close = dict.clear


class _Shadow:
    """Stands for an integrator: its tensors have sizes and no contents."""

    def __init__(self, method: Method, size: int) -> None:
        self._method = method
        self._size = size

    def _state(self) -> torch.Tensor:
        return torch.empty(self._size, dtype=REAL, device="meta")

    @property
    def history(self) -> tuple[torch.Tensor, ...]:
        return (self._state(),)

    def checkpoint(self, previous: Checkpoint | None) -> Checkpoint:
        states = [self._state() for _ in range(self._method.stage_units)]
        if previous is not None and self._method.shares_ends:
            states[0] = previous.stages[-1]
        return Checkpoint(tuple(states))

    def evidence(self) -> tuple[float, ...]:
        return ()

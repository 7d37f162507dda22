"""Optimal multistage checkpointing of a known number of steps. Pure.

The recurrences and their notation are in :mod:`pnode.adjoint.costs`, the decisions in
:mod:`pnode.adjoint.sweeper`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import dropwhile
from math import inf

from pnode.adjoint.costs import A, Costs, R
from pnode.adjoint.schedule import (
    Action,
    Adjoint,
    Schedule,
    StoreStages,
)
from pnode.adjoint.sweeper import Sweeper
from pnode.base.errors import ConfigurationError

__all__ = [
    "OptimalSchedule",
    "Revolve",
    "minimal_extra_steps",
    "minimal_units",
]

_STORES = ("auto", "stages", "solutions")


def minimal_units(
    steps: int,
    stage_units: int,
    stiffly_accurate: bool,
    *,
    initial_free: bool = False,
    store: str = "auto",
) -> int:
    """Return the least number of units with which there is a schedule.

    See :class:`OptimalSchedule` for the parameters.
    """
    _check(steps, 0, stage_units, 0, store)
    if steps == 1 or initial_free:
        return 0
    if store != "stages":
        return 1
    return stage_units if stiffly_accurate else (steps - 1) * stage_units


def minimal_extra_steps(
    steps: int,
    units: int,
    stage_units: int,
    stiffly_accurate: bool,
    *,
    initial_free: bool = False,
    store: str = "auto",
) -> int:
    """Return the least number of steps beyond the forward sweep, in closed form.

    See :class:`OptimalSchedule` for the parameters.

    Raises
    ------
    ConfigurationError
        If an argument is out of range, or no schedule does with so few units.
    """
    return _Request(steps, units, stage_units, stiffly_accurate, initial_free, store).extra_steps


class OptimalSchedule(Schedule):
    """The schedule with the fewest repeated steps, for a known number of steps.

    Its memory does not grow with ``steps``, only with the checkpoints of the forward sweep; an
    action takes less than a microsecond.

    Parameters
    ----------
    steps : int
        Number of steps, m.
    units : int
        Units of memory; one holds a state.
    stage_units : int
        Units of a stage checkpoint.
    stiffly_accurate : bool
        Whether a stage checkpoint includes the step's end, and can be restarted from.
    initial_free : bool
        Whether the initial state can be restored without having been stored. It then takes no
        unit, and no actions but ``RestoreSolution(0)``.
    store : {"auto", "stages", "solutions"}
        Which checkpoints to use; "auto": both.
    disk_units : int or math.inf
        Further units on disk. Checkpoints are a stack: those lowest in it, of the earliest steps,
        which stay longest, go to disk, each to one level once and for all. The schedule is that
        for the sum, less ``stage_units - 1`` if checkpoints of both sizes share both levels: one
        of them may lie across the border, and goes to disk.

    Attributes
    ----------
    extra_steps : int
        Steps that are repeated.

    Raises
    ------
    ConfigurationError
        If an argument is out of range, or no schedule does with so few units.
    """

    def __init__(
        self,
        steps: int,
        units: int,
        stage_units: int,
        stiffly_accurate: bool,
        *,
        initial_free: bool = False,
        store: str = "auto",
        disk_units: float = 0,
    ) -> None:
        request = _Request(
            steps, units, stage_units, stiffly_accurate, initial_free, store, disk_units
        )
        self.steps = steps
        self.extra_steps = request.extra_steps
        self._request = request
        self._sweeper = _sweeper(
            request.stage_units,
            request.stiffly_accurate,
            request.solutions,
            request.ram,
        )
        self._stores: dict[int, list[Action]] = {}
        self._stage_stores: dict[int, list[Action]] = {}
        for action in self._actions():
            if isinstance(action, Adjoint):
                break
            stores = self._stage_stores if isinstance(action, StoreStages) else self._stores
            stores.setdefault(action.step, []).append(action)

    def before_step(self, step: int) -> Iterable[Action]:
        """Store the start of ``step`` if it is a solution checkpoint."""
        return self._stores.get(step, ())

    def after_step(self, step: int) -> Iterable[Action]:
        """Store the stages of ``step`` if they are a stage checkpoint."""
        return self._stage_stores.get(step, ())

    def reverse(self, steps: int) -> Iterator[Action]:
        """Yield the actions of the reverse sweep.

        Raises
        ------
        ConfigurationError
            If ``steps`` is another number than that given to the constructor.
        """
        if steps != self.steps:
            raise ConfigurationError(
                f"steps={steps}, but this schedule was made for {self.steps}; use OnlineSchedule"
            )
        return dropwhile(lambda action: not isinstance(action, Adjoint), self._actions())

    def _actions(self) -> Iterator[Action]:
        request = self._request
        return self._sweeper.actions(request.situation, 0, request.steps, request.units, swept=True)


@lru_cache(maxsize=8)
def _sweeper(stage_units: int, stiffly_accurate: bool, solutions: bool, ram: int) -> Sweeper:
    """Return a sweeper whose decisions serve many schedules, as those of a training loop."""
    return Sweeper(stage_units, stiffly_accurate, solutions=solutions, ram=ram)


class Revolve(OptimalSchedule):
    """The binomial schedule of Griewank & Walther, ACM TOMS 26 (2000): solutions only.

    Parameters
    ----------
    steps, units : int
        Number of steps, and of solution checkpoints.
    initial_free : bool
        Whether the initial state takes no unit.
    """

    def __init__(self, steps: int, units: int, *, initial_free: bool = False) -> None:
        super().__init__(steps, units, 1, False, initial_free=initial_free, store="solutions")


class _Request:
    """The arguments of a schedule, checked and reduced to those of the recurrences."""

    def __init__(
        self,
        steps: int,
        units: int,
        stage_units: int,
        stiffly_accurate: bool,
        initial_free: bool = False,
        store: str = "auto",
        disk_units: float = 0,
    ) -> None:
        _check(steps, units, stage_units, disk_units, store)
        self.steps = steps
        self.situation = R if initial_free else A
        self.solutions = store != "stages"
        self.stiffly_accurate = stiffly_accurate
        given = f"{units=}, {disk_units=}, {stage_units=}, {store=}, {initial_free=}"
        unit = 1
        disk_units = int(min(disk_units, steps * stage_units))
        if store == "stages":  # they alone share the units, in multiples of stage_units
            unit, stage_units = stage_units, 1
            units, disk_units = units // unit, disk_units // unit
        whole = units + disk_units
        if store == "auto" and min(units, disk_units) > 0:
            whole = max(units, disk_units, whole - (stage_units - 1))
        least = minimal_units(
            steps, stage_units, stiffly_accurate, initial_free=initial_free, store=store
        )
        if whole < least:
            raise ConfigurationError(
                f"{self.steps} steps with {given} need at least {least * unit} units: "
                "give more memory"
            )
        self.ram = units
        enough = steps - 1 if store == "solutions" else (steps - 1) * stage_units
        self.units = min(whole, enough)
        self.stage_units = stage_units if store != "solutions" else self.units + 2

    @property
    def extra_steps(self) -> int:
        """The least cost."""
        if self.solutions or self.stiffly_accurate:
            costs = Costs(self.stage_units, self.stiffly_accurate)
            return costs.locate(self.situation, self.steps, self.units)[0]
        # Each pass from the initial state ends with one step and the stages before it.
        passes, rest = divmod(self.steps - 1, self.units + 1)
        return passes * rest + passes + (self.units + 1) * passes * (passes - 1) // 2


def _check(steps: int, units: int, stage_units: int, disk_units: float, store: str) -> None:
    if store not in _STORES:
        raise ConfigurationError(f"store={store!r} is none of {', '.join(map(repr, _STORES))}")
    for name, value, least in (
        ("steps", steps, 1),
        ("units", units, 0),
        ("stage_units", stage_units, 1),
        ("disk_units", disk_units, 0),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole or (name == "disk_units" and value == inf)) or value < least:
            raise ConfigurationError(f"{name}={value!r} must be an integer of at least {least}")

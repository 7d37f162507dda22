"""Optimal multistage checkpointing of a known number of steps. Pure.

The recurrences and their notation are in :mod:`pnode.adjoint.costs`. :class:`_Hulls` gets the
decisions from the edges of the hulls, when they are needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from itertools import dropwhile
from math import inf
from typing import NamedTuple

from pnode.adjoint.costs import A, Costs, P, R
from pnode.adjoint.schedule import (
    DISK,
    RAM,
    Action,
    Adjoint,
    Advance,
    DiscardSolution,
    DiscardStages,
    RestoreEnd,
    RestoreSolution,
    RestoreStages,
    Schedule,
    StoreSolution,
    StoreStages,
)
from pnode.errors import ConfigurationError

__all__ = [
    "OptimalSchedule",
    "Revolve",
    "Sweeper",
    "minimal_extra_steps",
    "minimal_units",
]

_STORES = ("auto", "stages", "solutions")


#: What to do first: advance to the last step; to a solution; to stages; store the start itself.
_LAST, _SOLUTION, _STAGES, _START = range(4)


class _Option(NamedTuple):
    """One way to begin: its hull's edge and, of that, the part left of the first checkpoint."""

    what: int
    value: int
    low: int
    high: int
    left_low: int = 0
    left_high: int = 0


class _Hulls:
    """Ways to begin at the hulls' edges of slope ``r + a / c``; a / c is 0 or 1 / c.

    The conjugate of F, the greatest ``c (slope m - F(m, u))``, turns the recurrences' convolutions
    into sums: if it and the m where it is taken are known for the right part at this slope and for
    the left part at this slope less one, those of the whole are the sums.
    """

    def __init__(self, costs: Costs, solutions: bool, c: int = 0) -> None:
        self.denominator = c or 1
        self._c = c
        self._costs = costs
        self._solutions = solutions
        self._after = R if costs.stiffly_accurate else A
        # Bounded: with very many units there are as many edges.
        self._edge = lru_cache(maxsize=1 << 13)(self._find_edge)
        self.options = lru_cache(maxsize=1 << 12)(self._find_options)

    def slope(self, r: int) -> int:
        """Return c (r + a / c)."""
        return r * self.denominator + (self._c > 0)

    def _find_edge(self, situation: int, r: int, units: int) -> tuple[int, int, int]:
        """Return the conjugate, the first m where it is taken and the last."""
        if r < 0:
            return self.slope(r), 1, 1
        low, high = self._costs.edge(situation, units, r, self._c)
        value = self.slope(r) * low - self.denominator * self._costs(situation, low, units)
        return value, low, high

    def _find_options(self, situation: int, r: int, units: int) -> tuple[int, tuple[_Option, ...]]:
        """Return the conjugate and the ways to begin, in the order of preference."""
        return self._edge(situation, r, units)[0], tuple(self._ways(situation, r, units))

    def _ways(self, situation: int, r: int, units: int) -> Iterator[_Option]:
        one = self.slope(r)
        free = units - (situation == P)  # without the start
        stage_units = self._costs.stage_units
        if situation == A:
            if free >= stage_units:
                value, low, high = self._edge(self._after, r, free - stage_units)
                yield _Option(_STAGES, one + value, 1 + low, 1 + high)
            if free >= 1 and self._solutions:
                yield _Option(_START, *self._edge(P, r, units))
            return
        value, low, high = self._edge(A if situation == P else R, r - 1, units)
        yield _Option(_LAST, one + value, 1 + low, 1 + high, low, high)
        if free >= 1 and self._solutions:
            right = self._edge(P, r, free)
            yield _Option(_SOLUTION, right[0] + value, right[1] + low, right[2] + high, low, high)
        if free >= stage_units:
            if value <= 0:  # nothing left of it is as good
                low, value, high = 0, 0, high if value == 0 else 0
            right = self._edge(self._after, r, free - stage_units)
            yield _Option(
                _STAGES, one + right[0] + value, 1 + right[1] + low, 1 + right[2] + high, low, high
            )


class Sweeper:
    """Yields the optimal actions for intervals of steps.

    Parameters
    ----------
    stage_units : int
        Units of a stage checkpoint.
    stiffly_accurate : bool
        Whether a stage checkpoint includes the step's end.
    solutions : bool
        Whether solution checkpoints are allowed.
    ram : int or math.inf
        Units in memory; what does not fit goes to disk.
    """

    def __init__(
        self,
        stage_units: int,
        stiffly_accurate: bool,
        *,
        solutions: bool = True,
        ram: float = inf,
    ) -> None:
        self.costs = Costs(stage_units, stiffly_accurate)
        self._solutions = solutions
        self._ram = ram
        self._plain = _Hulls(self.costs, solutions)
        self._hulls = lru_cache(maxsize=4)(partial(_Hulls, self.costs, solutions))

    def actions(
        self, situation: int, first: int, steps: int, units: int, *, swept: bool = False
    ) -> Iterator[Action]:
        """Yield the actions that take the adjoint over steps first .. first + steps - 1.

        Parameters
        ----------
        situation : {A, R}
            That of the start of step ``first``, which is live.
        first, steps, units : int
            The interval, and the free units.
        swept : bool
            Leave out the advances of the first pass: they are those of the forward sweep.
        """
        l, stiffly_accurate = self.costs.stage_units, self.costs.stiffly_accurate  # noqa: E741
        _, r, c = self.costs.locate(situation, steps, units)
        if c == 1:
            r, c = r + 1, 0
        hulls = self._hulls(c) if c else self._plain
        later: list[tuple] = []  # intervals to the left and steps between, nearest last
        stored = False
        while True:
            # The start of step ``first`` is live, and stored in situation P, or in A if ``stored``.
            if (steps - 1) * l <= units - (situation == P):
                if stored or situation == P:
                    yield DiscardSolution(first)
                yield from self._straight(first, steps, swept)
                stored = swept = False
            else:
                what, left, hulls = self._decide(situation, steps, units, r, hulls)
                if what == _START:
                    if not stored:
                        yield StoreSolution(first, self._level(units))
                    situation, stored = P, False
                    continue
                if stored:
                    yield DiscardSolution(first)
                    stored = False
                free = units - (situation == P)
                middle = first + left + (what != _SOLUTION)
                if not swept:
                    for step in range(first, middle):
                        yield Advance(step)
                if left:
                    later.append((situation, first, left, units, r - 1, hulls))
                elif situation == P:
                    yield DiscardSolution(first)
                if what == _LAST:
                    yield Adjoint(middle - 1)
                    swept = False
                else:
                    first, steps = middle, steps - (middle - first)
                    if what == _STAGES:
                        yield StoreStages(middle - 1, self._level(free))
                        later.append((middle - 1,))
                        situation, units = R if stiffly_accurate else A, free - l
                    elif (steps - 1) * l <= free:  # no need to store this solution
                        situation, units = A, free
                    else:
                        yield StoreSolution(middle, self._level(free))
                        situation, units = P, free
                    continue
            while later and len(later[-1]) == 1:
                (step,) = later.pop()
                yield RestoreStages(step)
                yield Adjoint(step)
                yield DiscardStages(step)
            if not later:
                return
            situation, first, steps, units, r, hulls = later.pop()
            if situation == R and first > 0:
                yield RestoreEnd(first - 1)
            else:
                yield RestoreSolution(first)
                if situation == P:
                    situation, stored = A, True

    def _decide(
        self, situation: int, steps: int, units: int, r: int, hulls: _Hulls
    ) -> tuple[int, int, _Hulls]:
        """Return what to do first, the number of steps left of it, and the hulls for the parts."""
        l = self.costs.stage_units  # noqa: E741
        if not (self._solutions or self.costs.stiffly_accurate):
            return _SOLUTION, steps - 1 - units // l, hulls  # the rest's stages find room
        value, options = hulls.options(situation, r, units)
        for option in options:
            if option.value == value and option.low <= steps <= option.high:
                break
        else:  # between the hull's corners: F is the hull rounded up
            cost = -((value - hulls.slope(r) * steps) // hulls.denominator)
            hulls = self._plain
            value = r * steps - cost
            for option in hulls.options(situation, r, units)[1]:
                if option.value == value and option.low <= steps <= option.high:
                    break
            else:
                raise AssertionError("the hulls have no such step")
        left = option.left_low + min(steps - option.low, option.left_high - option.left_low)
        return option.what, left, hulls

    def _straight(self, first: int, steps: int, swept: bool) -> Iterator[Action]:
        """Yield the actions for an interval whose stages all find room."""
        last = first + steps - 1
        l = self.costs.stage_units  # noqa: E741
        for step in range(first, last):
            if not swept:
                yield Advance(step)
            yield StoreStages(step, self._level((last - step) * l))
        if not swept:
            yield Advance(last)
        yield Adjoint(last)
        for step in range(last - 1, first - 1, -1):
            yield RestoreStages(step)
            yield Adjoint(step)
            yield DiscardStages(step)

    def _level(self, units: int) -> int:
        """Return where to put a checkpoint that together with all later ones takes ``units``."""
        return RAM if units <= self._ram else DISK


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

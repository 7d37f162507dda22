"""Optimal multistage checkpointing of a known number of steps: closed form and schedule. Pure.

One unit of storage holds one state; a solution checkpoint takes 1 unit, a stage checkpoint
``stage_units``. The cost of a schedule is its extra forward steps, those beyond the forward sweep.
Let F(m, u) be the least cost of m steps with u units, in one of three situations:

- A: the start of the first step is live and not stored, u units are free;
- P: it is live and stored in one of the u units;
- R: it is live and can be restored without taking any of the u units: it is the initial state, if
  that is free, or the end of a stored step of a stiffly accurate method.

Dynamic programming over the first checkpoint (as Griewank & Walther, ACM TOMS 26, 2000, for
solution checkpoints; Zhang & Constantinescu, J. Comput. Sci. 69, 2023, and Maddison, J. Comput.
Sci. 82, 2024, for stage checkpoints) gives, with l for ``stage_units`` and X = R for stiffly
accurate methods, X = A for the others, and 1 <= k < m::

    A(m, u) = min(P(m, u),                                       store the start
                  X(m - 1, u - l))                               store the first step's stages
    P(m, u) = min(m - 1 + A(m - 1, u),                           store nothing
                  k + P(m - k, u - 1) + A(k, u),                 store the start of step k
                  k - 1 + X(m - k, u - 1 - l) + A(k - 1, u))     store the stages of step k - 1
    R(m, u) = min(m - 1 + R(m - 1, u),
                  k + P(m - k, u) + R(k, u),
                  k - 1 + X(m - k, u - l) + R(k - 1, u))

A, P and R are 0 for m <= 1, and infinite for m > 1 if P or A has no unit. As functions of m they
are their convex hulls, rounded up; :func:`_locate` evaluates them in closed form, and
:class:`_Hulls` tabulates the hulls' edges, from which each decision takes constant time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import dropwhile
from math import comb, inf
from typing import NamedTuple

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
    "Costs",
    "OptimalSchedule",
    "Revolve",
    "Sweeper",
    "minimal_extra_steps",
    "minimal_units",
]

#: Situations of the start of the first step; see the module's docstring.
A, P, R = range(3)

_STORES = ("auto", "stages", "solutions")


class Costs:
    """The least cost F(m, u) of m steps with u units, in closed form.

    Parameters
    ----------
    stage_units : int
        Units of a stage checkpoint, l.
    stiffly_accurate : bool
        Whether a stage checkpoint includes the step's end.

    Notes
    -----
    With q = floor(u / l), L = l - 1 for stiffly accurate methods, else l, A is zero up to
    ``N(u, 0) = 1 + q``, and between the breakpoints ``N(u, r) = sum(C(u - l k + r, r), k = 0..q)``
    its increments are, in order: w times r; then for k = q, ..., 1, C(u - l k + r - 1, r - 1)
    blocks of L k steps, each with increments r + 1, r, ..., r. For stiffly accurate methods with
    l = 1 there are no blocks, and N(u, r) = C(u + r + 1, r + 1).
    """

    def __init__(self, stage_units: int, stiffly_accurate: bool) -> None:
        self.stage_units = stage_units
        self.stiffly_accurate = stiffly_accurate
        self._length = stage_units - 1 if stiffly_accurate else stage_units  # L

    def __call__(self, situation: int, steps: int, units: int) -> int:
        """Return F(steps, units) in a situation A, P or R, which must be feasible."""
        cost = self.locate(R if situation == R else A, steps, units)[0]
        if situation != P or steps <= 1:
            return cost
        if self._length == 0:
            return cost + (steps > units)
        return max(cost, steps - 1 - (units - 1) // self.stage_units)

    def locate(self, situation: int, steps: int, units: int) -> tuple[int, int, int]:
        """Return F(steps, units) and where it lies: the edge of slope ``r + 1 / c`` of the hull.

        Parameters
        ----------
        situation : {A, R}
            A, with at least one unit or step; or R.
        steps, units : int
            m and u.

        Returns
        -------
        cost, r, c : int
            c = 0 stands for the edge of slope r.
        """
        l, length = self.stage_units, self._length  # noqa: E741
        shifted = 0
        if situation == R:  # R(m, u) is A(m, u + 1), unless that has room for one checkpoint more
            units += 1
            shifted = int(units % l == 0)
            steps += shifted
        if self._breakpoint(units, 0) >= steps:
            return 0, 0, 0
        r = 1
        while self._breakpoint(units, r) < steps:
            r *= 2
        r = bisect_left(range(r), steps, r // 2 + 1, key=lambda r: self._breakpoint(units, r))
        corner = self._breakpoint(units, r - 1)
        excess = steps - corner
        cost = (r - 1) * corner + r * excess
        if length == 0:
            return cost - comb(units + r, r - 1) + 1, r, 0
        if r > 1:
            cost -= comb(units + r - 1, r - 2) + (r - 1) * shifted
        number, k = self._blocks(units, r, excess, shifted)
        return cost + number, r, length * k

    def _blocks(self, units: int, r: int, excess: int, shifted: int) -> tuple[int, int]:
        """Return how many blocks are entered ``excess`` steps after N(u, r - 1), and the last's k.

        ``shifted`` merges the block of k = q, of which there is one, into the w steps.
        """
        l, length = self.stage_units, self._length  # noqa: E741
        q = units // l
        last = q - shifted
        if r == 1:  # one block of each k
            excess -= (q + 1) * (2 * units - (l + length) * q) // 2 + shifted * length * q
            number = bisect_left(
                range(last + 1), excess, key=lambda j: length * j * (2 * last + 1 - j) // 2
            )
            return number, last + 1 - number if number else 0
        counts = [comb(units - l * k + r - 1, r - 1) for k in range(q + 1)]
        excess -= self._breakpoint(units, r) - self._breakpoint(units, r - 1)
        excess += length * sum(k * count for k, count in enumerate(counts))
        excess -= shifted * length * q
        number = k = 0
        while excess > 0:
            k = last
            number += min(counts[k], -(-excess // (length * k)))
            excess -= length * k * counts[k]
            last -= 1
        return number, k

    def _breakpoint(self, units: int, r: int) -> int:
        """Return N(units, r)."""
        l = self.stage_units  # noqa: E741
        if self._length == 0:
            return comb(units + r + 1, r + 1)
        q = units // l
        if r < 2:
            return (1 + q) * (2 + r * (2 * units - l * q)) // 2
        return sum(comb(u + r, r) for u in range(units, -1, -l))


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


class _Edge(NamedTuple):
    """Where ``c (slope m - F(m, u))`` is greatest: the value, the first m and the last."""

    value: int
    low: int
    high: int
    options: tuple[_Option, ...] = ()


class _Hulls:
    """Edges of the hulls of F, all of slope ``r + a / c``, r = 0, 1, ....

    The conjugate of F turns the recurrences' convolutions into sums: if the greatest values of
    the right part at this slope and of the left part at this slope less one are known, so is that
    of the whole, and the steps at which it is taken are the sums of theirs.
    """

    def __init__(self, costs: Costs, units: int, solutions: bool, c: int = 0) -> None:
        self.denominator = c or 1
        self._numerator = int(c > 0)
        self._solutions = solutions
        self._stage_units = costs.stage_units
        self._after = R if costs.stiffly_accurate else A
        below = _Edge(self._numerator - self.denominator, 1, 1)  # slope a / c - 1
        self._lowest = [[below] * (units + 1)] * 3
        self._levels: list[list[list[_Edge]]] = []

    def edge(self, situation: int, r: int, units: int) -> _Edge:
        """Return the edge of slope r + a / c."""
        while len(self._levels) <= r:
            self._add_level()
        return self._levels[r][situation][units]

    def slope(self, r: int) -> int:
        """Return c (r + a / c)."""
        return r * self.denominator + self._numerator

    def _add_level(self) -> None:
        left = self._levels[-1] if self._levels else self._lowest
        one = self.slope(len(self._levels))
        level: list[list[_Edge]] = [[], [], []]
        for units in range(len(left[A])):
            for situation in (P, A, R):
                options = tuple(self._options(situation, units, one, left, level))
                value = max([one, *(option.value for option in options)])
                best = [option for option in options if option.value == value]
                lows, highs = [option.low for option in best], [option.high for option in best]
                if value == one:
                    lows.append(1)
                    highs.append(1)
                level[situation].append(_Edge(value, min(lows), max(highs), options))
        self._levels.append(level)

    def _options(
        self,
        situation: int,
        units: int,
        one: int,
        left: list[list[_Edge]],
        level: list[list[_Edge]],
    ) -> Iterator[_Option]:
        """Yield the ways to begin, in the order of preference."""
        free = units - (situation == P)  # without the start
        stage_units = self._stage_units
        if situation == A:
            if free >= stage_units:
                value, low, high, _ = level[self._after][free - stage_units]
                yield _Option(_STAGES, one + value, 1 + low, 1 + high)
            if free >= 1 and self._solutions:
                yield _Option(_START, *level[P][units][:3])
            return
        if free < 0:
            return
        value, low, high, _ = before = left[A if situation == P else R][units]
        yield _Option(_LAST, one + value, 1 + low, 1 + high, low, high)
        if free >= stage_units:
            if value <= 0:
                low, value, high = 0, 0, high if value == 0 else 0
            right = level[self._after][free - stage_units]
            yield _Option(
                _STAGES, one + right.value + value, 1 + right.low + low, 1 + right.high + high,
                low, high,
            )  # fmt: skip
        if free >= 1 and self._solutions:
            value, low, high, _ = before
            right = level[P][free]
            yield _Option(
                _SOLUTION, right.value + value, right.low + low, right.high + high, low, high
            )


class Sweeper:
    """Yields the optimal actions for intervals of steps.

    Parameters
    ----------
    units : int
        The most units of an interval.
    stage_units : int
        Units of a stage checkpoint.
    stiffly_accurate : bool
        Whether a stage checkpoint includes the step's end.
    solutions : bool
        Whether solution checkpoints are allowed.
    ram : int or None
        Units in memory; what does not fit goes to disk. None: all.
    """

    def __init__(
        self,
        units: int,
        stage_units: int,
        stiffly_accurate: bool,
        *,
        solutions: bool = True,
        ram: int | None = None,
    ) -> None:
        self.costs = Costs(stage_units, stiffly_accurate)
        self._units = units
        self._solutions = solutions
        self._ram = units if ram is None else ram
        self._plain = _Hulls(self.costs, units, solutions)
        self._hulls = {0: self._plain}

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
        if c not in self._hulls:
            self._hulls[c] = _Hulls(self.costs, self._units, self._solutions, c)
        hulls = self._hulls[c]
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
        edge = hulls.edge(situation, r, units)
        value = edge.value
        for option in edge.options:
            if option.value == value and option.low <= steps <= option.high:
                break
        else:  # between the hull's corners: F is the hull rounded up
            cost = -((value - hulls.slope(r) * steps) // hulls.denominator)
            hulls = self._plain
            value = r * steps - cost
            for option in hulls.edge(situation, r, units).options:
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

    Its memory does not grow with ``steps``, only with the checkpoints of the forward sweep, and
    each action takes constant time.

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
            request.units,
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
            stores[action.step] = [action]

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
def _sweeper(
    units: int, stage_units: int, stiffly_accurate: bool, solutions: bool, ram: int
) -> Sweeper:
    """Return a sweeper whose tables serve many schedules, as those of a training loop."""
    return Sweeper(units, stage_units, stiffly_accurate, solutions=solutions, ram=ram)


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

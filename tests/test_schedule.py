"""Every schedule is run through a symbolic machine that checks legality, storage and cost."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from functools import cache

import pytest

from pnode.adjoint.online import OnlineSchedule
from pnode.adjoint.optimal import OptimalSchedule, Revolve, minimal_extra_steps, minimal_units
from pnode.adjoint.schedule import (
    DISK,
    RAM,
    Adjoint,
    Advance,
    DiscardSolution,
    DiscardStages,
    KeepEnd,
    RestoreEnd,
    RestoreSolution,
    RestoreStages,
    StoreEverything,
    StoreSolution,
    StoreStages,
)
from pnode.errors import ConfigurationError

KINDS = list(itertools.product(range(1, 8), (False, True)))  # stage_units, stiffly_accurate


class Machine:
    """Executes actions on step numbers instead of states."""

    def __init__(self, stage_units=1, stiffly_accurate=False, initial_free=False):
        self.stage_units = stage_units
        self.stiffly_accurate = stiffly_accurate
        self.initial_free = initial_free
        self.solutions: dict[int, int] = {}  # level by step
        self.stages: dict[int, int] = {}
        self.state: int | None = 0  # the live state is at the start of this step
        self.ready: int | None = None  # the step whose stages are live
        self.adjoint_at: int | None = None
        self.advanced = 0
        self.used = {RAM: 0, DISK: 0}
        self.peak = {RAM: 0, DISK: 0}
        self.kinds: set[type] = set()
        self._execute = {
            Advance: self.advance,
            Adjoint: self.adjoint,
            StoreSolution: self.store_solution,
            RestoreSolution: self.restore_solution,
            DiscardSolution: self.discard_solution,
            StoreStages: self.store_stages,
            RestoreStages: self.restore_stages,
            RestoreEnd: self.restore_end,
            KeepEnd: self.keep_end,
            DiscardStages: self.discard_stages,
        }

    def run(self, schedule, steps):
        """Sweep forwards and backwards; return the number of repeated steps."""
        for step in range(steps):
            self.execute(schedule.before_step(step))
            self.advance(Advance(step))
            self.execute(schedule.after_step(step))
        self.adjoint_at = steps
        self.execute(schedule.reverse(steps))
        assert self.adjoint_at == 0, "the adjoint did not reach the start"
        assert not self.solutions and not self.stages, "checkpoints are left over"
        assert self.used == {RAM: 0, DISK: 0}
        return self.advanced - steps

    def execute(self, actions):
        for action in actions:
            self._execute[type(action)](action)
            self.kinds.add(type(action))

    def take(self, level, units):
        self.used[level] += units
        self.peak[level] = max(self.peak[level], self.used[level])

    def advance(self, action):
        assert self.state == action.step, "advanced from another state"
        self.state, self.ready = action.step + 1, action.step
        self.advanced += 1

    def adjoint(self, action):
        assert self.ready == action.step, "took an adjoint without the step's stages"
        assert self.adjoint_at == action.step + 1, "took adjoints out of order"
        self.adjoint_at = action.step
        self.state = self.ready = None

    def store_solution(self, action):
        assert self.state == action.step, "stored a solution that is not live"
        assert action.step not in self.solutions, "stored a solution twice"
        self.solutions[action.step] = action.level
        self.take(action.level, 1)

    def restore_solution(self, action):
        free = self.initial_free and action.step == 0
        assert free or action.step in self.solutions, "restored a solution that is not stored"
        self.state, self.ready = action.step, None

    def discard_solution(self, action):
        self.take(self.solutions.pop(action.step), -1)

    def store_stages(self, action):
        assert self.ready == action.step, "stored stages that are not live"
        assert action.step not in self.stages, "stored stages twice"
        self.stages[action.step] = action.level
        self.take(action.level, self.stage_units)

    def restore_stages(self, action):
        assert action.step in self.stages, "restored stages that are not stored"
        self.state, self.ready = None, action.step

    def restore_end(self, action):
        assert self.stiffly_accurate, "the stages do not include the end"
        assert action.step in self.stages, "restored stages that are not stored"
        self.state, self.ready = action.step + 1, None

    def keep_end(self, action):
        assert self.stiffly_accurate, "the stages do not include the end"
        assert action.step + 1 not in self.solutions, "stored a solution twice"
        level = self.stages.pop(action.step)
        self.solutions[action.step + 1] = level
        self.take(level, 1 - self.stage_units)

    def discard_stages(self, action):
        self.take(self.stages.pop(action.step), -self.stage_units)


# ------------------------------------------------------------------------------ the machine itself


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 57])
def test_store_everything(steps):
    machine = Machine()
    assert machine.run(StoreEverything(), steps) == 0
    assert machine.peak == {RAM: steps, DISK: 0}


class Altered(OptimalSchedule):
    """Leaves out, in the reverse sweep, the first action of some type."""

    def __init__(self, missing, *args, **keywords):
        super().__init__(*args, **keywords)
        self.missing = missing

    def reverse(self, steps):
        found = False
        for action in super().reverse(steps):
            if type(action) is self.missing and not found:
                found = True
            else:
                yield action
        assert found


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        (Advance, "advanced from another state|stored .* not live|without the step's stages"),
        (Adjoint, "out of order"),
        (StoreSolution, "not stored"),
        (RestoreSolution, "advanced from another state"),
        (DiscardSolution, "left over|twice"),
        (StoreStages, "not stored"),
        (RestoreStages, "without the step's stages"),
        (DiscardStages, "left over|twice"),
        (RestoreEnd, "advanced from another state"),
    ],
)
def test_the_machine_sees_a_missing_action(missing, message):
    with pytest.raises(AssertionError, match=message):
        Machine(3, True).run(Altered(missing, 100, 10, 3, True), 100)


# ------------------------------------------------------------------------------ optimal schedules


@pytest.mark.parametrize(("stage_units", "stiffly_accurate"), KINDS)
def test_schedule_is_legal_within_the_units_and_of_the_least_cost(stage_units, stiffly_accurate):
    for units in range(41):
        for steps in range(1, 61):
            # Alternate, to save time; both meet every number of steps and of units.
            free = (steps + units) % 2 == 0
            if units < minimal_units(steps, stage_units, stiffly_accurate, initial_free=free):
                continue
            schedule = OptimalSchedule(
                steps, units, stage_units, stiffly_accurate, initial_free=free
            )
            machine = Machine(stage_units, stiffly_accurate, free)
            extra = machine.run(schedule, steps)
            where = (steps, units, free)
            assert machine.peak[RAM] <= units and machine.peak[DISK] == 0, where
            assert extra == schedule.extra_steps, where
            assert extra == minimal_extra_steps(
                steps, units, stage_units, stiffly_accurate, initial_free=free
            ), where


@pytest.mark.parametrize("store", ["solutions", "stages"])
@pytest.mark.parametrize("stiffly_accurate", [False, True])
@pytest.mark.parametrize("free", [False, True])
def test_one_kind_of_checkpoint(store, stiffly_accurate, free):
    stage_units = 3
    tried = 0
    for units, steps in itertools.product((0, 1, 2, 3, 4, 6, 9, 11, 15, 24, 31), range(1, 61)):
        keywords = {"initial_free": free, "store": store}
        if units < minimal_units(steps, stage_units, stiffly_accurate, **keywords):
            with pytest.raises(ConfigurationError, match=f"{units=}"):
                OptimalSchedule(steps, units, stage_units, stiffly_accurate, **keywords)
            continue
        schedule = OptimalSchedule(steps, units, stage_units, stiffly_accurate, **keywords)
        machine = Machine(stage_units, stiffly_accurate, free)
        assert machine.run(schedule, steps) == schedule.extra_steps, (steps, units)
        assert machine.peak[RAM] <= units
        unwanted = {StoreStages} if store == "solutions" else {StoreSolution}
        assert not machine.kinds & unwanted
        both = minimal_extra_steps(steps, units, stage_units, stiffly_accurate, initial_free=free)
        assert schedule.extra_steps >= both
        tried += 1
    assert tried > 40


@cache
def recurrence(situation, steps, units, stage_units, stiffly_accurate, stores):
    """The recurrences of pnode.adjoint.costs, by exhaustive search over the first checkpoint."""

    def cost(situation, steps, units):
        return recurrence(situation, steps, units, stage_units, stiffly_accurate, stores)

    if steps <= 1:
        return math.inf if units < 0 or (situation == "P" and units < 1) else 0
    after = "R" if stiffly_accurate else "A"
    solutions, stages = stores in ("auto", "solutions"), stores in ("auto", "stages")
    if situation == "A":
        options = [math.inf]
        if units >= 1 and solutions:
            options.append(cost("P", steps, units))
        if units >= stage_units and stages:
            options.append(cost(after, steps - 1, units - stage_units))
        return min(options)
    free = units - (situation == "P")
    if free < 0:
        return math.inf
    left = "A" if situation == "P" else "R"
    options = [steps - 1 + cost(left, steps - 1, units)]
    for k in range(1, steps):
        if free >= 1 and solutions:
            options.append(k + cost("P", steps - k, free) + cost(left, k, units))
        if free >= stage_units and stages:
            right = cost(after, steps - k, free - stage_units)
            options.append(k - 1 + right + cost(left, k - 1, units))
    return min(options)


@pytest.mark.parametrize("store", ["auto", "solutions", "stages"])
@pytest.mark.parametrize("stiffly_accurate", [False, True])
@pytest.mark.parametrize("stage_units", [1, 2, 3, 4, 5])
def test_closed_form_solves_the_recurrences(stage_units, stiffly_accurate, store):
    recurrence.cache_clear()
    for units, steps, free in itertools.product(range(9), range(1, 29), (False, True)):
        expected = recurrence(
            "R" if free else "A", steps, units, stage_units, stiffly_accurate, store
        )
        keywords = {"initial_free": free, "store": store}
        least = minimal_units(steps, stage_units, stiffly_accurate, **keywords)
        assert (units < least) == (expected == math.inf), (steps, units, free)
        if units < least:
            with pytest.raises(ConfigurationError, match=f"{units=}"):
                minimal_extra_steps(steps, units, stage_units, stiffly_accurate, **keywords)
        else:
            found = minimal_extra_steps(steps, units, stage_units, stiffly_accurate, **keywords)
            assert found == expected, (steps, units, free)


@pytest.mark.parametrize("stiffly_accurate", [False, True])
def test_a_stage_checkpoint_of_four_units(stiffly_accurate):
    """Released CAMS (Zhang & Constantinescu, 2023) repeats 198 steps here, Revolve 222."""
    assert minimal_extra_steps(100, 10, 4, stiffly_accurate) == 188
    assert Revolve(100, 10).extra_steps == 222


def test_revolve_has_the_binomial_cost():
    """Griewank & Walther (2000): r m - C(s + r, r - 1) with C(s + r - 1, s) < m <= C(s + r, s).

    That leaves out the m steps that are each followed by their adjoint; so do the extra steps.
    """
    for steps, units in itertools.product(range(2, 160), (1, 2, 3, 5, 8, 12)):
        r = next(r for r in itertools.count() if math.comb(units + r, r) >= steps)
        expected = r * steps - math.comb(units + r, r - 1)
        schedule = Revolve(steps, units)
        assert schedule.extra_steps == expected, (steps, units)


@pytest.mark.parametrize(("steps", "units"), [(10, 3), (57, 5), (100, 10), (60, 1)])
def test_revolve_runs(steps, units):
    machine = Machine()
    schedule = Revolve(steps, units)
    assert machine.run(schedule, steps) == schedule.extra_steps
    assert machine.peak[RAM] <= units
    assert StoreStages not in machine.kinds


@pytest.mark.parametrize(("stage_units", "stiffly_accurate"), KINDS)
def test_never_more_than_revolve(stage_units, stiffly_accurate):
    for units in (1, 2, 3, 5, 8, 13, 21, 34, 100):
        for steps in (1, 2, 3, 5, 10, 33, 100, 333, 1000, 10**4, 10**6):
            least = minimal_extra_steps(steps, units, stage_units, stiffly_accurate)
            solutions = minimal_extra_steps(
                steps, units, stage_units, stiffly_accurate, store="solutions"
            )
            assert least <= solutions


#: Steps, units, extra steps of MixedCheckpointSchedule in checkpoint_schedules 1.0.4 (PyPI), which
#: implements Maddison, J. Comput. Sci. 82 (2024): stages take one unit and have no restart.
MIXED = [
    (10, 3, 9),
    (30, 3, 70),
    (30, 7, 26),
    (57, 5, 109),
    (100, 4, 321),
    (100, 10, 137),
    (100, 25, 78),
    (150, 10, 244),
    (200, 20, 192),
]


@pytest.mark.parametrize(("steps", "units", "extra"), MIXED)
def test_mixed_checkpoints_of_one_unit(steps, units, extra):
    assert minimal_extra_steps(steps, units, 1, False) == extra
    assert minimal_extra_steps(steps, units, 1, True) <= extra


def test_a_million_steps_in_constant_memory():
    """Anything kept per step, or per action, would take more than a megabyte."""
    tracemalloc.start()
    try:
        actions = OptimalSchedule(10**6, 20, 4, True).reverse(10**6)
        assert sum(1 for _ in itertools.islice(actions, 300_000)) == 300_000
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**18


def test_set_up_with_many_units_is_lazy():
    """Tables over the units would take gigabytes here."""
    tracemalloc.start()
    try:
        schedule = OptimalSchedule(10**5, 350_000, 4, False)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    machine = Machine(4)
    assert machine.run(schedule, 10**5) == schedule.extra_steps == 12_500
    assert machine.peak[RAM] <= 350_000
    # 87,000 checkpoints of the forward sweep, at most 400 bytes each, and the decisions.
    assert peak < 2**26


def test_a_million_steps():
    schedule = OptimalSchedule(10**6, 100, 4, True)
    repeated = sum(type(action) is Advance for action in schedule.reverse(10**6))
    assert repeated == schedule.extra_steps == minimal_extra_steps(10**6, 100, 4, True)


def test_schedule_may_be_swept_twice():
    schedule = OptimalSchedule(30, 5, 2, False)
    first = list(schedule.reverse(30))
    assert list(schedule.reverse(30)) == first
    with pytest.raises(ConfigurationError, match="made for 30"):
        schedule.reverse(29)


# ------------------------------------------------------------------------------ two storage levels


@pytest.mark.parametrize("disk_units", [1, 3, 8, math.inf])
@pytest.mark.parametrize("store", ["auto", "solutions", "stages"])
@pytest.mark.parametrize(("stage_units", "stiffly_accurate"), [(1, True), (3, False), (4, True)])
def test_two_levels(disk_units, store, stage_units, stiffly_accurate):
    on_disk = 0
    for units, steps, free in itertools.product((0, 1, 4, 9, 16), range(1, 61, 2), (False, True)):
        try:
            schedule = OptimalSchedule(
                steps, units, stage_units, stiffly_accurate,
                initial_free=free, store=store, disk_units=disk_units,
            )  # fmt: skip
        except ConfigurationError:
            assert not free and (units + disk_units == 0 or store == "stages")
            continue
        machine = Machine(stage_units, stiffly_accurate, free)
        assert machine.run(schedule, steps) == schedule.extra_steps, (steps, units, free)
        assert machine.peak[RAM] <= units, (steps, units, free)
        assert machine.peak[DISK] <= disk_units, (steps, units, free)
        on_disk = max(on_disk, machine.peak[DISK])
        if disk_units == math.inf and store != "solutions":
            assert schedule.extra_steps == 0
        if units >= minimal_units(
            steps, stage_units, stiffly_accurate, initial_free=free, store=store
        ):
            alone = minimal_extra_steps(
                steps, units, stage_units, stiffly_accurate, initial_free=free, store=store
            )
            assert schedule.extra_steps <= alone
            if alone == 0 and store != "solutions":
                assert machine.peak[DISK] == 0
    assert on_disk > 0 or (store == "stages" and disk_units < stage_units)


# ------------------------------------------------------------------------------- online schedules


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(("stage_units", "stiffly_accurate"), KINDS)
def test_online_schedule_can_turn_round_anywhere(stage_units, stiffly_accurate, free):
    kinds = set()
    for units in (0, 1, 2, 3, 5, 8, 13, 20):
        if units == 0 and not free:
            continue
        schedule = OnlineSchedule(units, stage_units, stiffly_accurate, initial_free=free)
        for steps in (*range(1, 61), 100, 151):
            machine = Machine(stage_units, stiffly_accurate, free)
            extra = machine.run(schedule, steps)
            assert machine.peak[RAM] <= units and machine.peak[DISK] == 0, (steps, units)
            assert extra >= minimal_extra_steps(
                steps, units, stage_units, stiffly_accurate, initial_free=free
            )
            kinds |= machine.kinds
    assert (KeepEnd in kinds) == (stiffly_accurate and stage_units > 1)


@pytest.mark.parametrize("stiffly_accurate", [False, True])
@pytest.mark.parametrize("stage_units", [1, 2, 4, 7])
def test_online_schedule_is_nearly_optimal(stage_units, stiffly_accurate):
    for units in (5, 10, 20, 50):
        schedule = OnlineSchedule(units, stage_units, stiffly_accurate)
        done = 0
        for steps in (50, 70, 100, 200, 500, 1000, 2000):
            for step in range(done, steps):
                for _ in schedule.before_step(step):
                    pass
            done = steps
            extra = sum(type(action) is Advance for action in schedule.reverse(steps))
            least = minimal_extra_steps(steps, units, stage_units, stiffly_accurate)
            assert least <= extra <= 1.10 * least, (steps, units, extra, least)


# -------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("arguments", "keywords", "message"),
    [
        ((0, 5, 2, True), {}, "steps=0"),
        ((10, -1, 2, True), {}, "units=-1"),
        ((10, 2.5, 2, True), {}, "units=2.5"),
        ((10, 5, 0, True), {}, "stage_units=0"),
        ((10, 5, 2, True), {"store": "tape"}, "store='tape'"),
        ((10, 5, 2, True), {"disk_units": -1}, "disk_units=-1"),
        ((10, 0, 2, True), {}, "at least 1 unit"),
        ((10, 1, 2, True), {"store": "stages"}, "at least 2 unit"),
    ],
)
def test_bad_arguments(arguments, keywords, message):
    with pytest.raises(ConfigurationError, match=message):
        OptimalSchedule(*arguments, **keywords)


def test_online_schedule_needs_a_unit():
    with pytest.raises(ConfigurationError, match="units=0"):
        OnlineSchedule(0, 2, True)
    assert OnlineSchedule(0, 2, True, initial_free=True).units == 0

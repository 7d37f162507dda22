"""Every schedule is run through a symbolic machine that checks legality, storage and cost."""

from __future__ import annotations

import pytest

from pnode.adjoint.schedule import (
    Adjoint,
    Advance,
    Discard,
    Restore,
    StoreEverything,
    StoreStages,
)


class Machine:
    """Executes actions on step numbers instead of states."""

    def __init__(self):
        self.stored: set[int] = set()
        self.ready: int | None = None
        self.adjoint_at: int | None = None
        self.peak = 0
        self.advanced = 0

    def run(self, schedule, steps):
        for step in range(steps):
            self.execute(schedule.after_step(step), done=step)
        self.adjoint_at = steps
        self.execute(schedule.reverse(steps))
        assert self.adjoint_at == 0, "the adjoint did not reach the start"
        assert not self.stored, "checkpoints are left over"

    def execute(self, actions, done=None):
        for action in actions:
            match action:
                case StoreStages(step):
                    assert step == done, "stored a step that is not at hand"
                    assert step not in self.stored, "stored a step twice"
                    self.stored.add(step)
                    self.peak = max(self.peak, len(self.stored))
                case Restore(step):
                    assert step in self.stored, "restored a step that is not stored"
                    self.ready = step
                case Adjoint(step):
                    assert self.ready == step, "took an adjoint without the step's stages"
                    assert step == self.adjoint_at - 1, "took adjoints out of order"
                    self.adjoint_at = step
                case Discard(step):
                    self.stored.remove(step)
                case Advance():
                    self.advanced += 1
                case _:
                    raise AssertionError(f"unknown action {action}")


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 57])
def test_store_everything(steps):
    machine = Machine()
    machine.run(StoreEverything(), steps)
    assert machine.peak == steps
    assert machine.advanced == 0


def test_the_machine_sees_an_illegal_schedule():
    class Forgetful(StoreEverything):
        def reverse(self, steps):
            for action in super().reverse(steps):
                if not isinstance(action, Restore):
                    yield action

    with pytest.raises(AssertionError, match="without the step's stages"):
        Machine().run(Forgetful(), 3)

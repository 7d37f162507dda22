"""Checkpoint schedules: least costs, time per action, and what not knowing the number costs.

python benchmarks/schedule.py [--steps 1000000] [--online 10000]
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections import deque

from pnode.adjoint.online import OnlineSchedule
from pnode.adjoint.optimal import OptimalSchedule, Revolve, minimal_extra_steps
from pnode.adjoint.schedule import Advance

STEPS = (50, 100, 200, 500, 1000, 2000, 5000, 10000)
UNITS = (5, 10, 20, 50, 100)
STAGE_UNITS = (1, 2, 4, 7)


def offline(steps: int) -> None:
    """Print cost and time of whole schedules of many steps."""
    print(f"{steps} steps: extra steps, closed form (us), set-up (ms), per action (us)")
    cases = [(20, 4, False), (100, 4, False), (100, 4, True), (100, 1, True), (1000, 7, True)]
    for units, stage_units, accurate in cases:
        begin = time.perf_counter()
        cost = minimal_extra_steps(steps, units, stage_units, accurate)
        closed = time.perf_counter()
        schedule = OptimalSchedule(steps, units, stage_units, accurate)
        made = time.perf_counter()
        count = itertools.count()
        deque(zip(schedule.reverse(steps), count, strict=False), maxlen=0)
        done = time.perf_counter()
        actions = next(count) - 1
        kind = "stiffly accurate" if accurate else ""
        print(
            f"  units {units:5} stage units {stage_units} {kind:16}: {cost:9} "
            f"(Revolve {Revolve(steps, units).extra_steps:9}) {1e6 * (closed - begin):6.0f} "
            f"{1e3 * (made - closed):6.1f} {1e6 * (done - made) / actions:5.2f}  {actions} actions"
        )


def online(most: int) -> None:
    """Print the greatest ratios to the offline optimum over the units."""
    numbers = [steps for steps in STEPS if steps <= most]
    print("online / optimal extra steps, greatest over units", UNITS, "(all steps in brackets)")
    print(f"{'':22}" + "".join(f"{steps:>15}" for steps in numbers))
    for stage_units, accurate in itertools.product(STAGE_UNITS, (False, True)):
        worst = dict.fromkeys(numbers, (1.0, 1.0))
        for units in UNITS:
            schedule = OnlineSchedule(units, stage_units, accurate)
            done = 0
            for steps in numbers:
                for step in range(done, steps):
                    deque(schedule.before_step(step), maxlen=0)
                done = steps
                extra = sum(type(action) is Advance for action in schedule.reverse(steps))
                least = minimal_extra_steps(steps, units, stage_units, accurate)
                ratio = extra / least if least else 1.0 + extra
                whole = (steps + extra) / (steps + least)
                worst[steps] = max(worst[steps][0], ratio), max(worst[steps][1], whole)
        cells = (f"{ratio:.3f} ({whole:.3f})" for ratio, whole in worst.values())
        row = "".join(f"{cell:>15}" for cell in cells)
        print(f"l = {stage_units} {'stiffly accurate' if accurate else '':16}{row}", flush=True)


def main() -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10**6)
    parser.add_argument("--online", type=int, default=STEPS[-1])
    arguments = parser.parse_args()
    offline(arguments.steps)
    online(arguments.online)


if __name__ == "__main__":
    main()

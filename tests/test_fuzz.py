"""Random combinations of what a solve can be asked for: exact gradients, or a typed refusal.

The same cases in every run. More of them, others each time: ``PNODE_FUZZ=500 pytest`` this file
(500 of each family of methods).
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

import pnode
from pnode import CheckpointError, ConfigurationError
from pnode.solvers.methods import METHODS, find_method

MORE = int(os.environ.get("PNODE_FUZZ", "0"))
FAMILIES: dict[str, list[str]] = {}
for _method in METHODS:
    _kind = "theta" if _method.ts_type in ("beuler", "cn", "theta") else _method.ts_type
    FAMILIES.setdefault(_kind, []).append(_method.name)

#: Parts of the state, flattened below to rows of equal length.
SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "scalar": ((),), "vector": ((3,),), "batch": ((2, 3),), "tuple": ((2,), ()), "pair": ((2,),) * 2
}  # fmt: skip
#: Entries of the state that f lets look at each other.
WIDTH = {"scalar": 1, "vector": 3, "batch": 3, "tuple": 3, "pair": 4}
#: States that "block" is for; and where no entry is seen to look at another: the implicit part of
#: the split problem, and without a step.
ROWS = (("batch",), ("batch", "vector"))
FORMS = (
    "rhs", "imex", "mass", "singular mass", "residual", "algebraic residual", "imex_mass"
)  # fmt: skip
JACOBIANS = ("auto", "dense", "block", "sparse", "matrix-free")
#: Output times after the first, and which outputs the loss looks at (of three).
SPANS = {"none": (0.0,), "one": (0.0, 0.7), "two": (0.0, 0.3, 0.7)}
SEEN = {"all": (0, 1, 2), "start": (0,), "middle": (1,), "end": (2,)}


@dataclass(frozen=True)
class Case:
    """One combination; the defaults are the simplest, and are not printed."""

    method: str
    form: str = "rhs"
    shape: str = "vector"
    dtype: torch.dtype = torch.float64
    jacobian: str = "auto"
    reuse: str = "iteration"
    store: str = "auto"
    #: States that checkpoints may hold in memory, besides the stages of one step.
    states: int | None = None
    disk: bool = False
    reproducible: bool = False
    dense: bool = False
    step_size: float | None = 0.1
    #: First adaptive step, where it is to be too long.
    first_step: float | None = None
    start: float = 0.0
    direction: float = 1.0
    autonomous: bool = True
    time_gradient: bool = False
    span: str = "two"
    seen: str = "all"
    #: Whose gradients are asked for.
    wanted: str = "all"
    event: bool = False
    #: Whether the solver solves something else between forward and backward sweep.
    disturbed: bool = False

    def __repr__(self) -> str:
        given = [
            f"{item.name}={getattr(self, item.name)!r}"
            for item in fields(self)
            if getattr(self, item.name) != item.default
        ]
        return f"Case({', '.join(given)})"

    @property
    def size(self) -> int:
        """Entries of the state."""
        return sum(torch.Size(shape).numel() for shape in SHAPES[self.shape])

    @property
    def memory(self) -> int | None:
        """The limit in bytes; PETSc's states are double."""
        if self.states is None:
            return None
        row = find_method(self.method)
        return max(1, (row.stage_units + self.states) * self.size * 8)


#: Known faults: combinations that go wrong, none of which is drawn. To be emptied.
EXCLUDED: dict[str, Callable[[Case], bool]] = {
    # These have a gradient (test_checkpointing.py) or are refused as solves with steps are; which
    # of the two the prediction below does not know.
    "a single output time and a limit, with dense=True or an event": lambda case: (
        case.span == "none" and case.states is not None and (case.dense or case.event)
    ),
}
#: Known faults: where gradients are the same but for round-off, and are to be so in every bit.
INEXACT: dict[str, Callable[[Case], bool]] = {
    # Repeated steps differ from those of the forward sweep by round-off.
    "adaptive steps, matrix-free": lambda case: (
        case.step_size is None and case.jacobian == "matrix-free"
    ),
    # A repeated step begins with the Jacobian of another one than in the forward sweep, so that
    # Newton's method ends at other bits.
    "reproducible=True with jacobian_reuse='solve'": lambda case: case.reuse == "solve",
}


@st.composite
def cases(draw: st.DrawFn, family: str) -> Case:
    """Draw combinations that make sense mostly, and others too."""
    name = draw(st.sampled_from(FAMILIES[family]))
    row = find_method(name)
    own = [form for form in FORMS if form.split()[-1] in row.forms] or ["rhs"]
    rarely = draw(st.integers(0, 9)) == 9
    form = draw(st.sampled_from(FORMS if rarely else own))
    shapes = tuple(SHAPES) if rarely or "separable" not in row.forms else ("pair",)
    fixed = [0.1, 0.15] if not row.adaptive and not rarely else [0.1, 0.15, None]
    limited = draw(st.booleans())
    stores = (
        ("auto", "stages") if not row.keeps_graphs and not rarely else ("auto", "stages", "tape")
    )
    case = Case(
        method=name,
        form=form,
        shape=draw(st.sampled_from(shapes)),
        dtype=draw(st.sampled_from([torch.float64, torch.float64, torch.float32])),
        jacobian=draw(st.sampled_from(JACOBIANS)) if row.implicit else "auto",
        reuse=draw(st.sampled_from(["iteration", "step", "solve"]))
        if row.implicit
        else "iteration",
        store=draw(st.sampled_from((*stores, "solutions") if limited else stores)),
        states=draw(st.integers(0, 12)) if limited else None,
        disk=limited and draw(st.booleans()),
        reproducible=draw(st.booleans()),
        dense=draw(st.booleans()),
        step_size=draw(st.sampled_from(fixed)),
        start=draw(st.sampled_from([0.0, 1.7])),
        direction=draw(st.sampled_from([1.0, -1.0])),
        autonomous=draw(st.booleans()),
        time_gradient=draw(st.booleans()),
    )
    if draw(st.booleans()):
        case = replace(
            case,
            span=draw(st.sampled_from(list(SPANS))),
            seen=draw(st.sampled_from(list(SEEN))),
            wanted=draw(st.sampled_from(["all", "state", "parameters"])),
            event=draw(st.booleans()),
            disturbed=draw(st.booleans()),
            step_size=draw(st.sampled_from([*fixed, 0.7])),
            first_step=draw(st.sampled_from([None, 0.6])),
        )
    assume(not any(known(case) for known in EXCLUDED.values()))
    return case


# ------------------------------------------------------------------------------------- the problem


class Problem(torch.nn.Module):
    """A smooth field on the state's rows, its parts, and what makes an equation of it."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        generator = torch.Generator().manual_seed(3)
        width = WIDTH[case.shape]
        weight = 0.7 * torch.randn(width, width, generator=generator, dtype=torch.float64)
        self.weight = torch.nn.Parameter(weight.to(case.dtype))
        self.rate = torch.nn.Parameter(torch.linspace(0.5, 1.5, width).to(case.dtype))
        self.separable = "separable" in find_method(case.method).forms

    def rows(self, y):
        parts = y if isinstance(y, tuple) else (y,)
        flat = torch.cat([part.reshape(-1) for part in parts])
        return flat.reshape(-1, WIDTH[self.case.shape])

    def shaped(self, rows):
        parts, flat = [], rows.reshape(-1)
        for shape in SHAPES[self.case.shape]:
            number = torch.Size(shape).numel()
            parts.append(flat[:number].reshape(shape))
            flat = flat[number:]
        return tuple(parts) if len(parts) > 1 else parts[0]

    def clock(self, t):
        return 1.0 if self.case.autonomous else torch.cos(2.0 * t)

    def growth(self, t, y):
        return self.shaped(torch.tanh(self.rows(y) @ self.weight) * self.clock(t))

    def decay(self, t, y):
        return self.shaped(-self.rate * self.rows(y))

    def both(self, t, y):
        rows = self.rows(y)
        slope = torch.tanh(rows @ self.weight) * self.clock(t) - self.rate * rows
        if self.separable and self.case.shape == "pair":
            q, p = rows[:, :2], rows[:, 2:]
            slope = torch.cat([torch.tanh(p @ self.weight[:2, :2]), -self.rate[:2] * q**3], dim=1)
            slope = slope * self.clock(t)
        if self.algebraic:
            z = 0.5 * torch.sin(rows[:, :-1].sum(1)) + self.rate[-1] * self.clock(t) - rows[:, -1]
            slope = torch.cat([slope[:, :-1], z.unsqueeze(1)], dim=1)
        return self.shaped(slope)

    @property
    def algebraic(self):
        """Whether the last entry of a row has an algebraic equation."""
        return self.case.form in ("singular mass", "algebraic residual")

    def diagonal(self):
        entries = torch.linspace(1.0, 2.0, self.case.size, dtype=self.case.dtype)
        if self.algebraic:
            entries.reshape(-1, WIDTH[self.case.shape])[:, -1] = 0.0
        return entries

    def residual(self, t, y, yp):
        slope, rate = self.rows(self.both(t, y)), self.rows(yp)
        return self.shaped(self.diagonal().view_as(rate) * (rate + 0.05 * rate**3) - slope)

    def keywords(self):
        """How the solver is told of it."""
        form = self.case.form
        if form == "rhs":
            return {"rhs": self.both}
        if form == "imex":
            return {"implicit": self.decay, "explicit": self.growth}
        if form == "imex_mass":
            parts = {"implicit": self.decay, "explicit": self.growth}
            return {**parts, "mass": self.diagonal()}
        keywords = {"consistent_start": self.algebraic}
        if form in ("mass", "singular mass"):
            return {"rhs": self.both, "mass": self.diagonal(), **keywords}
        return {"residual": self.residual, **keywords}

    def event_fn(self, t, y):
        """Change sign where the first entry has grown a little."""
        return self.rows(y)[0, 0] + 0.55

    def initial(self):
        values = torch.linspace(-0.6, 0.9, self.case.size, dtype=self.case.dtype).reshape(-1)
        state = self.shaped(values)
        return [part.clone().requires_grad_() for part in self.parts(state)]

    @staticmethod
    def parts(state):
        return state if isinstance(state, tuple) else (state,)


def solver_of(case: Case, problem: Problem, checkpointing: pnode.Checkpointing) -> pnode.Solver:
    row = find_method(case.method)
    options: dict[str, float] = {}
    if row.implicit and case.dtype is torch.float64:
        if row.ts_type != "rosw":
            options = {"snes_rtol": 1e-14, "snes_stol": 1e-14}
        if case.jacobian == "matrix-free":
            options["ksp_rtol"] = 1e-13
    tolerance = 1e-3 if row.order == 1 or case.dtype is torch.float32 else 1e-5
    return pnode.Solver(
        **problem.keywords(),
        params=problem.parameters(),
        method=case.method,
        step_size=case.step_size,
        first_step=None if case.step_size else case.first_step,
        rtol=tolerance,
        atol=tolerance,
        max_steps=2000,
        jacobian=case.jacobian,
        jacobian_reuse=case.reuse,
        checkpointing=checkpointing,
        petsc_options=options,
        dense=case.dense,
        event_fn=problem.event_fn if case.event else None,
    )


def times_of(case: Case) -> torch.Tensor:
    span = torch.tensor(SPANS[case.span], dtype=torch.float64)
    return (case.start + case.direction * span).requires_grad_(case.time_gradient)


def limits_of(case: Case, folder: str) -> pnode.Checkpointing:
    return pnode.Checkpointing(
        memory=case.memory,
        disk=folder if case.disk else None,
        store=case.store,
        reproducible=case.reproducible,
    )


class Outcome:
    """A solve, its loss, and the gradients of that, twice."""

    def __init__(self, case: Case, checkpointing: pnode.Checkpointing, disturbed: bool) -> None:
        self.case, self.problem = case, Problem(case)
        self.solver = solver_of(case, self.problem, checkpointing)
        y0, t = self.problem.initial(), times_of(case)
        for name, tensors in (("state", y0), ("parameters", self.problem.parameters())):
            for x in tensors:
                x.requires_grad_(case.wanted in ("all", name))
        #: What can be moved for differences; what gradients are asked for.
        self.movable = [x for x in (*y0, *self.problem.parameters()) if x.requires_grad]
        self.inputs = [*self.movable, *([t] if case.time_gradient else [])]
        self.y0 = y0
        self.solution = self.solver(self._state(), t)
        self.loss = loss_of(self.solution, case.seen)
        if disturbed:
            other = self.solver(self._state(), t.detach() + 0.1)
            loss_of(other, "all").backward(inputs=self.movable)
            for x in self.movable:
                x.grad = None
        self.gradients = self._gradients(retain_graph=True)
        self.recomputed = self.solution.stats.backward.recomputed
        self.again = self._gradients(retain_graph=False)

    def _state(self):
        return tuple(self.y0) if len(self.y0) > 1 else self.y0[0]

    def _gradients(self, retain_graph):
        found = torch.autograd.grad(
            self.loss, self.inputs, retain_graph=retain_graph, allow_unused=True
        )
        return [
            torch.zeros_like(x) if g is None else g for g, x in zip(found, self.inputs, strict=True)
        ]

    def loss_at(self, direction, size):
        """Return the loss at inputs moved along a direction (without the output times)."""
        saved = [x.detach().clone() for x in self.movable]
        with torch.no_grad():
            for x, d in zip(self.movable, direction, strict=True):
                x.add_(d, alpha=size)
            value = loss_of(self.solver(self._state(), times_of(self.case)), self.case.seen)
            for x, before in zip(self.movable, saved, strict=True):
                x.copy_(before)
        return float(value)


def loss_of(solution: pnode.Solution, seen: str) -> torch.Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for part in Problem.parts(solution.ys):
        last = len(part) - 1
        chosen = part[sorted({min(index, last) for index in SEEN[seen]})].double()
        weights = torch.cos(torch.arange(chosen.numel(), dtype=torch.float64)).view(chosen.shape)
        total = total + (weights * chosen).sum() + 0.5 * chosen.square().sum()
    return total


# -------------------------------------------------------------------------------------- the checks


def refusal(case: Case) -> str | None:
    """Return why a combination is documented not to work; None where it has to."""
    row = find_method(case.method)
    wanted = {"rhs": ("rhs", "separable")}.get(case.form, (case.form.split()[-1],))
    reasons = {
        "the problem's form": not set(wanted) & set(row.forms),
        "symplectic methods take a pair": "separable" in row.forms and case.shape != "pair",
        "no error estimate": case.step_size is None and not row.adaptive,
        "steps leave the algebraic equations": case.form == "singular mass"
        and not row.solves_constraints,
        "a mass matrix of zeros": case.form == "singular mass" and case.shape == "scalar",
        "blocks need one tensor of independent rows": (
            row.implicit
            and case.jacobian == "block"
            and case.shape not in ROWS[case.form.startswith("imex") or case.span == "none"]
        ),
        "nothing to reuse": case.reuse != "iteration" and case.jacobian == "matrix-free",
        "coupled stages take Jacobians when they have to": row.coupled
        and case.reuse not in ("auto", "iteration"),
        "graphs of explicit stages alone": case.store == "tape" and not row.keeps_graphs,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def steps_of(case: Case) -> int | None:
    """Return the number of fixed steps; None where it is not known in advance."""
    if case.span == "none":
        return 0
    if case.step_size is None or case.event:
        return None
    span = SPANS[case.span]
    span = (span[0], span[-1]) if case.dense else span
    pieces = [after - before for before, after in itertools.pairwise(span)]
    return sum(math.ceil(piece / case.step_size - 1e-9) for piece in pieces)


def too_little_memory(case: Case) -> bool | None:
    """Return whether the limits are documented to be too narrow; None where that depends."""
    row, steps = find_method(case.method), steps_of(case)
    if case.store == "solutions" and (case.states is None or case.disk or not row.restarts):
        return True if steps != 0 else None
    if case.states is not None and not row.restarts:
        return None
    if case.states is None or case.disk:
        return False
    if steps == 0:
        return None if case.step_size is None else False
    if steps is None:
        return None
    try:
        pnode.plan(case.method, steps, 8 * case.size, memory=case.memory, store=case.store)
    except ConfigurationError:
        return True
    return False


def close(ours, theirs, tolerance):
    """Whether gradients agree, in the norm of all of them."""
    difference = sum(
        float((a - b).double().square().sum()) for a, b in zip(ours, theirs, strict=True)
    )
    size = sum(float(b.double().square().sum()) for b in theirs)
    return difference <= tolerance**2 * size


def equal(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def check_limits(case: Case, outcome: Outcome) -> None:
    """What the ledger and the plan say of memory."""
    stats = outcome.solution.stats
    if case.memory is not None:
        for ledger in (stats, stats.backward):
            assert ledger.ram_bytes + 0 <= case.memory
            assert ledger.tape_bytes <= case.memory
    elif outcome.recomputed:
        raise AssertionError("a step was repeated without a limit")
    row, steps = find_method(case.method), steps_of(case)
    if steps is None:
        return
    assert stats.steps == steps
    whole = case.seen in ("all", "end") or (case.seen, case.span) == ("middle", "one")
    if steps and row.restarts and case.dtype is torch.float64 and whole:
        planned = pnode.plan(
            case.method, steps, 8 * case.size, memory=case.memory, store=case.store,
            disk=tempfile.gettempdir() if case.disk else None,
        )  # fmt: skip
        assert outcome.recomputed == planned.recomputed
        assert max(stats.ram_bytes, stats.backward.ram_bytes) == planned.ram_bytes


def check_differences(outcome: Outcome) -> None:
    """Differences of fourth order along one direction, of the numbers that the solver returns."""
    generator = torch.Generator().manual_seed(11)
    direction = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in outcome.movable
    ]
    h = 1e-3

    def centred(size):
        return outcome.loss_at(direction, size) - outcome.loss_at(direction, -size)

    expected = (8 * centred(h) - centred(2 * h)) / (12 * h)
    gradients = outcome.gradients[: len(direction)]
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, direction, strict=True))
    norms = [sum(float(x.square().sum()) for x in xs) ** 0.5 for xs in (gradients, direction)]
    assert abs(slope - expected) <= 1e-9 * norms[0] * norms[1]


def check(case: Case) -> None:
    """Solve with the limits of the case and without, and compare."""
    with tempfile.TemporaryDirectory() as folder:
        refused, short = refusal(case), too_little_memory(case)
        try:
            outcome = Outcome(case, limits_of(case, folder), case.disturbed)
        except ConfigurationError:
            assert refused or short is not False, "refused without a documented reason"
            return
        except CheckpointError:
            # BDF goes on from the states of several steps, and cannot know how many there will be.
            assert not refused and short is None and not find_method(case.method).restarts
            return
        finally:
            assert not os.listdir(folder)
        assert not refused and not short, f"not refused: {refused or 'too little memory'}"
    row = find_method(case.method)
    for gradient, tensor in zip(outcome.gradients, outcome.inputs, strict=True):
        assert gradient.shape == tensor.shape and gradient.dtype is tensor.dtype
        assert gradient.isfinite().all()
    check_limits(case, outcome)
    other = "stages" if case.states is None and case.store != "stages" else "auto"
    unlimited = Outcome(
        case, pnode.Checkpointing(store=other, reproducible=case.reproducible), False
    )
    parts = Problem.parts(outcome.solution.ys)
    assert equal(parts, Problem.parts(unlimited.solution.ys))
    tolerance = 1e-12 if case.dtype is torch.float64 else 1e-5
    known = any(known(case) for known in INEXACT.values())
    for others in (unlimited.gradients, outcome.again):
        if known:
            # By what Newton's method leaves, which for float32 has its default tolerance.
            within = 1e-6 if case.dtype is torch.float64 else 1e-3
            assert close(outcome.gradients, others, within)
        elif case.reproducible or (row.same_bits and case.reuse != "solve"):
            assert equal(outcome.gradients, others)
        else:
            assert close(outcome.gradients, others, tolerance)
    if case.step_size is not None and case.dtype is torch.float64 and not case.event:
        check_differences(outcome)


@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=MORE or 100 // len(FAMILIES) + 1,
    derandomize=not MORE,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.generate, Phase.shrink),
    print_blob=False,
)
@given(data=st.data())
def test_gradients_of_random_combinations(family, data):
    check(data.draw(cases(family)))


def test_a_gradient_that_is_slightly_wrong_is_seen():
    outcome = Outcome(Case("cn", step_size=0.7), pnode.Checkpointing(), False)
    check_differences(outcome)
    outcome.gradients = [(1.0 + 1e-7) * gradient for gradient in outcome.gradients]
    with pytest.raises(AssertionError):
        check_differences(outcome)


def test_every_case_of_the_known_faults_can_be_drawn_again():
    """The lists are to be emptied: they hold conditions of cases and nothing else."""
    for known in (*EXCLUDED.values(), *INEXACT.values()):
        assert known(Case("bdf")) is False

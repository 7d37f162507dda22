"""Whole sweeps of implicit methods on small problems: which there are, and their settings."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from pnode.base.communicators import allreduce
from pnode.base.vectors import REAL
from pnode.field.vectorfield import VectorField
from pnode.problems.checkpointing import Checkpointing
from pnode.problems.mass import MassMatrix
from pnode.solvers.compiled.backend import Backend, Checked, Compilation, Trace, Wanted
from pnode.solvers.compiled.budgets import Budget
from pnode.solvers.compiled.colored import colored
from pnode.solvers.compiled.compiler import bare
from pnode.solvers.compiled.driver import CompiledSweep
from pnode.solvers.compiled.evaluations import agree
from pnode.solvers.compiled.fields import field_code
from pnode.solvers.compiled.graph_programs import GraphProgram, is_linear
from pnode.solvers.compiled.implicit_settings import decisions, prepared, scheme_of, tolerance
from pnode.solvers.compiled.partial_steps import CompiledParts
from pnode.solvers.compiled.programs import MOST_STAGES, ImplicitProgram, Program
from pnode.solvers.compiled.second_graphs import SecondGraphs
from pnode.solvers.compiled.shown_steps import ShownSteps
from pnode.solvers.compiled.split_programs import SplitProgram
from pnode.solvers.compiled.trace import FieldGraph, Untraceable
from pnode.solvers.methods import Method
from pnode.solvers.step_control import automatic_step

__all__ = ["JACOBIANS", "ImplicitSweeps"]

#: Why there are no whole sweeps with other Jacobians.
JACOBIANS = (
    "implicit methods are compiled with jacobian='dense', 'sparse' or 'block', fully implicit "
    "ones, M y' = f(t, y) and F(t, y, y') = 0 with 'dense' alone, and jacobian_reuse='auto', "
    "'iteration' or 'constant'; theta, DIRK, IMEX and BDF methods with 'matrix-free', too"
)

# Larger fields and matrices are torch's and LAPACK's, and those beyond that PETSc's.
_LARGEST_SCALARS, _LARGEST_STATE = 32, 256
# States are on the stack, two of each stage, of Rosenbrock methods five.
_LARGEST_SPARSE, _LARGEST_SPARSE_ROSENBROCK = 1 << 14, 1 << 12
_UNLIKE = "the ranks' parts of the state are solved for in different ways, by size or by f"


class ImplicitSweeps(Backend):
    """Sweeps of implicit methods, on programs of scalars or on compiled graphs."""

    implicit: bool | None = True
    #: Kinds of methods.
    kinds: tuple[str, ...] = ("implicit", "imex")
    #: Whether graphs serve where scalars do not.
    graphs = True
    #: Whether ranks repeat the steps of Newton's method of all, in a backward sweep too.
    repeat = False
    #: Whether they are for products alone, of states of one process; None: for all.
    free: bool | None = False

    def is_for(self, wanted: Wanted) -> bool:
        """Whether it is for methods and states of this kind."""
        settings = wanted.settings
        shared = wanted.ghosts or settings.parallel
        free = settings.jacobian == "matrix-free" and not shared
        return self.free in (None, free) and super().is_for(wanted)

    def refuses(self, wanted: Wanted) -> str | None:
        """Return why there are no such sweeps for a solve, whatever the field."""
        settings, method = wanted.settings, wanted.settings.method
        looked_at = bool(wanted.watched) or wanted.dense
        if "callbacks" in wanted.watched or (settings.parallel and looked_at):
            return (
                "odeint's callbacks look at attempts of implicit methods, and events, monitors and "
                "dense=True at single steps of states that ranks share"
            )
        if settings.parallel and allreduce() is None:
            return "machine code does not find MPI_Allreduce"
        iterates = not method.linearly_implicit
        alone = settings.parallel and iterates and not self.repeat
        if alone and wanted.keep and wanted.checkpointing.may_repeat:
            return (
                "Newton's method of all ranks is not repeated in a backward sweep: of "
                "checkpointing= drop memory= and store='solutions'"
            )
        if wanted.keep and not self._keeps(wanted.checkpointing):
            return (
                "of implicit methods checkpoints are kept in memory alone: of checkpointing= drop "
                "disk=, resume= and device_memory="
            )
        # They have Newton's methods and error estimates of their own.
        own = method.multistep or method.coupled
        if settings.form == "imex_mass":
            return "implicit= and explicit= beside mass= are not compiled"
        if settings.integrals and method.coupled:
            return f"cost= is not compiled with method={method.name!r}, whose stages are coupled"
        if method.kind not in self.kinds:
            return f"method={method.name!r} is not compiled so far"
        if method.scheme is not None and method.scheme.stages > MOST_STAGES:
            return f"method={method.name!r} has more than {MOST_STAGES} stages"
        if settings.adaptive and not own and scheme_of(method).b_embedded is None:
            return f"method={method.name!r} is compiled for fixed steps only: give step_size"
        if method.multistep and bool((tolerance(settings, "atol") == 0.0).any()):
            return "BDF is compiled for atol without zeros"
        more, dense = settings.jacobian_options, settings.jacobian == "dense"
        if not (dense or self._takes_entries(wanted)) or more.reuse in ("step", "solve"):
            return JACOBIANS
        most = _LARGEST_SPARSE_ROSENBROCK if method.linearly_implicit else _LARGEST_SPARSE
        most = _LARGEST_STATE if dense else most
        most = most if self.graphs else _LARGEST_SCALARS
        if settings.size > most:
            return f"method={method.name!r} is compiled for up to {most} state entries"
        if settings.dtype is not torch.float64:
            return "implicit methods are compiled in float64 only"
        if strange := wanted.strange_controller:
            return strange
        return None

    def _takes_entries(self, wanted: Wanted) -> bool:
        """Whether a solve's Jacobian is one of few colors, which there are sweeps for."""
        settings = wanted.settings
        more, method = settings.jacobian_options, settings.method
        if settings.jacobian not in ("sparse", "block") or more.exchange is not None:
            return False
        # Where a matrix changes, one that "auto" found may come to miss entries.
        found = more.found and settings.form != "imex"
        other = method.coupled or settings.form in ("mass", "residual")
        return self.graphs and not (other or found)

    def _keeps(self, chosen: Checkpointing) -> bool:
        """Whether checkpoints are kept as is asked for."""
        return chosen.disk is None and chosen.device_memory is None

    def _compile(
        self, trace: Trace, part: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> ImplicitProgram:
        method = wanted.settings.method
        steps = kind_of(method)
        if method.kind == "imex" and part.explicit is None:
            steps = "explicit"  # the part without a Jacobian
        known = None
        if steps != "explicit":
            settings = wanted.settings
            options = settings.jacobian_options
            if options.reuse == "constant" and not is_linear(trace.graph):
                raise Untraceable(
                    "jacobian_reuse='constant', and its graph does not show that the Jacobian "
                    "depends on neither t nor y"
                )
            if options.found and not is_linear(trace.graph):
                raise Untraceable("the structure of its Jacobian was only found, and may change")
            known = colored(trace.codes, settings.jacobian, options, part, y0)
        key = (ImplicitSweeps, steps, known)
        if key not in trace.codes:
            program: ImplicitProgram | None = None
            if known is None and wanted.settings.size <= _LARGEST_SCALARS:
                program = self._scalars(trace, part, y0, steps)
            if program is None and any(x.dtype is not REAL for x in part.problem.parameters):
                raise Untraceable("it is differentiated by tensors that are not float64")
            if program is None:
                code = field_code(trace, part, wanted)
                second = None
                if steps == "rosenbrock":  # read what the other graphs read
                    second = SecondGraphs(part, trace.graph, y0).bound(trace.graph, code.traced)
                t = part.problem.direction * part.problem.times[0]
                time = torch.scalar_tensor(t, dtype=REAL)
                program = GraphProgram(code, steps, time, y0, second, known)
            trace.codes[key] = program
        made: ImplicitProgram = trace.codes[key]
        for one in (wanted, wanted.parts):
            if steps != "explicit" and one is not None:
                prepared(made, one)
        return made

    def _scalars(
        self, trace: Trace, part: VectorField, y0: torch.Tensor, steps: str
    ) -> Program | None:
        """Return a program of scalars, or None where graphs can do what it cannot."""
        try:
            program = self._program(trace.graph, part, steps)
            _check(program, part, y0, steps == "rosenbrock")
        except Untraceable:
            if not self.graphs:
                raise
            return None
        return program

    def _program(self, graph: FieldGraph, part: VectorField, steps: str) -> Program:
        return Program(graph, part.problem.parameters, steps)

    def begin(
        self, checked: Sequence[Checked], field_: VectorField, y0: torch.Tensor, wanted: Wanted
    ) -> Compilation:
        """Return the sweep."""
        program: Any = checked[0].code
        if len(checked) > 1:
            program = SplitProgram(program, checked[1].code)
        problem, parts = field_.problem, wanted.parts
        if not _alike(checked[0].code, wanted, field_):
            return Compilation(reasons=(_UNLIKE,))
        first = _first_step(field_, y0, wanted)
        stand = partial(_stand_at, program, checked[0].code, y0, problem.mass)
        handle = stand(wanted)
        budget = Budget()
        if wanted.keep and wanted.budget is not None:
            budget = wanted.budget(problem)
        if "cuts" in wanted.watched and wanted.settings.method.carries_slope:
            budget = budget._replace(fresh=True)  # as EventLocator.before_step has it
        sweep = CompiledSweep(
            program, handle, None, problem, wanted.settings, wanted.control, wanted.keep,
            first, budget, wanted.dense,
        )  # fmt: skip
        if wanted.watched:
            trial = stand(parts) if parts is not None and "events" in wanted.watched else None
            sweep.watch(ShownSteps(wanted.settings, y0), trial)
        if parts is not None and wanted.dense:
            sweep.parts = CompiledParts(program, stand(parts), problem.direction)
        return Compilation(sweep, captured=tuple(program.captured))


def _alike(code: ImplicitProgram, wanted: Wanted, field_: VectorField) -> bool:
    """Whether Newton's methods of all ranks decide alike by the same sums. Collective."""
    ranks = field_.problem.ranks
    if not ranks.parallel or wanted.settings.method.linearly_implicit:
        return True
    least, most = ranks.extremes(zlib.crc32(repr(decisions(code, wanted)).encode()))
    return least == most


def _first_step(field_: VectorField, y0: torch.Tensor, wanted: Wanted) -> float:
    """Return the first step of an adaptive sweep, 0 where its kernel chooses. Collective."""
    problem, control, settings = field_.problem, wanted.control, wanted.settings
    given = control.first_step
    if not (problem.ranks.parallel and settings.adaptive):
        return given or 0.0
    start, end = problem.times[:2]
    order = settings.method.first_order
    automatic = automatic_step(field_, y0.detach(), settings, order, start, end, control)
    return automatic if given is None else min(given, automatic)


def _stand_at(
    program: Any, implicit: ImplicitProgram, y0: torch.Tensor, mass: MassMatrix | None,
    wanted: Wanted,
) -> int:  # fmt: skip
    """Return a kernel at a state."""
    settings = prepared(implicit, wanted)
    if mass is None:
        handle: int = program.stand_at(settings, y0)
        return handle
    settings = _with_mass(settings, mass, wanted.settings.method)
    return implicit.stand_at(settings, y0, _matrices(settings, mass))


def _with_mass(settings: Any, mass: MassMatrix, method: Method) -> Any:
    """Return settings in C for a mass matrix: a singular one leaves equations in t."""
    if not method.linearly_implicit:
        return settings
    own = type(settings).from_buffer_copy(settings)
    own.time_slope = scheme_of(method).needs_slope_of(mass)
    return own


def _matrices(settings: Any, mass: MassMatrix) -> torch.Tensor:
    """Return a mass matrix as ``stand_at`` takes it: see ``dirk_steps.cpp``."""
    if not settings.explicit_first:
        return mass.dense()
    unit = torch.eye(mass.size, dtype=REAL)
    inverse = mass.solve(unit).T
    reached = mass.dense() @ inverse if mass.singular else unit
    return torch.stack([mass.dense(), inverse, reached])


def kind_of(method: Method) -> str:
    """Return which file has a method's steps."""
    if method.multistep or method.coupled:
        return "bdf" if method.multistep else "coupled"
    if method.linearly_implicit:
        return "rosenbrock"
    return "dirk" if method.implicit else "explicit"


def _check(program: Program, part: VectorField, y0: torch.Tensor, rosenbrock: bool) -> None:
    """Compare the derivatives with the field's own near y0."""
    problem, field = part.problem, bare(part)
    generator = torch.Generator().manual_seed(1)
    noise, w, v = torch.randn(3, len(y0), generator=generator, dtype=REAL)
    w = w[: math.prod(program.traced.returned)]
    y = y0.detach() + 1e-2 * noise * (1.0 + y0.detach().abs())
    s, direction = problem.times[0] + 0.1, problem.direction
    here = field.linearize(s, y.clone(), differentiate_time=rosenbrock)
    f, back, *sums = program.products(direction * s, y, w)
    expected = here.vjp(w)
    pairs = [(f * direction, here.flat_value()), (back * direction, expected.state)]
    pairs += _matched(program, [mu * direction for mu in sums], expected.parameters)
    if rosenbrock:
        _, back, *sums = program.products(direction * s, y, w, v * direction)
        second = here.second_vjp(w[None], v[None], torch.ones(1, dtype=REAL))
        pairs.append((back, second.state))
        pairs += _matched(program, sums, second.parameters)
    if not all(agree(a, b) for a, b in pairs):
        raise Untraceable(
            "its derivatives are not those of its scalar operations: does it define some of its "
            "own?"
        )


def _matched(
    program: Program, sums: list[torch.Tensor], expected: Sequence[torch.Tensor | None]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the gradients in pairs; what is None is zero."""
    found = dict(program.gradients(sums))
    pairs = []
    for index, b in enumerate(expected):
        a = found.get(index)
        if a is not None or b is not None:
            like = a if b is None else b
            assert like is not None
            pairs.append(tuple(torch.zeros_like(like) if x is None else x for x in (a, b)))
    return pairs  # type: ignore[return-value]

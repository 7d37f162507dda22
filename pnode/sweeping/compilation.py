"""Whether a solve is compiled: at once, never, or once that has come to pay.

See :mod:`pnode.solvers.compiled.account` for the rule of ``compile="auto"``.
"""

from __future__ import annotations

import time
import weakref
from dataclasses import astuple, replace
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pnode.adjoint.identity import describe
from pnode.base.notices import LOG
from pnode.base.ranks import Ranks
from pnode.base.surroundings import modules_within, owner
from pnode.field.rebinding import Rebound
from pnode.field.stacked import stacked
from pnode.field.vectorfield import VectorField
from pnode.field.watching import unwatched
from pnode.layout.ghost_cells import DrivenCells
from pnode.problems.calls import brings_tensors
from pnode.problems.checkpointing import Checkpointing
from pnode.solvers.compiled.account import Entry, Work
from pnode.solvers.compiled.backend import Compilation, Wanted
from pnode.solvers.compiled.compiler import bare
from pnode.solvers.compiled.evaluations import local
from pnode.solvers.compiled.guards import Asks
from pnode.solvers.compiled.inductor import cache_folder
from pnode.sweeping.driven_outputs import interpolant
from pnode.sweeping.engine import Engine
from pnode.sweeping.partial_steps import inner_points
from pnode.sweeping.recording import new_budget
from pnode.sweeping.run import Requests, Run

__all__ = ["begin"]

_ATEN = torch.ops.aten
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


def begin(
    engine: Engine, run: Run, field: VectorField, y0: torch.Tensor, keep: bool, requests: Requests
) -> Compilation | None:
    """Return what of a solve is compiled; None for nothing. Collective.

    What it depends on is the same on all ranks, or agreed upon.

    Parameters
    ----------
    engine : Engine
        Compiles, and keeps the account.
    run : Run
        The solve.
    field : VectorField
        Its field.
    y0 : Tensor
        Flat initial state.
    keep : bool
        Whether a backward sweep may follow.
    requests : Requests
        What else the sweep is to do.
    """
    problem, ranks, auto = run.problem, run.problem.ranks, engine.compile == "auto"
    anew = auto and brings_tensors(problem.function)
    controlled = requests.sensitivity_control is not None
    if engine.compile is False or (requests.recorded and not controlled):
        return None
    watched = requests.watched
    looks = requests.dense or requests.steps or watched
    if requests.plain and (looks or engine.checkpointing != Checkpointing()):
        return None
    if len(problem.times) < 2:
        return None
    part = requests.steps_before is not None
    kind: Any = (problem.layout, keep, watched, requests.dense, problem.integrals > 0, part)
    if ranks.parallel:  # whose parts differ, and of which one may be watched
        kind = (problem.distribution, keep, (), requests.dense, problem.integrals > 0, part)
        watched = watched or ("args",) * anew
    account = engine.account
    entry = account.entries.get(kind) or account.entry(kind)
    for given, text in (
        # What parts may keep together lets earlier ones go, which are to be repeated exactly.
        (
            part and engine.checkpointing.bytes is not None and not engine.method.restarts,
            f"breakpoints= and memory= are given, and method={engine.method.name!r} goes on from "
            "more than one state",
        ),
        (controlled, "sensitivity_control= is given"),
        (engine.setup is not None, "petsc_setup= is given"),
        (anew and not ranks.parallel, "args= has tensors: others are traced anew"),
        (
            isinstance(problem.exchange, DrivenCells) and problem.exchange.owned.tangents > 0,
            "tangents are driven by states of layout=",
        ),
    ):
        if given:
            entry.hindrance = text
            if not auto:
                engine.compiler.warn([text])
            return None
    if entry.given_up:
        return None
    if auto and not entry.bought and not entry.hindrance:
        run.entry = entry  # counts what follows
        if entry.undecided:
            return None
    wanted = _of_part(_wanted(engine, run, entry, keep, watched, requests), engine, requests)
    if auto:
        if run.entry is not None:
            own = local(field, y0)
            if ranks.parallel:
                _decide_together(engine, ranks, entry, *own, keep)
            else:
                _decide(engine, entry, *own, wanted)
        if entry.hindrance or not entry.bought:
            return None
    return _compiled(engine, run, entry, field, y0, wanted)


def _wanted(
    engine: Engine, run: Run, entry: Entry, keep: bool, watched: tuple[str, ...], requests: Requests
) -> Wanted:
    """Return what is to be compiled: that of the solve before, where nothing else is asked for."""
    problem, settings, wanted = run.problem, run.settings, entry.wanted
    own = settings
    if problem.base is not None and problem.integrals:
        own = engine.settings(problem.base)
    if (
        wanted is not None
        and entry.settings[0] is settings and entry.settings[1] is own
        and wanted.options is engine.solver_options(wanted.settings)
        and wanted.control is engine.control and wanted.checkpointing is engine.checkpointing
        and (wanted.dense, wanted.watched) == (requests.dense, watched)
    ):  # fmt: skip
        return wanted
    entry.settings = (settings, own)
    if own is not settings:  # a state with its integrals in it, and one matrix of both
        settings = replace(settings, jacobian=own.jacobian, jacobian_options=own.jacobian_options)
    wanted = Wanted(
        settings, engine.solver_options(settings), engine.control, engine.checkpointing, keep,
        requests.dense, watched, partial(_lent, weakref.ref(engine)), engine.compile == "auto",
        new_budget(engine, requests), ghosts=engine.exchange is not None,
        interpolant=interpolant(settings.method) if requests.dense else None,
    )  # fmt: skip
    inside = requests.dense and inner_points(settings.method)
    if requests.events is not None or inside:
        single = replace(settings, adaptive=False)
        parts = replace(wanted, settings=single, options=engine.solver_options(single))
        wanted = replace(wanted, parts=parts)
    entry.wanted = wanted
    return wanted


def _of_part(wanted: Wanted, engine: Engine, requests: Requests) -> Wanted:
    """Return it for what the parts of a solve before this one have left: steps, and memory."""
    most = wanted.control.max_steps
    if requests.steps_before and most is not None:
        control = replace(wanted.control, max_steps=most - requests.steps_before)
        wanted = replace(wanted, control=control)
    if requests.memory is not None:
        wanted = replace(wanted, budget=new_budget(engine, requests))
    return wanted


def _lent(engine: weakref.ref[Engine], *what: Any) -> Any:
    """Lend an integrator of an engine that is there."""
    there = engine()
    assert there is not None
    return there.integrator(*what)


def _compiled(
    engine: Engine, run: Run, entry: Entry, field: VectorField, y0: torch.Tensor, wanted: Wanted
) -> Compilation | None:
    started = time.perf_counter()  # for the log alone
    found = engine.compiler.begin(field, y0, wanted)
    spent = time.perf_counter() - started
    if found.what:
        if wanted.auto and not entry.made:
            LOG.info(
                "compiled %s of %s for a state of %d entries in %.1f s, after %d evaluations; "
                "kept in %s", found.what, wanted.settings.method.name, len(y0), spent, entry.calls,
                cache_folder(),
            )  # fmt: skip
        entry.made, entry.hindrance, run.entry, found.entry = found.what, "", None, entry
        entry.left = "" if found.sweep is not None else "; ".join(found.reasons)
        return found
    reasons = "; ".join(found.reasons)
    if wanted.auto and found.changed:
        entry.changed(reasons)
        run.entry = entry
    elif not (found.passing or (wanted.auto and found.lent)):
        entry.made, entry.left, entry.hindrance = "", "", reasons
    return None


def _decide(
    engine: Engine, entry: Entry, field: VectorField, y0: torch.Tensor, wanted: Wanted
) -> None:
    """Decide by what solves of this kind have cost so far."""
    candidates, reasons = engine.compiler.candidates(field, wanted)
    if not candidates:
        entry.hindrance = "; ".join(reasons)
    elif entry.to_be_looked_at:
        _look(entry, field, y0, wanted.keep)
    if not entry.hindrance:
        entry.decide(candidates[0].share)


def _decide_together(
    engine: Engine, ranks: Ranks, entry: Entry, field: VectorField, y0: torch.Tensor, keep: bool
) -> None:
    """Decide by the largest part that a rank has of a state, the same on all. Collective."""
    if entry.to_be_looked_at:
        ranks.attempt(_look, entry, field, y0, keep)
        seen = ranks.comm.allgather((entry.hindrance, entry.work and astuple(entry.work)))
        entry.hindrance = next((text for text, _ in seen if text), "")
        works = [work for _, work in seen]
        entry.work = None if None in works else Work(*map(max, zip(*works, strict=True)))
    if not entry.hindrance:
        implicit, ghosts = engine.method.implicit, engine.exchange is not None  # as on all ranks
        entry.decide(max(
            x.share for x in engine.compiler.backends
            if x.implicit in (None, implicit) and x.ghosts in (None, ghosts)
        ))  # fmt: skip


def _flops(packet: Any, args: tuple[Any, ...], result: Any) -> int:
    """Return the flops of a product or a convolution.

    ``torch.utils.flop_counter`` knows them too, and imports triton where that is installed, which
    takes 85 MB.
    """
    if packet in (_ATEN.mm, _ATEN.bmm):
        return int(2 * result.numel() * args[0].shape[-1])
    if packet in (_ATEN.addmm, _ATEN.baddbmm):
        return int(2 * result.numel() * args[1].shape[-1])
    if packet is _ATEN.convolution:
        return int(2 * result.numel() * args[1][0].numel())
    if packet in (_ATEN.mv, _ATEN.addmv, _ATEN.dot):
        return int(2 * max(x.numel() for x in args if isinstance(x, torch.Tensor)))
    if "scaled_dot_product" in str(packet):
        return int(4 * args[0].numel() * args[1].shape[-2])
    return 0


class _Counter(TorchDispatchMode):
    """Counts operations and what they do."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.flops = self.entries = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch would import its compiler here, which takes seconds

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count an operation, and call it."""
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        flops = _flops(getattr(func, "_overloadpacket", None), args, result)
        self.flops += flops * result.element_size() // 8 if flops else 0
        if not getattr(func, "is_view", False):
            for item in result if isinstance(result, (tuple, list)) else (result,):
                self.entries += item.numel() if isinstance(item, torch.Tensor) else 0
        return result


def _look(entry: Entry, field: VectorField, y0: torch.Tensor, keep: bool) -> None:
    """Evaluate f once, for its size and for what machine code would leave out."""
    parts = [part for part in (field, field.explicit) if part is not None]
    counter, asks = _Counter(), Asks()

    def counted(function: Any, *given: Any) -> Any:
        with counter, asks:
            return function(*given)

    def evaluate() -> None:
        for part in parts:
            alone, point = bare(part), stacked(part, y0)[1].detach().to(part.dtype, copy=True)
            alone.callee = partial(counted, alone.callee)
            if keep:
                alone.linearize(part.problem.times[0], point)
            else:
                alone.rhs(part.problem.times[0], point)

    given = [part.function for part in parts]
    functions = [unwatched(owner(one) if isinstance(one, Rebound) else one) for one in given]
    try:
        evaluate()
    except Exception:  # which the solve itself will meet, and tell better
        return
    # A gradient has as many entries as there are parameters, for each product that is added to it.
    own = {id(p): p.numel() for part in parts for p in part.parameters if p.requires_grad}
    gradients = sum(own.values()) if keep else 0
    entry.work = Work(counter.operations, counter.flops, counter.entries + gradients)
    if not entry.work.small:
        entry.hindrance = "most of the vector field's time is arithmetic"
        return
    modules = modules_within(map(owner, functions))
    if asks.for_hooks or any(getattr(m, name) for m in modules for name in _BACKWARD_HOOKS):
        entry.hindrance = "the vector field has hooks, which machine code would not call"
        return
    before = describe("f", functions)
    evaluate()
    after = describe("f", functions)
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        entry.hindrance = f"the vector field changes {changed[0]} when it is called"

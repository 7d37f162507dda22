"""Fields, steps and whole sweeps as machine code."""

import math
from functools import partial

from pnode.solvers.compiled.compiler import Compiler
from pnode.solvers.compiled.fields import Fields
from pnode.solvers.compiled.ghost_sweeps import GhostSweeps, ProductSweeps
from pnode.solvers.compiled.graph_steps import ExplicitSteps
from pnode.solvers.compiled.implicit_sweeps import ImplicitSweeps
from pnode.solvers.compiled.row_sweeps import RowSweeps
from pnode.solvers.compiled.staged_steps import StagedSteps
from pnode.solvers.compiled.trace import trace_field

__all__ = ["new_compiler", "new_row_compiler"]


def new_compiler() -> Compiler:
    """Return a compiler with all backends, the best ones first."""
    return Compiler((
        ImplicitSweeps(), GhostSweeps(), ProductSweeps(), StagedSteps(), ExplicitSteps(), Fields(),
    ))  # fmt: skip


def new_row_compiler() -> Compiler:
    """Return one for independent samples."""
    # Any number of rows has a graph of its own, and all the same program.
    return Compiler((RowSweeps(),), partial(trace_field, arranged=False), math.inf)

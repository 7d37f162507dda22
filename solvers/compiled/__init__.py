"""Fields, steps and whole sweeps as machine code."""

from pnode.solvers.compiled.compiler import Compiler
from pnode.solvers.compiled.fields import Fields
from pnode.solvers.compiled.graph_steps import ExplicitSteps
from pnode.solvers.compiled.implicit_sweeps import ImplicitSweeps

__all__ = ["new_compiler"]


def new_compiler() -> Compiler:
    """Return a compiler with all backends, the best ones first."""
    return Compiler((ImplicitSweeps(), ExplicitSteps(), Fields()))

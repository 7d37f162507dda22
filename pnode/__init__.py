"""PETSc's time integrators and discrete adjoints for vector fields written in torch.

>>> import torch, pnode
>>> y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
>>> y = pnode.odeint(lambda t, y: -y, y0, torch.tensor([0.0, 1.0]))
>>> y[-1].sum().backward()
"""

import sys

from pnode.base.version import __version__
from pnode.cli import asked_for_doctor

# `python -m pnode doctor` imports this file too, and must run where these imports fail.
if not asked_for_doctor(sys.argv, sys.orig_argv):
    from pnode.base.signals import signals_kept

    with signals_kept():
        import mpi4py.MPI  # noqa: F401
    from pnode import controls, parallel, testing
    from pnode.adjoint.choose import Plan, plan
    from pnode.base.ledger import Ledger, Stats
    from pnode.configuration import LinearAlgebra, Output, Steps
    from pnode.controllers import PID
    from pnode.errors import (
        BackwardError,
        CheckpointError,
        ConfigurationError,
        EventError,
        FieldChanged,
        LinearSolveFailed,
        MissingPackage,
        NonFiniteDerivative,
        NonFiniteVectorField,
        NonlinearSolveFailed,
        PnodeError,
        RankError,
        SolveError,
        StepLimitReached,
        StepSizeUnderflow,
        VectorFieldError,
    )
    from pnode.odeint import odeint, odeint_adjoint, odeint_event
    from pnode.problems.checkpointing import Checkpointing
    from pnode.sensitivities import Sensitivities, sensitivities
    from pnode.solutions.saving import load
    from pnode.solutions.solution import Occurrences, Solution, Stage
    from pnode.solver import Solver
    from pnode.solvers.methods import Method, methods
    from pnode.solvers.tableaus import tableau
    from pnode.sweeping.event_functions import Event

__all__ = [
    "PID",
    "BackwardError",
    "CheckpointError",
    "Checkpointing",
    "ConfigurationError",
    "Event",
    "EventError",
    "FieldChanged",
    "Ledger",
    "LinearAlgebra",
    "LinearSolveFailed",
    "Method",
    "MissingPackage",
    "NonFiniteDerivative",
    "NonFiniteVectorField",
    "NonlinearSolveFailed",
    "Occurrences",
    "Output",
    "Plan",
    "PnodeError",
    "RankError",
    "Sensitivities",
    "Solution",
    "SolveError",
    "Solver",
    "Stage",
    "Stats",
    "StepLimitReached",
    "StepSizeUnderflow",
    "Steps",
    "VectorFieldError",
    "__version__",
    "controls",
    "load",
    "methods",
    "odeint",
    "odeint_adjoint",
    "odeint_event",
    "parallel",
    "plan",
    "sensitivities",
    "tableau",
    "testing",
]

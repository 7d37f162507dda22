"""Which discrete adjoint belongs to which method."""

from __future__ import annotations

from pnode.adjoint.compiled import CompiledAdjoint
from pnode.adjoint.firk import CoupledAdjoint
from pnode.adjoint.multistep import MultistepAdjoint
from pnode.adjoint.rosenbrock import RosenbrockAdjoint
from pnode.adjoint.stages import ExplicitAdjoint, StageAdjoint
from pnode.adjoint.stepper import AdjointStepper
from pnode.adjoint.symplectic import SymplecticAdjoint
from pnode.base.options import SolverOptions
from pnode.solvers.petsc.settings import IntegratorSettings

__all__ = ["create_adjoint"]


def create_adjoint(
    settings: IntegratorSettings, options: SolverOptions, parameters: bool
) -> AdjointStepper:
    """Create the adjoint of ``settings.method``. Collective on ``settings.comm``."""
    method = settings.method
    if settings.graphs is not None:
        return CompiledAdjoint(settings, parameters)
    if method.multistep:
        return MultistepAdjoint(settings, options, parameters)
    if method.coupled:
        return CoupledAdjoint(settings, options, parameters)
    if method.scheme is not None and method.scheme.explicit:
        return ExplicitAdjoint(settings, parameters)
    if method.symplectic:
        return SymplecticAdjoint(settings, parameters)
    if method.linearly_implicit:
        return RosenbrockAdjoint(settings, options, parameters)
    return StageAdjoint(settings, options, parameters)

"""Which integrator belongs to which method."""

from __future__ import annotations

from pnode.base.options import SolverOptions
from pnode.solvers.compiled.integrator import CompiledIntegrator
from pnode.solvers.firk.integrator import CoupledIntegrator
from pnode.solvers.multistep import MultistepIntegrator
from pnode.solvers.petsc.integrator import TimeIntegrator
from pnode.solvers.petsc.rosenbrock import RosenbrockIntegrator
from pnode.solvers.petsc.settings import IntegratorSettings
from pnode.solvers.petsc.symplectic import SymplecticIntegrator

__all__ = ["create_integrator"]


def create_integrator(settings: IntegratorSettings, options: SolverOptions) -> TimeIntegrator:
    """Create the integrator of ``settings.method``. Collective on ``settings.comm``."""
    if settings.graphs is not None:
        return CompiledIntegrator(settings, options)
    if settings.method.multistep:
        return MultistepIntegrator(settings, options)
    if settings.method.coupled:
        return CoupledIntegrator(settings, options)
    if settings.method.symplectic:
        return SymplecticIntegrator(settings, options)
    if settings.method.linearly_implicit:
        return RosenbrockIntegrator(settings, options)
    return TimeIntegrator(settings, options)

"""Integrators, Jacobians and linear solvers on top of PETSc's TS, SNES and KSP."""

"""PETSc's part of a solve: the TS, its callbacks and steps, and the C library behind petsc4py."""

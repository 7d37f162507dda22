"""Controllers of adaptive steps: PETSc's by name, and PID."""

from pnode.problems import step_controllers
from pnode.problems.step_controllers import PID

__all__ = ["FILTERS", "PID", "Norm"]

#: What ``norm=`` may be: "rms", "max", or a callable of the error in units of the tolerances.
Norm = step_controllers.Norm

#: Digital filters that PETSc's "dsp" controller knows by name (Söderlind, "Digital Filters in
#: Adaptive Time-Stepping", ACM Trans. Math. Softw. 29, 2003; Söderlind & Wang, J. Comput. Appl.
#: Math. 185, 2006).
FILTERS = step_controllers.FILTERS

"""PETSc's monitors and viewers, which options ask for: what pnode refuses, and files that last.

PETSc empties a viewer's file whenever an object reads the option that names it. A solver has
several such objects, one for the adjoint among them: the file is emptied once in a process, when
the first of them is set up, and all of them append to it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

__all__ = ["append_to_files", "empty_files", "refusal", "watches_steps"]

_EXACT = "pnode knows no exact solution; compare with solution.ys"
_GRID = "it needs a DM of PETSc's in the TS; use monitor=, ascii:FILE, or view solution.vec(i)"
_STEPS = "PETSc does not take the steps back; use monitor= on the way forward, or -log_view"
_TRAJECTORY = "checkpoints are pnode's; use checkpointing="
_REFUSED = {
    r"ts_monitor_solution_vtk.*": _GRID,
    r"ts_monitor_(sp_swarm|hg_swarm|dmda_ray|lg_dmda_ray).*": _GRID,
    r"ts_dmswarm_monitor.*": _GRID,
    r"ts_monitor_(lg_|draw_)?error.*": _EXACT,
    r"ts_monitor_envelope": "PETSc keeps the bounds to itself; use monitor=",
    r"ts_adjoint_monitor.*": _STEPS,
    r"ts_(save_trajectory|trajectory_.*)": _TRAJECTORY,
    r"ts_view_(solution|pre)": "the solution is in solution.ys; use ts_monitor_solution",
}
_SHOWS = re.compile(r"(^|_)(monitor|view|reason|rate)(_|$)|_view$")
_FILE = re.compile(
    r"(?P<kind>|ascii|binary):(?P<name>[^:]+)(:(?P<format>[^:]*))?(:(?P<mode>[^:]*))?"
)
_emptied: set[str] = set()


def refusal(name: str, value: Any) -> str | None:
    """Return why an option is not for pnode: it would do nothing, or show something wrong."""
    for pattern, reason in _REFUSED.items():
        if re.fullmatch(pattern, name):
            return reason
    if _SHOWS.search(name) and str(value).startswith("vtk"):
        return _GRID
    if name.startswith("ts_monitor") and str(value).strip() == "-1":
        return "PETSc does not know which step is the last; give a positive interval"
    return None


def watches_steps(name: str) -> bool:
    """Whether an option is about a monitor of time steps, which there are on the way forward."""
    return name.startswith("ts_monitor") or name == "ts_view"


def append_to_files(options: Mapping[str, Any]) -> dict[str, str]:
    """Return those of the options that name a file, saying that it is appended to."""
    changed = {}
    for name, value in options.items():
        found = _file(name, value)
        if found is not None and found["mode"] in (None, "", "write"):
            changed[name] = f"{found['kind']}:{found['name']}:{found['format'] or ''}:append"
    return changed


def empty_files(options: Mapping[str, Any]) -> None:
    """Empty the files that options name, each once in this process. Not collective."""
    for name in append_to_files(options):
        found = _file(name, options[name])
        assert found is not None
        path = os.path.realpath(found["name"])
        if path not in _emptied and os.path.isfile(path):
            os.truncate(path, 0)
        _emptied.add(path)


def _file(name: str, value: Any) -> re.Match[str] | None:
    if not _SHOWS.search(name) or not isinstance(value, str):
        return None
    return _FILE.fullmatch(value)

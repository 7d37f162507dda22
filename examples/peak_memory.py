"""The peak of resident memory, in a process that goes on."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path


class PeakMemory:
    """The peak of resident memory above what is resident now.

    Freed memory is first given back to the system (malloc_trim). The peak is ``VmHWM`` of
    ``/proc/self/status``, which writing 5 to ``/proc/self/clear_refs`` resets. Where that does not
    work, ``ru_maxrss`` stands in for both; it never falls, so that small peaks show as nothing.
    """

    def __init__(self) -> None:
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        self.source = "VmHWM"
        try:
            Path("/proc/self/clear_refs").write_text("5")
            resident, self._base = status("VmRSS"), status("VmHWM")
            if self._base > resident + 2**20:  # not reset
                raise OSError
        except (OSError, KeyError):
            self.source = "ru_maxrss"
            self._base = self._peak()

    def _peak(self) -> int:
        if self.source == "VmHWM":
            return status("VmHWM")
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def above_base(self) -> int:
        """Return how many bytes the peak is above the base."""
        return self._peak() - self._base


def status(field: str) -> int:
    """Return a size from /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(dict(line.split(":", 1) for line in lines)[field].split()[0])

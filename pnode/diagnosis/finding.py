"""What one check of an installation found."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Finding"]


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes
    ----------
    title : str
        The subject.
    status : {"ok", "note", "warning", "error"}
        How bad it is; only errors make the exit status 1.
    found : str
        The facts.
    remedy : str
        What to do; empty if there is nothing to do.
    """

    title: str
    status: str
    found: str
    remedy: str = ""

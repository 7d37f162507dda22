"""``python -m pnode``: what this installation can do, and what ails it."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence

__all__ = ["asked_for_doctor", "main"]


def asked_for_doctor(arguments: Sequence[str], original: Sequence[str]) -> bool:
    """Whether this process was started as ``python -m pnode doctor`` or ``pnode doctor``.

    Both import the package pnode before anything else, and the doctor must work where importing
    the rest fails, or ends the process: only then pnode's own file leaves the rest out.

    Parameters
    ----------
    arguments : sequence of str
        ``sys.argv``: while Python looks for a module to run, its first entry is ``"-m"``.
    original : sequence of str
        ``sys.orig_argv``, which names that module.
    """
    if list(arguments[1:2]) != ["doctor"]:
        return False
    if arguments[0] == "-m":
        return original[-len(arguments)] in ("pnode", "-mpnode")
    return os.path.basename(arguments[0]) == "pnode"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the command line.

    Returns
    -------
    int
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="pnode", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="check MPI, PETSc, torch, threads and scratch space, and name remedies",
        description="Check this installation. Also under the launcher of your jobs: "
        "mpiexec -n 4 python -m pnode doctor. The exit status is 1 if there are errors.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--scratch", metavar="FOLDER", help="a folder for checkpoints to try")
    doctor.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    commands.add_parser("methods", help="print the table of methods")
    options = parser.parse_args(arguments)
    # Imports where they are needed: what the table of methods needs may be what is broken.
    if options.command == "doctor":
        from pnode.doctor import answer, diagnose, supervise

        if options.inside:
            text, status = answer(*diagnose(options.scratch, options.json)), 0
        else:
            text, status = supervise(options.scratch, options.json)
    else:
        from pnode.solvers.methods import markdown_table

        text, status = markdown_table(), 0
    # PETSc's handler would make an error of a reader that stops early, as in `... | head`.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if text:
        print(text, flush=True)
    return status

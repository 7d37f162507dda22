"""``python -m pnode``: what this installation can do, and what ails it."""

from __future__ import annotations

import argparse
import os
import signal
from collections.abc import Sequence

from pnode.base.version import __version__

__all__ = ["asked_for_doctor", "main"]


def asked_for_doctor(arguments: Sequence[str], original: Sequence[str]) -> bool:
    """Whether this process was started as ``python -m pnode doctor`` or ``pnode doctor``.

    The same of ``--version``, which is known without the rest. All of them import the package pnode
    before anything else, and the doctor must work where importing the rest fails, or ends the
    process: only then pnode's own file leaves the rest out.

    Parameters
    ----------
    arguments : sequence of str
        ``sys.argv``: while Python looks for a module to run, its first entry is ``"-m"``.
    original : sequence of str
        ``sys.orig_argv``, which names that module.
    """
    if list(arguments[1:2]) not in (["doctor"], ["--version"]):
        return False
    if arguments[0] == "-m":
        return original[-len(arguments)] in ("pnode", "-mpnode")
    return os.path.basename(arguments[0]) == "pnode"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; without one, say which there are.

    Parameters
    ----------
    arguments : sequence of str, optional
        By default those of the command line.

    Returns
    -------
    int
        The exit status.
    """
    parser = _parser()
    options = parser.parse_args(arguments)
    # Imports where they are needed: what the table of methods needs may be what is broken.
    status = 0
    if options.command == "doctor":
        from pnode.doctor import answer, diagnose, supervise

        if options.inside:
            text = answer(*diagnose(options.scratch, options.json))
        else:
            text, status = supervise(options.scratch, options.json)
    elif options.command == "methods":
        from pnode.errors import ConfigurationError
        from pnode.listing import listing

        try:
            text = listing(options.filter, options.json)
        except ConfigurationError as error:
            parser.error(str(error))
    else:
        text = parser.format_help().rstrip()
    # PETSc's handler would make an error of a reader that stops early, as in `... | head`.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    if text:
        print(text, flush=True)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="pnode", description=__doc__)
    parser.add_argument("--version", action="version", version=f"pnode {__version__}")
    commands = parser.add_subparsers(dest="command")
    doctor = commands.add_parser(
        "doctor",
        help="check MPI, PETSc, torch, threads and scratch space, and name remedies",
        description="Check this installation. Also under the launcher of your jobs: "
        "mpiexec -n 4 python -m pnode doctor. The exit status is 1 if there are errors.",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.add_argument("--scratch", metavar="FOLDER", help="a folder for checkpoints to try")
    doctor.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    methods = commands.add_parser(
        "methods",
        help="print the table of methods, or those that you look for",
        description="Print the table of methods.",
    )
    methods.add_argument("--json", action="store_true", help="print JSON")
    methods.add_argument(
        "--filter",
        metavar="CONDITION",
        action="append",
        default=[],
        help="only those methods: kind=implicit, adaptive=yes, forms=mass, 'order>=4', "
        "'stages<=3', or a part of a name; may be given several times, all of which must hold",
    )
    return parser

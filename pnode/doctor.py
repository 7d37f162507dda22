"""What works in this installation, what does not, and what to do about it.

``python -m pnode doctor`` gathers facts (:mod:`pnode.diagnosis.probe`), lets checks judge them
(:mod:`pnode.diagnosis.checks`), and prints their findings.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pnode.base.launchers import find_mismatch, torchrun_claim
from pnode.diagnosis.checks import CHECKS, check_threads, plural
from pnode.diagnosis.facts import Facts
from pnode.diagnosis.finding import Finding
from pnode.diagnosis.probe import gather

__all__ = ["Merged", "answer", "diagnose", "examine", "merge", "report", "supervise"]

STATUSES = ("ok", "note", "warning", "error")
_TIME_LIMIT = 300
_ANSWER = "pnode doctor answers "
_FRAME = re.compile(r"\[0x[0-9a-f]+\]\s*$")
_MARKS = {"ok": "ok", "note": "note", "warning": "WARNING", "error": "ERROR"}


@dataclass(frozen=True)
class Merged(Finding):
    """A finding of one or more ranks.

    Attributes
    ----------
    ranks : tuple of int
        The ranks it holds for; empty for all of them.
    """

    ranks: tuple[int, ...] = ()


def examine(everyone: Sequence[Facts]) -> list[Merged]:
    """Judge the facts of all ranks.

    Parameters
    ----------
    everyone : sequence of Facts
        One for each rank, in their order.
    """
    nodes: dict[int, list[Facts]] = {}
    for facts in everyone:
        nodes.setdefault(facts.mpi.node if facts.mpi else 0, []).append(facts)
    threads = {node: check_threads(members) for node, members in nodes.items()}
    found = []
    for facts in everyone:
        mine = [finding for check in CHECKS if (finding := check(facts)) is not None]
        found.append([*mine, threads[facts.mpi.node if facts.mpi else 0]])
    return merge(found)


def merge(ranks: Sequence[Sequence[Finding]]) -> list[Merged]:
    """Put equal findings of several ranks together; those that differ keep their ranks."""
    holders: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(ranks):
        for finding in findings:
            holders.setdefault(finding, []).append(rank)
    titles = list(dict.fromkeys(finding.title for finding in holders))
    merged = [
        Merged(**asdict(finding), ranks=() if len(who) == len(ranks) else tuple(who))
        for finding, who in holders.items()
    ]
    return sorted(merged, key=lambda finding: titles.index(finding.title))


def _ranges(ranks: Sequence[int]) -> str:
    """Return ``0-2, 5`` for 0, 1, 2, 5."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def report(findings: Sequence[Merged], size: int) -> str:
    """Return the report for people."""
    return "\n".join(_lines(findings, size))


def _lines(findings: Sequence[Merged], size: int) -> Iterator[str]:
    yield f"pnode doctor, {plural(size, 'rank')}"
    for finding in findings:
        where = f" [{'rank' if len(finding.ranks) == 1 else 'ranks'} {_ranges(finding.ranks)}]"
        head = f"  {_MARKS[finding.status]:8}{finding.title + (where if finding.ranks else '')}: "
        yield from _wrap(head + finding.found)
        if finding.remedy:
            yield from _wrap(f"          -> {finding.remedy}")
    counts = {status: sum(finding.status == status for finding in findings) for status in STATUSES}
    yield ", ".join(plural(counts[status], status) for status in ("error", "warning", "note"))


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(
        text, 98, subsequent_indent=" " * 13, break_long_words=False, break_on_hyphens=False
    )


def _as_json(findings: Sequence[Merged], size: int) -> str:
    worst = max((STATUSES.index(finding.status) for finding in findings), default=0)
    content: dict[str, Any] = {
        "status": STATUSES[worst],
        "size": size,
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(content, indent=2)


def diagnose(scratch: str | None = None, as_json: bool = False) -> tuple[str, int]:
    """Gather the facts of this process and judge them. Collective where MPI works.

    Processes that a foreign launcher started do not see one another: the one that the launcher
    calls 0 has the report, and the others are silent.

    Parameters
    ----------
    scratch : str, optional
        Folder for checkpoints to try.
    as_json : bool
        Write JSON instead of text: ``status`` (the worst), ``size``, and ``findings`` with title,
        status, found, remedy and ranks (an empty list: all).

    Returns
    -------
    str
        The report, on one rank; empty on the others.
    int
        The exit status: 1 if there is an error on any rank, else 0.
    """
    facts = gather(scratch)
    everyone = [facts]
    if facts.mpi is not None and facts.mpi.size > 1:
        from mpi4py import MPI

        everyone = MPI.COMM_WORLD.allgather(facts)
    return _conclude(facts, everyone, as_json)


def _conclude(facts: Facts, everyone: Sequence[Facts], as_json: bool) -> tuple[str, int]:
    findings = examine(everyone)
    if len(everyone) > 1:
        rank = facts.mpi.rank if facts.mpi else 0
    else:  # alone, or believing so
        claim = find_mismatch(1, facts.environment) or torchrun_claim(facts.environment)
        rank = (claim and claim.rank) or 0
    show = _as_json if as_json else report
    text = show(findings, len(everyone)) if rank == 0 else ""
    return text, int(any(finding.status == "error" for finding in findings))


def supervise(scratch: str | None = None, as_json: bool = False) -> tuple[str, int]:
    """Let another process :func:`diagnose`, and report its end if that is not a good one.

    Importing two MPIs, or starting one under the launcher of another, can end a process on the
    spot. The other process takes this one's place for the launcher: it inherits its environment
    and its open files. Parameters and returns are those of :func:`diagnose`.
    """
    command = [sys.executable, "-m", "pnode", "doctor", "--inside"]
    command += ["--json"] * as_json + ([] if scratch is None else ["--scratch", scratch])
    try:
        run = subprocess.run(
            command,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            encoding="utf-8",
            errors="replace",
            timeout=_TIME_LIMIT,
            close_fds=False,
            check=False,
        )
        last = (run.stdout.splitlines() or [""])[-1]
        if last.startswith(_ANSWER):
            text, status = json.loads(last.removeprefix(_ANSWER))
            return str(text), int(status)
        by = f"signal {-run.returncode}" if run.returncode < 0 else f"status {run.returncode}"
        # Without the frames of a stack, as Open MPI prints them.
        said = [line for line in run.stderr.splitlines() if not _FRAME.search(line)]
        words = " ".join(" ".join(said).split())
        end = f"the process that imports MPI, PETSc and torch ended with {by}"
        crash = f"{end}: ...{words[-500:]}" if len(words) > 500 else f"{end}: {words}"
    except subprocess.TimeoutExpired:
        crash = f"importing MPI, PETSc and torch did not end within {_TIME_LIMIT} s"
    facts = gather(scratch, crash)
    return _conclude(facts, [facts], as_json)


def answer(text: str, status: int) -> str:
    """Return the line in which one process tells the other what it found."""
    return _ANSWER + json.dumps([text, status])

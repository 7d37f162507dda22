"""Tests on the ranks of one mpiexec, see tools/run_ranks.py: all run them together.

A test that fails on some ranks fails on all, with what each of them found. If a rank does not come
to the end of its test, the job ends.
"""

import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI
from ranks import checks

#: Its messages do not meet those of a test that broke off.
COMM = MPI.COMM_WORLD.Dup()
#: Seconds that a rank whose test failed waits for the others.
PATIENCE = 60.0


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--with-mpi", False):
        return
    # A rank that hangs is in a call of MPI, where Python handles no signal.
    config.option.timeout_method = "thread"
    if COMM.rank:  # one report is enough
        config.option.xmlpath = None
        sys.stdout = open(os.devnull, "w")


def pytest_collection_finish(session: pytest.Session) -> None:
    names = tuple(item.nodeid for item in session.items)
    if len(set(COMM.allgather(names))) > 1:
        raise pytest.UsageError("the ranks found different tests")


def pytest_runtest_setup(item: pytest.Item) -> None:
    marks = [mark.kwargs for mark in item.iter_markers("mpi")]
    least = max((mark.get("min_size", 1) for mark in marks), default=1)
    most = min((mark.get("max_size", math.inf) for mark in marks), default=math.inf)
    if COMM.size > most:
        pytest.skip(f"enough on {most} ranks")
    if COMM.size < least:  # where pytest-mpi is not installed
        pytest.skip(f"needs {least} ranks")
    place = _place(item)
    if COMM.size in (2, 3) and least < 3 <= most and place not in (None, COMM.size % 2):
        pytest.skip(f"a case for {5 - COMM.size} ranks")


def _place(item: pytest.Item) -> int | None:
    """Return 0 or 1 for a case of several of a test, which take turns on 2 and 3 ranks.

    Cases of several arguments lie in a chequer, so that each value of one meets both.
    """
    lengths = [len(mark.args[1]) for mark in item.iter_markers("parametrize")]
    if not lengths:
        return None
    number, place = next(iter(item.callspec.indices.values())), 0  # that of the case
    for length in reversed(lengths):  # cases of the upper arguments follow one another
        number, index = divmod(number, length)
        place += index
    return place % 2


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Any:
    checks.begin()
    result = yield
    if hasattr(pyfuncitem.module, "checks"):
        checks.finish()
    return result


def _wait_for_all(report: pytest.TestReport) -> None:
    """End the job if this rank's test failed and the others do not come to the end of theirs.

    The limit of those whose test passed is that of pytest-timeout, for the rank that is late.
    """
    request, start = COMM.Ibarrier(), time.monotonic()
    while not request.Test():
        if report.failed and time.monotonic() - start > PATIENCE:
            text = f"[rank {COMM.rank}] others do not end {report.nodeid}, which failed here:\n"
            print(text + report.longreprtext, file=sys.__stderr__, flush=True)
            COMM.Abort(1)
        time.sleep(0.001)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    report = yield
    _wait_for_all(report)
    outcomes = COMM.allgather((report.outcome, report.longreprtext))
    if len({outcome for outcome, _ in outcomes}) > 1:
        report.outcome = "failed"
    if report.failed:
        report.longrepr = "\n".join(
            f"[rank {rank}] {outcome}\n{text}" for rank, (outcome, text) in enumerate(outcomes)
        )
    return report


@pytest.fixture
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all ranks."""
    return COMM.bcast(tmp_path_factory.mktemp("shared") if COMM.rank == 0 else None)

"""Print the CPU seconds of each test: PYTHONPATH=tests python -m pytest -p cpu_times tests/...

Of the process itself and of children that it has waited for, so what else the machine does makes
no difference. Programs of tests/children.py are not counted, whose parent is another process.

With ``--list-slow tests/slow.txt`` the names of those that take long are written there, for
``make test`` to leave out; names of tests that were not run stay.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest

SHOWN = 40
#: CPU seconds from which a test is slow, unless ``make quick`` has it.
LIMIT = 1.0
_STARTED = pytest.StashKey[float]()
_seconds: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--list-slow", type=Path, help="where to write the names of slow tests")


def _now() -> float:
    return sum(os.times()[:4])


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_STARTED] = _now()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None, None, None]:
    try:
        yield
    finally:  # the report takes it along, from another process too
        item.user_properties.append(("cpu", _now() - item.stash[_STARTED]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "teardown":
        _seconds[report.nodeid] += float(str(dict(report.user_properties).get("cpu", 0.0)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    files: Counter[str] = Counter()
    for name, seconds in _seconds.items():
        files[name.partition("::")[0]] += seconds
    for title, found in (("files", files), ("tests", _seconds)):
        terminalreporter.section(f"CPU seconds of {title}, {found.total():.0f} in all")
        for name, seconds in found.most_common(SHOWN):
            terminalreporter.write_line(f"{seconds:8.2f}  {name}")
    path = terminalreporter.config.getoption("--list-slow")
    if path is not None:
        quick = Path(__file__).with_name("quick.txt").read_text(encoding="utf-8").splitlines()
        left = set(path.read_text(encoding="utf-8").splitlines()) - set(_seconds)
        slow = {
            name for name, seconds in _seconds.items()
            if seconds >= LIMIT and not name.startswith(tuple(filter(None, quick)))
        }  # fmt: skip
        path.write_text("".join(f"{name}\n" for name in sorted(left | slow)), encoding="utf-8")

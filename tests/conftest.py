"""Shared set-up of the tests."""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch

torch.set_num_threads(1)

# Tests that `make test` leaves to `make test-slow`, a name a line: tests/cpu_times.py writes it.
SLOW = Path(__file__).with_name("slow.txt")

# Files with tests that take more than ten seconds: none of these is to be left for the end, when
# other processes have nothing more to do.
LONG = {
    f"test_{name}.py"
    for name in (
        "benchmarks", "checkpointing", "clock", "compiled", "compiled_fields", "compiled_stiff",
        "cotangent_batches", "driver", "event_lists", "examples", "explicit_tangents", "fast_tanh",
        "field_changed", "gallery", "gallery_control", "gallery_physics", "memory", "odd_fields",
        "samples_compiled", "scaling", "sdist", "site", "stiff", "tableaus", "threads", "types",
    )
}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before pytest selects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what tests/slow.txt lists, and run the long files first."""
    slow = set(SLOW.read_text(encoding="utf-8").splitlines())
    for item in items:
        if item.nodeid in slow:
            item.add_marker("slow")
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """Let the collector pass over what stays: torch's modules and thousands of collected tests.

    Whole collections by themselves took an eighth of the time; a test that needs one asks for it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 100)


def pytest_configure(config: pytest.Config) -> None:
    """Let all processes of a session share what is compiled, and find nothing of an earlier one."""
    if "PNODE_CACHE_DIR" in os.environ:  # a warm folder, or that of the process above this worker
        return
    folder = tempfile.mkdtemp(prefix="pnode-tests-")  # of this user alone
    os.environ["PNODE_CACHE_DIR"] = folder
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    config.add_cleanup(lambda: os.environ.pop("PNODE_CACHE_DIR", None))

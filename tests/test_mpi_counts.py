"""What solves over several ranks send and reduce, counted: a change that adds to it is seen."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from launch import check

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

from counting import counting_environment


@pytest.mark.mpi
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_messages_and_reductions(ranks, tmp_path):
    check("program_counts.py", ranks, environment=counting_environment(tmp_path))

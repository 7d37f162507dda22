"""A rank that dies ends the job. What ranks do together is tested in the folder mpi."""

from __future__ import annotations

import pytest
from launch import launch


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_a_rank_that_dies_ends_the_job(how):
    run = launch("program_death.py", 2, how, limit=120)
    assert run.stdout.count("alive") == 2, run.stdout + run.stderr
    assert run.returncode == (3 if how == "exit" else 9)
    assert "ranks" not in run.stdout

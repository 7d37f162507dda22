"""Several ranks: programs of this folder in subprocesses with a hard limit."""

from __future__ import annotations

import pytest
from launch import check

pytestmark = pytest.mark.mpi


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_with_their_own_batches_average_to_one_gradient(ranks):
    check("program_average_gradient.py", ranks)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ghost_cells_and_their_adjoints(ranks):
    check("program_layouts.py", ranks)

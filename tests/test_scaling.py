"""The scaling benchmark: what solves over ranks send, and the model of a cluster."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
sys.path.insert(0, str(FOLDER))

import scaling  # noqa: E402


def test_scaling(tmp_path, monkeypatch):
    path, picture = tmp_path / "scaling.json", tmp_path / "scaling.png"
    command = ["scaling.py", "--quick", "--json", str(path), "--plot", str(picture)]
    monkeypatch.setattr(sys, "argv", command)
    scaling.main()
    report = json.loads(path.read_text())
    assert picture.stat().st_size > 10_000
    for mode, result in report["modes"].items():
        counts = result["per_step"]
        if "GMRES" in mode:
            assert counts["reductions"] > 10.0
        else:
            assert counts["reductions"] == float("adaptive" in mode)
        if "rk4" in mode:  # a message per stage forward, two backward: for f, and for its product
            assert counts["sends"] == (0.0 if "batch" in mode else 12.0)
            # Two rows of 16 cells and two corners each, of two fields.
            assert counts["sent"] == counts["sends"] * 8 * 2 * 2 * (16 + 2)
        for kind in ("weak", "strong"):
            efficiencies = result["cluster"][kind]
            assert efficiencies[0] == pytest.approx(1.0, rel=1e-12)
            assert all(0.0 < b <= a * (1 + 1e-12) for a, b in itertools.pairwise(efficiencies))


def test_communication_model():
    machine = scaling.Machine(latency=2.0, bandwidth=8.0, reduction=3.0)
    model = scaling.Model(
        base=5.0, per_cell=0.5, exchanges=2.0, reductions=1.0, once=4.0, steps=8.0
    )
    # 100 cells: 55 alone; with 15 others, 8 neighbours, 4 sides of 10 cells and 4 corners of two
    # fields, and four stages of 1.5 reductions.
    assert model.seconds(machine, 1, 100) == 55.0
    assert model.seconds(machine, 16, 100) == 55.0 + 2 * (8 * 2.0 + 704 / 8.0) + 1.5 * 4 * 3.0
    assert model.weak(machine, 16, 100) == 55.0 / model.seconds(machine, 16, 100)
    assert model.strong(machine, 16, 1600) == 805.0 / (16 * model.seconds(machine, 16, 100))

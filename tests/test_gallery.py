"""The gallery: what its examples share, and the numbers of some of them."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pnode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))  # where Python looks when it runs an example
common = importlib.import_module("gallery_common")
training = importlib.import_module("training")


def quick(name: str, folder: Path, *more: str) -> dict:
    """Run an example and return its numbers."""
    example = importlib.import_module(name)
    assert example.main(["--quick", "--output", str(folder), *more]) == 0
    return json.loads((folder / f"{name}.json").read_text())


# ---------------------------------------------------------------------------- what they share


def options(folder: Path, **more: object) -> argparse.Namespace:
    argv = ["--output", str(folder)]
    for name, value in more.items():
        argv += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return common.arguments("toy", "A toy.", argv, iterations=20, quick={"iterations": 3})


class Toy:
    """A noisy fit of a line, whose minibatches come from a generator."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)
        self.model = common.mlp(1, 4, 1, generator=torch.Generator().manual_seed(0))
        self.calls, self.stop_at = 0, -1

    def loss(self) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        x = torch.rand(8, 1, generator=self.generator, dtype=torch.float64)
        noise = 0.1 * torch.randn(8, 1, dtype=torch.float64)  # torch's own generator
        return (self.model(x) - 2 * x + noise).square().mean()

    def train(self, folder: Path, resume: bool = False, **more: object) -> object:
        wanted = options(folder, **({"resume": True} if resume else {}))
        return common.train(self.model, self.loss, wanted, generator=self.generator, **more)


def test_training_that_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path):
    torch.manual_seed(3)
    whole = Toy()
    expected = whole.train(tmp_path / "a", clip=0.5) if (tmp_path / "a").mkdir() is None else None
    assert len(expected.losses) == 20 and expected.losses[-1] < expected.losses[0]

    torch.manual_seed(3)
    first = Toy()
    first.stop_at = 8
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(training.Interrupted, match="SIGTERM after iteration 8") as caught:
        first.train(tmp_path, clip=0.5)
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is handler

    torch.manual_seed(99)  # what was saved wins
    second = Toy()
    found = second.train(tmp_path, resume=True, clip=0.5)
    assert second.calls == 12
    assert found.losses == expected.losses
    for one, other in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)

    third = Toy()
    assert third.train(tmp_path, resume=True, clip=0.5).losses == expected.losses
    assert third.calls == 0  # it was finished
    assert torch.equal(third.model[0].weight, whole.model[0].weight)


def test_training_stops_early_and_puts_the_best_weights_back(tmp_path):
    toy, values, seen = Toy(), iter([3.0, 1.0, 2.0, 1.5, 1.2, 0.1]), []

    def validate() -> float:
        seen.append(toy.model[0].weight.detach().clone())
        return next(values)

    result = toy.train(tmp_path, validate=validate, every=2, patience=3)
    assert result.stopped_early and result.best == 1.0 and len(result.losses) == 10
    assert torch.equal(toy.model[0].weight, seen[1]) and not torch.equal(seen[1], seen[4])


def test_bfgs_evaluates_as_often_as_it_likes(tmp_path):
    toy = Toy()
    point = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1.0, -2.0], dtype=torch.float64)

    def loss() -> torch.Tensor:
        toy.calls += 1
        return (point - target).square().sum()

    found = common.train(
        [point], loss, options(tmp_path), iterations=2, constant=True,
        optimizer=lambda tensors: torch.optim.LBFGS(tensors, line_search_fn="strong_wolfe"),
    )  # fmt: skip
    assert toy.calls > 2 and len(found.losses) == 2
    assert torch.allclose(point, target, rtol=0, atol=1e-12)


def test_saved_training_that_does_not_fit_is_refused(tmp_path):
    Toy().train(tmp_path)
    saved = options(tmp_path, seed=5, resume=True)
    with pytest.raises(common.UsageError, match=r"toy-training.pt was saved with .*\"seed\": 0"):
        common.train(Toy().model, Toy().loss, saved)
    other = common.mlp(1, 5, 1, generator=torch.Generator())
    with pytest.raises(common.UsageError, match=r"toy-training.pt was saved by another version"):
        common.train(other, Toy().loss, options(tmp_path, resume=True))
    (tmp_path / "toy-training.pt").write_text("nothing")
    with pytest.raises(common.UsageError, match=r"toy-training.pt is no saved training .*: remove"):
        common.train(Toy().model, Toy().loss, options(tmp_path, resume=True))


def test_options(capsys):
    read = common.arguments("toy", "A toy.", ["--quick"], iterations=20, quick={"iterations": 3})
    assert (read.iterations, read.seed, read.output) == (3, 0, Path("toy"))
    read = common.arguments(
        "toy", "A toy.", ["--quick", "--iterations", "7"], iterations=20, quick={"iterations": 3}
    )
    assert read.iterations == 7
    for argv, message in (
        (["--iteratons", "3"], "unrecognized arguments: --iteratons 3"),
        (["--iterations", "0"], "must be positive"),
        (["--seed", "x"], "invalid int value: 'x'"),
    ):
        with pytest.raises(SystemExit, match="2"):
            common.arguments("toy", "A toy.", argv, iterations=20)
        assert message in capsys.readouterr().err


def test_results_are_written_and_failures_told(tmp_path, capsys):
    def found(_: argparse.Namespace) -> object:
        rows = [{"model": "a", "error": 0.125}, {"model": "b", "steps": 3}]
        numbers = {"value": np.float64(1.5), "curve": torch.ones(2), "bad": float("nan")}
        return common.Outcome(numbers, rows, lambda: common.figure(1, 2, "a title")[0])

    wanted = options(tmp_path)
    (tmp_path / "toy.py").write_text("")
    common.fingerprint, kept = lambda name: "0", common.fingerprint
    try:
        assert common.launch(wanted, found) == 0
    finally:
        common.fingerprint = kept
    content = json.loads((tmp_path / "toy.json").read_text())
    assert content["options"] == {"iterations": 20, "quick": False, "seed": 0}
    assert (content["value"], content["curve"], content["bad"]) == (1.5, [1.0, 1.0], None)
    assert content["version"] == pnode.__version__
    assert (tmp_path / "toy.csv").read_text() == "model,error,steps\na,0.125,\nb,,3\n"
    assert (tmp_path / "toy.png").stat().st_size > 1000
    printed = capsys.readouterr().out
    assert "0.125" in printed and "wrote" in printed

    def failing(_: argparse.Namespace) -> object:
        raise pnode.NonFiniteVectorField("f is not finite")

    def interrupted(_: argparse.Namespace) -> object:
        raise KeyboardInterrupt

    assert common.launch(wanted, interrupted) == 130
    assert "interrupted; trainings that are saved go on with --resume" in capsys.readouterr().err
    assert common.launch(wanted, failing) == 1
    assert capsys.readouterr().err == "toy.py: error: f is not finite\n"
    assert common.launch(options(Path("/proc/nowhere")), found) == 2
    assert "toy.py: error: " in capsys.readouterr().err


def test_peak_memory_is_that_of_the_call():
    measured = common.measure(lambda: torch.ones(5, 2**20).sum(), repeats=2)
    assert measured.value == 5 * 2**20
    assert 19 < measured.peak_mib < 24  # 20 MiB of float32


def test_unknown_example_is_named():
    run = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gallery.py"), "nonsense"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 2 and "nonsense" in run.stderr


def test_summary_sets_peers_beside_pnode(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    gallery = importlib.import_module("gallery")
    monkeypatch.setattr(gallery, "RESULTS", tmp_path)
    rows = [
        {"by": "pnode, a", "CPU s": 2.0, "MiB": 4.0}, {"by": "pnode, b", "CPU s": 1.0},
        {"by": "peer", "CPU s": 3.0, "MiB": 5.0}, {"by": "other", "CPU s": 3.0, "ratio": 1.5},
    ]  # fmt: skip
    facts = {"seconds": 7.25, "cpu_seconds": 6.5, "ranks": 1, "version": "9", "options": {}}
    (tmp_path / "digits.json").write_text(json.dumps({**facts, "rows": rows}))
    lines = gallery.summary().splitlines()
    assert "| digits | 7.25 | 6.5 | full | 1 | 9 |" in lines
    assert lines[-6] == "| by | CPU s | MiB | CPU s / pnode's above | ratio |"
    assert lines[-2:] == ["| peer | 3 | 5 | 3 |  |", "| other | 3 |  |  | 1.5 |"]


# ----------------------------------------------------------------------------------- the examples


def test_gradients(tmp_path):
    numbers = quick("gradients", tmp_path)
    rows = numbers["gradients"]
    discrete = [row for row in rows if row["adjoint"].startswith("pnode, discrete")]
    assert len(discrete) == 2 * 4
    for row in discrete:
        assert row["from its numbers'"] < 1e-13  # round-off, at any tolerance and horizon
        assert row["error"] < 2 * row["rtol"]
    (long,) = (row for row in rows if row["adjoint"] == "pnode, continuous" and row["T"] == 12)
    assert long["error"] > 10  # of no use
    losses = numbers["losses"]
    assert losses["discrete"][-1] < losses["discrete"][0] / 10


def test_digits(tmp_path):
    numbers = quick("digits", tmp_path, "--no-plot")
    rows = {row["gradient by"]: row for row in numbers["rows"]}
    exact = [row for name, row in rows.items() if name != "NODE-continuous"]
    assert len(exact) == 9 and max(row["difference"] for row in exact) < 1e-13
    assert 1e-13 < rows["NODE-continuous"]["difference"] < 1e-3
    again = ("checkpoint per step (ACA)", "pnode, segments", "pnode, starts of steps")
    for name in again:
        assert rows[name]["evaluations"] == 64, name
    ways = ("pnode, tape", "pnode, stages", "pnode, 9 states")
    assert [rows[name]["evaluations"] for name in ways] == [32, 64, 80]
    tape, stages, least = (rows[name]["MiB"] for name in ways)
    assert least < stages < tape
    assert not (tmp_path / "digits.png").exists()
    assert list(tmp_path.glob("*.pt")) == []


def test_kuramoto_sivashinsky(tmp_path):
    """On several ranks: tests/mpi/test_mpi_examples.py."""
    numbers = quick("kuramoto_sivashinsky", tmp_path, "--no-plot", "--iterations", "2")
    for row in numbers["rows"]:
        assert row["Jacobians"] == row["factorizations"] == 2  # one in each direction
    third, fourth = (row["error"] for row in numbers["rows"])
    assert fourth < third / 10
    assert numbers["losses"][-1] < numbers["losses"][0]

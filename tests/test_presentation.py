"""What a solution shows and keeps of itself: text, pictures, labelled arrays, files."""

from __future__ import annotations

import json
import math
import os
import sys
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch

import pnode
from pnode.parallel import Grid

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def no_figure_stays():
    yield
    import matplotlib.pyplot

    matplotlib.pyplot.close("all")


def made(ts, ys, **more):
    """Return a solution with given numbers."""
    ts = torch.as_tensor(ts, dtype=torch.float64)
    return pnode.Solution(ts, ys, pnode.Stats(steps=7), **more)


def decay(t, y):
    return -y


@pytest.fixture(scope="module")
def swing():
    """A solve with everything: tuple state, costs, events of which one ends it, gradients."""
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    solver = pnode.Solver(
        lambda t, y: torch.stack([y[1], -torch.sin(y[0])]),
        cost=lambda t, y: y.square(),
        event_fn=[pnode.Event(lambda t, y: y[0], terminal=False), lambda t, y: t - 6.0],
    )
    solution = solver(y0, [0.0, 1.0, 2.5, 9.0])
    solution.ys[1].sum().backward()
    return solution


# ----------------------------------------------------------------------------------------- text


def test_one_line(swing):
    text = repr(swing)
    assert text == (
        f"Solution(ts=0 to 6 (4,), ys=<float64 (4, 2), grad>, steps={swing.stats.steps}, "
        "costs=<float64 (4, 2), grad>, events=[2, 1], reason='event')"
    )


def test_a_large_state_has_a_short_repr():
    assert len(repr(made([0.0, 1.0], torch.zeros(2, 1000, 1000)))) < 100


def test_table_has_the_numbers(swing):
    head, *rows = (line.split() for line in swing.table().splitlines())
    assert head == ["t", "y[0]", "y[1]", "costs[0]", "costs[1]"]
    found = np.array(rows, dtype=float)
    expected = torch.cat([swing.ts[:, None], swing.ys, swing.costs], dim=1).detach().numpy()
    assert np.allclose(found, expected, rtol=1e-5, atol=1e-300)


def test_table_leaves_out_the_middle():
    solution = made(torch.arange(100.0), torch.arange(100.0)[:, None])
    lines = solution.table(5).splitlines()
    assert [line.split()[0] for line in lines] == ["t", "0", "1", "2", "...", "98", "99"]
    assert len(solution.table(None).splitlines()) == 101


def test_table_leaves_out_columns_unless_they_are_named():
    solution = made([0.0, 1.0], torch.zeros(2, 14))
    assert solution.table().splitlines()[0].endswith("... 2 more")
    names = [f"s{i}" for i in range(14)]
    assert solution.table(names=names).split()[1:15] == names


def test_table_for_notebooks_is_escaped():
    text = made([0.0], (torch.ones(1, 1), torch.zeros(1)))._repr_html_()
    assert "<th>y[0][0]</th><th>y[1]</th>" in text
    assert "&lt;float32 (1, 1)&gt;" in text


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.table(1), "rows=1"),
        (lambda s: s.table(names=["a"]), "needed are 2 different names, for y\\[0\\], y\\[1\\]"),
        (lambda s: s.plot(names=["a", "a"]), "different names"),
        (lambda s: s.plot(xscale="cubic"), "xscale='cubic'"),
        (lambda s: s.to_xarray(names="ab"), "names='ab'"),
        (lambda s: s.to_xarray(names=["time"]), "time has a meaning of its own"),
    ],
)
def test_unusable_arguments(call, words):
    with pytest.raises(pnode.ConfigurationError, match=words):
        call(made([0.0, 1.0], torch.zeros(2, 2)))


def test_samples_with_times_of_their_own():
    ts = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    solution = made(ts, torch.arange(8.0).reshape(2, 2, 2))
    with pytest.raises(pnode.ConfigurationError, match="each sample its own"):
        solution.table()
    lines = solution.plot().get_lines()
    assert [line.get_xdata()[1] for line in lines] == [1.0, 1.0, 2.0, 2.0]


# ------------------------------------------------------------------------------------- pictures


def test_lines_of_a_plot(swing):
    axes = swing.plot(names=["angle", "speed"])
    angle, speed = axes.get_lines()[:2]
    assert np.array_equal(angle.get_xdata(), swing.ts.detach().numpy())
    assert np.array_equal(angle.get_ydata(), swing.ys[:, 0].detach().numpy())
    assert np.array_equal(speed.get_ydata(), swing.ys[:, 1].detach().numpy())
    assert axes.get_xscale() == axes.get_yscale() == "linear"


def test_events_are_marked(swing):
    axes = swing.plot()
    labels = axes.get_legend_handles_labels()[1]
    assert labels == ["y[0]", "y[1]", "event 0", "event 1"]
    upright = [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == ":"]
    expected = torch.cat([event.times for event in swing.events])
    assert np.array_equal(upright, expected.detach().numpy())
    circles = [line.get_ydata() for line in axes.get_lines() if line.get_marker() == "o"]
    first = swing.events[0].states.detach().numpy()
    assert np.array_equal(circles[0], first[:, 0]) and np.array_equal(circles[1], first[:, 1])


LOG_TIMES = torch.logspace(-5, 2, 40, dtype=torch.float64)


@pytest.mark.parametrize(
    ("ts", "scale"),
    [
        (LOG_TIMES, "log"),
        (torch.cat([torch.zeros(1, dtype=torch.float64), LOG_TIMES]), "symlog"),
        (torch.linspace(0, 1, 1001), "linear"),
        (torch.linspace(0.001, 1, 1000), "linear"),
        (-LOG_TIMES, "linear"),
        (torch.tensor([0.0, 1.0]), "linear"),
        (torch.tensor([0.0]), "linear"),
    ],
)
def test_scale_of_time(ts, scale):
    axes = made(ts, torch.ones(len(ts), 1)).plot()
    assert axes.get_xscale() == scale
    axes.figure.canvas.draw()
    if len(ts) > 1 and scale != "linear":  # all times are seen, and nothing far from them
        low, high = axes.transData.transform([(ts[0], 1), (ts[-1], 1)])[:, 0]
        box = axes.get_window_extent()
        assert 0 <= low - box.x0 < 0.1 * box.width and 0 <= box.x1 - high < 0.1 * box.width
        ticks = [tick for tick in axes.get_xticks() if ts[0] <= tick <= ts[-1]]
        places = axes.transData.transform([(tick, 1) for tick in ticks])[:, 0]
        assert len(ticks) > 3 and np.diff(places).min() > 0.03 * box.width


@pytest.mark.parametrize(
    ("ys", "scale"),
    [
        (torch.tensor([[1.0, 0.0], [0.9, 1e-5], [0.8, 1e-5]]), "log"),
        (torch.linspace(0, 3, 50)[:, None].sin().square(), "linear"),
        (torch.tensor([[1.0, 0.0], [0.9, -1e-5], [0.8, 1e-5]]), "linear"),
        (torch.zeros(3, 2), "linear"),
    ],
)
def test_scale_of_values(ys, scale):
    assert made(torch.arange(float(len(ys))), ys).plot().get_yscale() == scale


def test_log_scale_of_negative_times_is_refused():
    with pytest.raises(pnode.ConfigurationError, match="xscale='log'"):
        made([-1.0, 1.0], torch.ones(2, 1)).plot(xscale="log")


def test_large_state_is_an_image():
    solution = made([0.0, 1.0, 3.0], torch.arange(3 * 30.0).reshape(3, 30))
    (mesh,) = solution.plot().collections
    assert np.array_equal(mesh.get_array().reshape(30, 3), solution.ys.T.numpy())


def test_axes_are_the_users():
    import matplotlib.pyplot as plt

    axes = plt.subplots()[1]
    assert made([0.0, 1.0], torch.ones(2)).plot(axes) is axes
    assert axes.get_ylabel() == "y"


# --------------------------------------------------------------------------------------- arrays


def test_xarray(swing):
    pytest.importorskip("xarray")
    data = swing.to_xarray(names=["swing"])
    assert data["swing"].dims == ("time", "swing_0")
    assert np.array_equal(data["swing"].values, swing.ys.detach().numpy())
    assert np.array_equal(data["time"].values, swing.ts.detach().numpy())
    assert np.array_equal(data["costs"].values, swing.costs.detach().numpy())
    assert np.array_equal(data["event_0"].values, swing.events[0].times.detach().numpy())
    assert np.array_equal(data["event_0_swing"].values, swing.events[0].states.detach().numpy())
    assert data.attrs["reason"] == "event"
    assert json.loads(data.attrs["stats"])["steps"] == swing.stats.steps


def test_xarray_of_a_grid():
    pytest.importorskip("xarray")
    data = made([0.0, 1.0], torch.zeros(2, 3, 4, 5)).to_xarray(grid=Grid((4, 5), fields=3))
    assert data["y"].dims == ("time", "field", "cell_0", "cell_1")
    assert data["y"].shape == (2, 3, 4, 5)
    assert data["cell_1"].values.tolist() == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------------------------------- files


class Pair(NamedTuple):
    q: torch.Tensor
    p: torch.Tensor


def test_file_has_everything(swing, tmp_path):
    pytest.importorskip("h5py")
    swing.save(tmp_path / "a.h5")
    found = pnode.load(tmp_path / "a.h5")
    for name in ("ts", "ys", "costs", "event_time"):
        mine, theirs = getattr(swing, name), getattr(found, name)
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype, name
    assert not found.ys.requires_grad
    assert (found.reason, found.event) == ("event", 1)
    assert found.stats == swing.stats and found.stats.backward.steps > 0
    assert len(found.events) == 2
    for mine, theirs in zip(swing.events, found.events, strict=True):
        assert torch.equal(mine.times, theirs.times)
        assert torch.equal(mine.states, theirs.states)
    assert found.table() == swing.table()


def test_nested_states(tmp_path):
    pytest.importorskip("h5py")
    a, b, c = torch.rand(2, 3), torch.rand(2, dtype=torch.float64), torch.rand(2, 0)
    solution = made([0.0, 1.0], {"x": (a, [b]), 2: Pair(c, a)})
    solution.save(tmp_path / "a.h5")
    found = pnode.load(tmp_path / "a.h5").ys
    assert list(found) == ["x", 2]
    assert isinstance(found["x"], tuple) and isinstance(found["x"][1], list)
    assert found[2]._fields == ("q", "p") and type(found[2]).__name__ == "Pair"
    pairs = [(found["x"][0], a), (found["x"][1][0], b), (found[2].q, c), (found[2].p, a)]
    assert all(torch.equal(mine, theirs) and mine.dtype == theirs.dtype for mine, theirs in pairs)


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "a.h5"
    made([0.0], torch.ones(1, 1)).save(path)

    def full(*arguments, **keywords):
        raise OSError("no space left")

    monkeypatch.setattr(h5py.Group, "create_dataset", full)
    with pytest.raises(OSError, match="no space left"):
        made([0.0], torch.zeros(1, 1)).save(path)
    monkeypatch.undo()
    assert pnode.load(path).ys.item() == 1.0


@pytest.mark.parametrize("name", ["save", "write_xdmf"])
def test_where_nothing_can_be_written(name, tmp_path, monkeypatch):
    pytest.importorskip("h5py"), pytest.importorskip("meshio")
    solution = made([0.0], torch.ones(1, 8))
    write = partial(getattr(solution, name), **({} if name == "save" else {"grid": Grid((8,))}))
    (tmp_path / "folder.xdmf").mkdir()
    for path, message in (
        (tmp_path / "none" / "a.xdmf", r"none/a.xdmf': there is no folder '.*none'; make it"),
        (tmp_path / "folder.xdmf", "is a folder: give the name of a file in it"),
        (None, "path=None: give the name of a file"),
        (3, "path=3: give the name of a file"),
    ):
        with pytest.raises(pnode.ConfigurationError, match=message):
            write(path)
    monkeypatch.setattr(os, "access", lambda *arguments: False)  # root may write everywhere
    with pytest.raises(pnode.ConfigurationError, match="nothing may be written into"):
        write(tmp_path / "a.xdmf")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.xdmf"]


def test_what_cannot_be_loaded(tmp_path):
    h5py = pytest.importorskip("h5py")
    with pytest.raises(pnode.ConfigurationError, match="no such file"):
        pnode.load(tmp_path / "none.h5")
    with pytest.raises(pnode.ConfigurationError, match="path=None: give the name of a file"):
        pnode.load(None)
    (tmp_path / "text.h5").write_text("something else")
    with pytest.raises(pnode.ConfigurationError, match="is not a file that save"):
        pnode.load(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1.0
    with pytest.raises(pnode.ConfigurationError, match="no solution of pnode's"):
        pnode.load(tmp_path / "other.h5")
    made([0.0], torch.ones(1, 8)).save(tmp_path / "plain.h5")
    with pytest.raises(pnode.ConfigurationError, match="saved with no grid"):
        pnode.load(tmp_path / "plain.h5", grid=Grid((8,)))
    with pytest.raises(pnode.ConfigurationError, match="rank=1"):
        pnode.load(tmp_path / "plain.h5", rank=1)
    with pytest.raises(pnode.ConfigurationError, match="exclude one another"):
        pnode.load(tmp_path / "plain.h5", rank=1, grid=Grid((8,)))
    with pytest.raises(pnode.ConfigurationError, match="none that save"):
        made([0.0], {math.pi: torch.ones(1)}).save(tmp_path / "odd.h5")


@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 4)])
def test_xdmf_read_back(shape, tmp_path, monkeypatch):
    """Each cell has its value at its place: the center is half a cell from the corner."""
    meshio = pytest.importorskip("meshio")
    pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inner").mkdir()
    grid = Grid(shape, fields=2)
    ys = torch.rand(3, 2, *shape, dtype=torch.float64)
    spacing, origin = [0.5, 2.0, 3.0][: len(shape)], [-1.0, 0.0, 1.0][: len(shape)]
    solution = made([0.0, 0.25, 2.0], ys)
    solution.write_xdmf("inner/flow.xdmf", grid, names=["u", "v"], spacing=spacing, origin=origin)
    assert {path.name for path in tmp_path.rglob("*.*")} == {"flow.xdmf", "flow.h5"}
    kind = {1: "line", 2: "quad", 3: "hexahedron"}[len(shape)]
    with meshio.xdmf.TimeSeriesReader("inner/flow.xdmf") as reader:
        points, cells = reader.read_points_cells()
        centers = points[cells[0].data].mean(axis=1)[:, : len(shape)]
        assert cells[0].type == kind
        index = np.rint((centers - origin) / spacing - 0.5).astype(int)
        assert np.allclose((index + 0.5) * spacing + origin, centers)
        assert len(np.unique(index, axis=0)) == math.prod(shape)
        volumes = np.ptp(points[cells[0].data], axis=1)[:, : len(shape)].prod(axis=1)
        assert np.allclose(volumes, math.prod(spacing))
        assert reader.num_steps == 3
        for number, time in enumerate([0.0, 0.25, 2.0]):
            found, _, values = reader.read_data(number)
            assert found == time
            for field, name in enumerate("uv"):
                expected = ys[number, field].numpy()[tuple(index.T)]
                assert np.array_equal(values[name][0], expected)


def test_xdmf_of_something_else(tmp_path):
    pytest.importorskip("meshio")
    solution = made([0.0], torch.ones(1, 8))
    with pytest.raises(pnode.ConfigurationError, match="must be one tensor of shape"):
        solution.write_xdmf(tmp_path / "a.xdmf", Grid((7,)))
    with pytest.raises(pnode.ConfigurationError, match="must end in"):
        solution.write_xdmf(tmp_path / "a.vtk", Grid((8,)))
    with pytest.raises(pnode.ConfigurationError, match="spacing"):
        solution.write_xdmf(tmp_path / "a.xdmf", Grid((8,)), spacing=-1.0)


@pytest.mark.parametrize(
    ("call", "module", "command"),
    [
        (lambda s, path: s.plot(), "matplotlib", "pnode[plot]"),
        (lambda s, path: s.to_xarray(), "xarray", "pnode[io]"),
        (lambda s, path: s.save(path), "h5py", "pnode[io]"),
        (lambda s, path: pnode.load(path), "h5py", "pnode[io]"),
        (lambda s, path: s.write_xdmf("a.xdmf", Grid((2,))), "meshio", "pnode[io]"),
    ],
)
def test_packages_that_are_missing(call, module, command, monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(pnode.MissingPackage) as caught:
        call(made([0.0], torch.ones(1, 2)), tmp_path / "a.h5")
    assert isinstance(caught.value, ImportError)
    assert f"pip install {module}" in str(caught.value) and command in str(caught.value)

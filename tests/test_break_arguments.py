"""What is given as break points, what is refused, and torchdiffeq's options that mean the same."""

import numpy as np
import pytest
import torch

import pnode
from pnode import controls
from pnode.solvers.methods import METHODS

D = torch.float64
TIMES = torch.tensor([0.0, 0.5, 1.2], dtype=D)
BREAKS = torch.tensor([0.4, 0.8], dtype=D)
U = controls.hold(torch.tensor([0.0, 0.4, 0.8], dtype=D), torch.tensor([1.0, -2.0, 0.5], dtype=D))


def vector(*numbers):
    return torch.tensor(numbers, dtype=D)


def driven(t, y):
    return U(t).to(y) - y


def solve(breakpoints, t=TIMES, y0=None, f=driven, **options):
    options = {"method": "rk4", "step_size": 0.1, "compile": False, **options}
    y0 = vector(0.5) if y0 is None else y0
    return pnode.Solver(f, **options)(y0, t, breakpoints=breakpoints)


@pytest.mark.parametrize(
    "given",
    [[0.4, 0.8], (0.8, 0.4), np.array([0.4, 0.8]), BREAKS.flip(0), U, [U, U],
     controls.linear([0.0, 0.4, 0.8], torch.zeros(3)), lambda t0, t1: [0.4, 0.8],
     lambda t0, t1: torch.arange(t0 + 0.4, t1, 0.4, dtype=D)[:2], vector(0.0, 0.4, 0.8, 1.2)],
)  # fmt: skip
def test_ways_to_give_them(given):
    expected = solve(BREAKS)
    torch.testing.assert_close(solve(given).ys, expected.ys, rtol=0.0, atol=1e-15)
    assert abs(float(solve(None).ys[-1] - expected.ys[-1])) > 1e-3


def test_none_between_the_ends_is_a_solve_as_ever():
    whole = solve(None, f=lambda t, y: -y)
    for given in ([], torch.zeros(0), [0.0], [1.2], [0.0, 1.2]):
        assert torch.equal(solve(given, f=lambda t, y: -y).ys, whole.ys)
    only = solve([0.0], t=vector(0.0))
    assert torch.equal(only.ys, vector(0.5)[None])


def test_ends_are_seen_from_inside():
    """A switch at the very first and last time."""
    jump = {"f": lambda t, y: torch.where((t > 0.0) & (t < 1.2), 1.0, 50.0).to(y) + 0.0 * y}
    torch.testing.assert_close(solve([0.0, 1.2], **jump).ys[-1], vector(1.7), rtol=0.0, atol=1e-14)
    torch.testing.assert_close(
        solve([-1.2, 0.0], t=vector(0.0, -1.2), f=lambda t, y: jump["f"](-t, y)).ys[-1],
        vector(-0.7), rtol=0.0, atol=1e-14,
    )  # fmt: skip


def test_nearest_spacing_decides():
    """Outputs off by round-off are at the break; no sliver of a step is taken."""
    t = torch.tensor([0.0, 0.1 + 0.2, 1.2], dtype=D)
    solution = solve([0.3, 0.8], t=t, step_size=0.3)
    assert solution.stats.steps == 1 + 2 + 2
    single = torch.tensor([0.0, 0.3, 1.2], dtype=torch.float32)
    assert solve([0.3, 0.8], t=single, step_size=0.3).stats.steps == 1 + 2 + 2


BAD = [
    ([0.4, float("nan")], "NaN"),
    ([0.4, float("inf")], "NaN or infinity"),
    ([0.8, 0.4, 0.9], "strictly increase, or decrease"),
    ([0.4, 0.4], "strictly increase"),
    ([-0.1, 0.4], r"has -0\.1.*leave times outside"),
    ([0.4, 1.3], r"has 1\.3.*from t = 0\.0 to 1\.2"),
    ([[0.4, 0.8]], r"shape \(1, 2\)"),
    (0.4, r"shape \(\)"),
    ("0.4", "give times"),
    ([True, False], r"breakpoints\[0\]=True"),
    (torch.tensor([True]), "torch.bool"),
    (torch.tensor([0.4 + 0.1j]), "complex64"),
    (torch.eye(2).to_sparse(), "shape"),
    ([torch.tensor(0.4, requires_grad=True)], r"breakpoints\[0\] requires grad.*torch\.stack"),
    (["a"], "give times"),
    ([0.4, U], "give times"),
    ({"t": 0.4}, "give times"),
    ([0.4, 0.4 + 1e-15], "leave a part of length"),
    ([0.4, 0.5000000000000001, 0.500000000000005], "leave a part of length"),
    (lambda t0, t1: [t1 + 1.0], r"has 2\.2"),
    (torch.tensor([0.0, 0.4], requires_grad=True), "has 0.0, an end of the solve"),
    (torch.tensor([0.4, 1.2], dtype=D, requires_grad=True), "has 1.2, an end of the solve"),
]


@pytest.mark.parametrize(("given", "text"), BAD, ids=[text for _, text in BAD])
def test_unusable_break_points(given, text):
    with pytest.raises(pnode.ConfigurationError, match=text) as caught:
        solve(given)
    assert "breakpoints" in str(caught.value)


def test_parts_that_single_precision_does_not_resolve():
    y0 = torch.zeros(1, dtype=torch.float32)
    with pytest.raises(pnode.ConfigurationError, match=r"torch\.float32 are.*float64"):
        solve([1000.0, 1000.001], t=torch.tensor([999.0, 1001.0]), y0=y0)
    solve([1000.0, 1000.001], t=torch.tensor([999.0, 1001.0], dtype=D))


OUTSIDE = ["ruth3", "forest_ruth", "ra3pw", "r34prw", "r3prl2", "grk4t", "shamp4", "veldd4",
           "ros4l", "esdirk6", "esdirk7", "sdirk7"]  # fmt: skip


def test_methods_that_look_beyond_their_steps_are_refused():
    """Exactly those with a node outside of [0, 1], each by name, with one that works."""
    beyond = []
    for info in METHODS:  # without what other tests bring
        options = {"step_size": 0.3}
        y0 = (vector(0.5), vector(0.5)) if "separable" in info.forms else vector(0.5)

        def f(t, y):
            return (y[1], -y[0]) if isinstance(y, tuple) else -y

        forms = {"rhs": f}
        if info.kind == "imex":
            forms = {"implicit": f, "explicit": f}
        own = pnode.Solver(**forms, method=info.name, **options)
        try:
            own(y0, TIMES, breakpoints=BREAKS)
        except pnode.ConfigurationError as error:
            assert f"method={info.name!r}" in str(error) and "take '" in str(error)
            beyond.append(info.name)
    assert beyond == sorted(beyond, key=[info.name for info in METHODS].index)
    assert set(beyond) == set(OUTSIDE)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"samples": "independent", "method": "dopri5"}, "independent"),
        ({"gradient": "continuous"}, "continuous"),
        ({"sensitivity_control": "random", "method": "dopri5", "step_size": None}, "sensitivity"),
        ({"checkpointing": "resume"}, "resume"),
    ],
)
def test_what_does_not_go_with_parts(options, text, tmp_path):
    if options.get("checkpointing"):
        chosen = pnode.Checkpointing(memory="1MB", disk=tmp_path, resume="name")
        options = {"checkpointing": chosen}
    y0 = vector(0.5)[None] if "samples" in options else vector(0.5)
    with pytest.raises(pnode.ConfigurationError, match=f"breakpoints= does not go with .*{text}"):
        solve(BREAKS, y0=y0, **options)


def test_derivatives_by_breaks_of_what_does_not_tell_the_rate():
    moving = BREAKS.clone().requires_grad_()
    with pytest.raises(pnode.ConfigurationError, match=r"breakpoints requires grad.*residual="):
        solver = pnode.Solver(residual=lambda t, y, v: v + y, method="bdf2", step_size=0.1)
        solver(vector(0.5), [0.0, 2.0], breakpoints=moving)


def test_stages_are_refused():
    y0 = vector(0.5).requires_grad_()
    solution = solve(BREAKS, y0=y0)
    with pytest.raises(pnode.BackwardError, match="breakpoints="):
        solution.stages(torch.ones_like(solution.ys), print)


def test_hold_names_the_way_to_its_times():
    with pytest.raises(pnode.ConfigurationError, match="breakpoints="):
        controls.hold(BREAKS.clone().requires_grad_(), BREAKS)


# odeint, and the options of torchdiffeq.


def test_odeint_takes_break_points():
    y0, moving = vector(0.5), BREAKS.clone().requires_grad_()
    expected = solve(moving)
    found = pnode.odeint(driven, y0, TIMES, method="rk4", step_size=0.1, breakpoints=moving)
    assert torch.equal(found, expected.ys)
    for one, other in zip(
        torch.autograd.grad(found[-1].sum(), moving),
        torch.autograd.grad(expected.ys[-1].sum(), moving),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "options",
    [{"jump_t": BREAKS}, {"step_t": BREAKS.flip(0)}, {"grid_points": BREAKS},
     {"jump_t": vector(0.8, -3.0, 5.0), "step_t": [0.4, 0.8, 1.2]},
     {"jump_t": BREAKS, "perturb": False, "dtype": D, "norm": None, "min_step": 0,
      "max_step": float("inf")}],
)  # fmt: skip
def test_times_at_which_steps_end(options):
    """In any order; those outside of the solve, and those given twice, are left away."""
    found = pnode.odeint(driven, vector(0.5), TIMES, options=options)
    expected = pnode.odeint(driven, vector(0.5), TIMES, breakpoints=BREAKS)
    assert torch.equal(found, expected)
    seen = pnode.odeint(driven, vector(0.5), TIMES, options=options | {"perturb": True})
    assert torch.equal(seen, expected)


def test_grids_of_fixed_steps():
    """Steps go along the grid, as in torchdiffeq, and to the outputs besides."""
    seen = []
    options = {"grid_constructor": lambda f, y0, t: vector(0.0, 0.4, 0.7, 0.8, 1.2)}
    found = pnode.odeint(
        driven, vector(0.5), vector(0.0, 0.7, 1.2), method="rk4", options=options,
        monitor=lambda step, t, y: seen.append(t),
    )  # fmt: skip
    assert seen == [0.4, 0.7, 0.8, 1.2]
    y, parts = vector(0.5), []
    for value, start, end in ((1.0, 0.0, 0.4), (-2.0, 0.4, 0.7), (-2.0, 0.7, 0.8), (0.5, 0.8, 1.2)):
        y = pnode.odeint(lambda t, y, u=value: u - y, y, vector(start, end), method="rk4")[-1]
        parts.append(y)
    torch.testing.assert_close(found[1:], torch.stack([parts[1], parts[3]]), rtol=1e-15, atol=0.0)


def test_cubic_interpolation_is_dense_output():
    times = torch.linspace(0.0, 1.2, 7, dtype=D)
    options = {"step_size": 0.4, "interp": "cubic"}
    smooth = {"func": lambda t, y: -y, "y0": vector(0.5), "t": times, "method": "rk4"}
    found = pnode.odeint(**smooth, options=options)
    assert torch.equal(found, pnode.odeint(**smooth, step_size=0.4, dense=True))
    without = pnode.odeint(**smooth, options={"interp": "cubic"})
    assert torch.equal(without, pnode.odeint(**smooth))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"perturb": True}, "jump_t"),
        ({"interp": "linear"}, "dense=True"),
        ({"norm": "l2"}, "norm='l2'.*callable"),
        ({"safety": 1.8}, "safety=1.8"),
        ({"ifactor": 0.5}, "factormax=0.5"),
        ({"dtype": torch.float32}, "float64"),
        ({"eps": 1e-3}, "drop it"),
        ({"solver": "LSODA"}, "bdf"),
        ({"tolerance": 1}, "choose from"),
        ({"jump_t": 0.4}, "1-D"),
        ({"jump_t": [float("nan")]}, "1-D"),
        ({"jump_t": "soon"}, "1-D"),
        ({"grid_constructor": lambda f, y0, t: t}, "adaptive"),
        ({"jump_t": BREAKS, "min_step": -1.0}, "min_step"),
    ],
)
def test_options_that_are_refused(options, text):
    with pytest.raises(pnode.ConfigurationError, match=text):
        pnode.odeint(driven, vector(0.5), TIMES, options=options)


def test_grids_that_are_refused():
    for options, text in (
        ({"grid_constructor": lambda f, y0, t: t[:-1]}, r"from 0\.0 to 0\.5, and t is"),
        ({"grid_constructor": 3}, "callable"),
        ({"grid_constructor": lambda f, y0, t: t, "step_size": 0.1}, "drop one"),
    ):
        with pytest.raises(pnode.ConfigurationError, match=text):
            pnode.odeint(driven, vector(0.5), TIMES, method="rk4", options=options)
    with pytest.raises(pnode.ConfigurationError, match="both"):
        pnode.odeint(driven, vector(0.5), TIMES, options={"jump_t": BREAKS}, breakpoints=BREAKS)


def test_callbacks_that_nobody_would_call_are_refused():
    class Told(torch.nn.Module):
        def forward(self, t, y):
            return -y

        def callback_step_adjoint(self, t0, y0, dt):
            raise AssertionError

    with pytest.raises(pnode.ConfigurationError, match=r"callback_step_adjoint.*callback_accept"):
        pnode.odeint(Told(), vector(0.5), TIMES)

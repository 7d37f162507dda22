"""A change of f that does not show in its value where a solve begins is noticed all the same."""

from __future__ import annotations

import pytest
import torch
from test_compiled import interpreted

import pnode
from pnode.errors import ConfigurationError

__all__ = ["interpreted"]  # a fixture

D = torch.float64
TIMES = torch.tensor([0.0, 0.5, 1.0], dtype=D)


class Field:
    """Whatever the attributes are, zero at t = 0 and y = 0."""

    forcing = torch.tensor([1.0, -2.0], dtype=D)
    number = 1.0
    power = 2
    flag = False
    closure = torch.tensor([0.5, 1.5], dtype=D)
    other = torch.tensor([2.5, -1.5], dtype=D)
    zero = 0.0
    rounding = "floor"

    def __init__(self, course):
        self.course = course

    def __call__(self, t, y):
        return getattr(self, self.course)(t, y) + torch.sin(t) * self.forcing

    def numbers(self, t, y):
        return -self.number * y

    def branches_of_where(self, t, y):
        return torch.where(t > 0.3, self.number * y, -y)

    def tensors_of_numbers(self, t, y):
        return -torch.tensor([self.number, 2.0], dtype=D) * y

    def filled_tensors(self, t, y):
        return -torch.full((2,), self.number, dtype=D) * y

    def which_tensor(self, t, y):
        return -(self.other if self.flag else self.closure) * y

    def operations(self, t, y):
        return -y + y.square() if self.flag else -y

    def how_often(self, t, y):
        for _ in range(self.power):
            y = torch.sin(y)
        return -y

    def powers(self, t, y):
        return -(y**self.power)

    def indices(self, t, y):
        return -y[int(self.flag)] * torch.ones_like(y)

    def replaced(self, t, y):
        return -self.closure * y

    def signs_of_zero(self, t, y):
        return -y * (1.0 + torch.copysign(y.square(), torch.full_like(y, self.zero)))

    def words(self, t, y):
        return -torch.div(y, 0.01, rounding_mode=self.rounding) * 0.01

    def precision(self, t, y):
        return -y.to(torch.float32 if self.flag else D).to(D) / 3.0


CHANGES = {
    "numbers": {"number": 2.0}, "branches_of_where": {"number": 3.0},
    "tensors_of_numbers": {"number": 2.0}, "filled_tensors": {"number": 2.0},
    "which_tensor": {"flag": True}, "operations": {"flag": True}, "how_often": {"power": 3},
    "powers": {"power": 3}, "indices": {"flag": True},
    "replaced": {"closure": torch.tensor([2.0, 3.0], dtype=D)},
}  # fmt: skip
# What no scalar program has, or takes for something else.
MORE = CHANGES | {
    "signs_of_zero": {"zero": -0.0}, "words": {"rounding": "trunc"}, "precision": {"flag": True},
}  # fmt: skip
WAYS = {
    "steps": {"method": "bosh3", "step_size": 0.1},
    "adaptive steps": {"method": "dopri5", "rtol": 1e-6, "atol": 1e-8},
    "field": {
        "method": "bdf2",
        "step_size": 0.05,
        "jacobian": "matrix-free",
        "preconditioner": "dense",
    },  # with which the field alone is compiled
    "sweeps": {"method": "cn", "step_size": 0.1},
}
COURSES = {"steps": MORE, "adaptive steps": ["numbers", "replaced"]}
CASES = [(way, course) for way in WAYS for course in COURSES.get(way, CHANGES)]


def results(ys, y0):
    found = [ys.detach()]
    if y0.requires_grad:
        found += torch.autograd.grad(ys[-1] @ torch.tensor([1.0, 2.0], dtype=D), y0)
    return found


def assert_same(found, expected, rtol=1e-9):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=rtol, atol=1e-11)


@pytest.mark.parametrize(("way", "course", "grad"), [
    *((way, course, True) for way, course in CASES),
    *((way, course, False) for way, course in CASES if way != "sweeps"),
])  # fmt: skip
def test_changes_that_do_not_show_at_first(way, course, grad, request):
    if way != "sweeps":
        calls = request.getfixturevalue("interpreted")
    field = Field(course)
    eager, solver = (pnode.Solver(field, compile=c, **WAYS[way]) for c in (False, True))

    def run(each):
        y0 = torch.zeros(2, dtype=D, requires_grad=grad)
        return results(each(y0, TIMES).ys, y0)

    before = [run(each) for each in (eager, solver, solver)]
    for name, value in MORE[course].items():
        setattr(field, name, value)
    after = [run(each) for each in (eager, solver, solver)]
    assert_same(before[1], before[0])
    assert_same(before[2], before[0])
    assert_same(after[1], after[0])
    assert_same(after[2], after[0])
    # It was to be seen, though not at t = 0 and y = 0.
    assert not torch.allclose(after[0][0], before[0][0], rtol=1e-9, atol=1e-12)
    for name in MORE[course]:
        delattr(field, name)
    assert_same(run(solver), before[0])
    if way != "sweeps":
        assert calls
    assert not solver._engine.compiler._refused


def test_a_tensor_replaced_by_its_equal(interpreted):
    """What is read anew from then on is the new one."""
    field = Field("replaced")
    eager, solver = (pnode.Solver(field, compile=c, **WAYS["steps"]) for c in (False, True))
    y0 = torch.ones(2, dtype=D)
    solver(y0, TIMES)
    field.closure = Field.closure.clone()
    assert torch.allclose(solver(y0, TIMES).ys, eager(y0, TIMES).ys, rtol=1e-12)
    field.closure.mul_(2.0)
    assert torch.allclose(solver(y0, TIMES).ys, eager(y0, TIMES).ys, rtol=1e-12)
    assert len(solver._engine.compiler._codes) == 1  # and there is nothing to be compiled for it


@pytest.mark.parametrize("shared", [lambda x: x[:1].expand(2, 2), lambda x: x.unfold(0, 2, 1)])
def test_entries_that_share_memory_no_longer(shared, interpreted):
    """Other values cannot be copied into the strides that the matrix had; at y0 none show."""
    matrix = shared(torch.tensor([0.5, 1.5, 2.5], dtype=D))
    eager, solver = (
        pnode.Solver(lambda t, y: torch.sin(t) - matrix @ y, compile=c, **WAYS["steps"])
        for c in (False, True)
    )
    y0 = torch.zeros(2, dtype=D)
    before = [each(y0, TIMES).ys for each in (eager, solver)]
    matrix.data = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=D)
    after = [each(y0, TIMES).ys for each in (eager, solver)]
    assert torch.allclose(*before, rtol=1e-12) and torch.allclose(*after, rtol=1e-12)
    assert not torch.allclose(before[0], after[0]) and interpreted


@pytest.mark.parametrize("way", ["steps", "sweeps"])
def test_tensors_that_come_to_require_grad(way, interpreted):
    """What nobody declared is an error then, too, and not a gradient of zero."""
    rate = torch.tensor(0.5, dtype=D)
    solver = pnode.Solver(lambda t, y: -rate * y, compile=True, **WAYS[way])
    y0 = torch.ones(2, dtype=D, requires_grad=True)
    for trainable in (False, False, True, False, True):
        rate.requires_grad_(trainable)
        if trainable:
            with pytest.raises(ConfigurationError, match=r"shape \(\) that requires grad"):
                solver(y0, TIMES)
        else:
            assert torch.isclose(solver(y0, TIMES).ys[-1, 0], (-0.5 * TIMES[-1]).exp(), rtol=1e-3)


def traces(solver):
    return list(solver._engine.compiler._traces.values())


@pytest.mark.parametrize("course", ["tensors_of_numbers", "replaced", "how_often"])
def test_without_a_change_nothing_is_traced_again(course, interpreted):
    """Nor after one in place, which takes effect, or where f makes tensors each time anew."""
    field = Field(course)
    field.closure = Field.closure.clone()
    eager, solver = (pnode.Solver(field, compile=c, **WAYS["steps"]) for c in (False, True))
    known = []
    for number in range(4):
        y0 = torch.full((2,), 0.1 * number, dtype=D, requires_grad=number % 2 > 0)
        with torch.set_grad_enabled(number != 2):
            assert torch.allclose(solver(y0, TIMES).ys, eager(y0, TIMES).ys, rtol=1e-12)
        field.closure += 0.5
        known.append(traces(solver))
    assert known[0] == known[1] == known[2] == known[3]


@pytest.mark.parametrize("jacobian", ["dense", "sparse"])
def test_both_parts_of_a_split_field(jacobian, interpreted):
    """In whole sweeps, and by themselves."""
    parts = Field("numbers"), Field("branches_of_where")
    eager, solver = (
        pnode.Solver(
            implicit=parts[0], explicit=parts[1], method="ark3", step_size=0.1, compile=c,
            jacobian=jacobian,
        )
        for c in (False, True)
    )  # fmt: skip

    def run(each):
        y0 = torch.zeros(2, dtype=D, requires_grad=True)
        return results(each(y0, TIMES).ys, y0)

    for part in (None, *parts):
        if part is not None:
            part.number = 4.0
        expected = run(eager)
        assert_same(run(solver), expected)
        assert_same(run(solver), expected)
    assert bool(interpreted) == (jacobian == "sparse")


def test_states_of_two_tensors(interpreted):
    """Which of them is taken, where both are the same at first."""
    picked = [0]

    def field(t, y):
        return -y[picked[0]] + torch.sin(t), -2.0 * y[1] + torch.cos(t)

    eager, solver = (pnode.Solver(field, compile=c, **WAYS["steps"]) for c in (False, True))
    y0 = (torch.zeros(3, dtype=D), torch.zeros(3, dtype=D))
    for number in (0, 1):
        picked[0] = number
        expected = eager(y0, TIMES).ys
        assert_same(solver(y0, TIMES).ys, expected)
    assert interpreted


def test_casts_of_autocast(interpreted):
    """Within autocast, where casts may be kept from evaluation to evaluation, and without."""
    weight = torch.nn.Parameter(torch.tensor([[1.001, 0.5], [0.25, 1.003]]))
    seen = []

    def field(t, y):
        seen.append(torch.is_autocast_enabled("cpu"))
        return -(y @ weight).to(y.dtype) + torch.sin(t)

    eager, solver = (
        pnode.Solver(field, params=[weight], compile=c, **WAYS["steps"]) for c in (False, True)
    )
    y0, times = torch.zeros(3, 2), TIMES.float()
    for enabled in (False, True, True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found, expected = (each(y0, times).ys.detach() for each in (solver, eager))
            assert seen[-1] is enabled
        torch.testing.assert_close(found, expected, rtol=1e-6 if not enabled else 1e-2, atol=1e-6)
    assert interpreted


class Passed(torch.autograd.Function):
    """Itself, with a derivative of its own."""

    @staticmethod
    def forward(context, x, factor):
        context.factor = factor
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return context.factor * gradient, None


class Cut:
    """What changes derivatives alone: hooks, blocks without a graph, functions of one's own."""

    number, flag = 1.0, False
    weight = torch.nn.Parameter(torch.tensor([0.5, 1.5], dtype=D))

    def hook(self, t, y):
        z = -self.weight * y
        if z.requires_grad:
            z.register_hook(lambda gradient: self.number * gradient)
        return z

    def hook_of_a_product_of_parameters(self, t, y):
        z = self.weight * 2.0
        if self.flag and z.requires_grad:
            z.register_hook(lambda gradient: 3.0 * gradient)
        return -z * y

    def hook_always(self, t, y):
        z = -self.weight * y
        z.register_hook(lambda gradient: self.number * gradient)
        return z

    def block_later(self, t, y):
        if self.flag:
            with torch.no_grad():
                z = y * 0.5
        else:
            z = y * 0.5
        return z - self.weight * y

    def hook_beside_an_operator(self, t, y):
        z = torch.ops.aten.mul(y, -self.weight)
        if self.flag and z.requires_grad:
            z.register_hook(lambda gradient: 3.0 * gradient)
        return z

    def block_of_inference_later(self, t, y):
        with torch.inference_mode(self.flag):
            z = y.sin().clone()
        return z - self.weight * y

    def own_later(self, t, y):
        return -self.weight * (Passed.apply(y, 3.0) if self.flag else y.clone())

    def own_later_beside_an_operator(self, t, y):
        z = torch.ops.aten.mul(y, -1.0)
        return self.weight * (Passed.apply(z, 3.0) if self.flag else z.clone())

    def own_made_each_time(self, t, y):
        class Mine(Passed):
            pass

        return -self.weight * (Mine.apply(y, 3.0) if self.flag else y.clone())

    def switch(self, t, y):
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.flag):
            z = y * 0.5
        return z - self.weight * y


@pytest.mark.parametrize("course", [name for name in vars(Cut) if name[0] in "hbso"])
def test_what_changes_derivatives_alone(course, interpreted):
    field = Cut()
    eager, solver = (
        pnode.Solver(getattr(field, course), params=[field.weight], compile=c, **WAYS["steps"])
        for c in (False, True)
    )
    found = []
    for change in (False, True, False, False, False, True, True, False):
        field.flag, field.number = change, 1.0 + 2.0 * change
        for each in (eager, solver):
            y0 = torch.ones(2, dtype=D, requires_grad=True)
            ys = each(y0, TIMES).ys
            found.append([ys.detach(), *torch.autograd.grad(ys[-1].sum(), [y0, field.weight])])
        assert_same(found[-1], found[-2])
    gradients = [torch.cat(each[1:]) for each in found]
    assert not torch.allclose(gradients[0], gradients[-4], rtol=1e-3) and interpreted
    assert torch.autograd.Function.__dict__["apply"].__func__.__module__.startswith("torch.")


@pytest.mark.parametrize("way", ["steps", "field"])
def test_numbers_in_derivatives_of_ones_own(way, interpreted):
    field = Field("numbers")
    field.own = lambda t, y: -Passed.apply(y, field.number)
    field.course = "own"
    eager, solver = (pnode.Solver(field, compile=c, **WAYS[way]) for c in (False, True))
    gradients = []
    for number in (1.0, 3.0):
        field.number = number
        for each in (eager, solver, solver):
            y0 = torch.ones(2, dtype=D, requires_grad=True)
            gradients.append(results(each(y0, TIMES).ys, y0)[1])
        torch.testing.assert_close(gradients[-2:], [gradients[-3]] * 2, rtol=1e-9, atol=0.0)
    assert not torch.allclose(gradients[0], gradients[-1])


def test_a_field_that_is_another_each_time():
    """Of which there is no trace to hold on to."""
    count = [0.0]

    def field(t, y):
        count[0] += 1.0
        return torch.where(t > 5.0, count[0] * y, -y)  # its value is the same all along

    solver = pnode.Solver(field, compile=True, **WAYS["steps"])
    with torch.no_grad(), pytest.warns(UserWarning, match="other operations in each evaluation"):
        ys = solver(torch.ones(2, dtype=D), TIMES).ys
    expected = pnode.Solver(lambda t, y: -y, **WAYS["steps"])(torch.ones(2, dtype=D), TIMES).ys
    assert torch.equal(ys, expected)

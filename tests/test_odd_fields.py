"""Fields that differentiate something themselves, are sparse, have no graph or no derivative."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from representatives import representatives

import pnode
from pnode.base.graphs import NODE_BYTES, graph_bytes
from pnode.errors import NonFiniteDerivative, NonFiniteVectorField, VectorFieldError

D = torch.float64
TIMES = torch.tensor([0.0, 0.3, 1.0], dtype=D)
STORES = {
    "default": None,
    "tape": pnode.Checkpointing(store="tape"),
    "stages": pnode.Checkpointing(store="stages"),
    "budget": 1200,
}
EXPLICIT = [method.name for method in representatives() if method.keeps_graphs]
A_FEW = ["rk4", "dopri5", "ssprk43", "cn", "es325", "bdf2", "rodaspr"]


class Energy(torch.nn.Module):
    """H(q, p) of two particles."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(2, 4).to(D)
        self.second = torch.nn.Linear(4, 1).to(D)

    def forward(self, y):
        return self.second(self.first(y).tanh()).sum()


def by_hand(net, y):
    """dH/dy in closed form."""
    z = (y @ net.first.weight.T + net.first.bias).tanh()
    return ((1 - z**2) * net.second.weight[0]) @ net.first.weight


def own_grad(net, y):
    return torch.autograd.grad(net(y), y, create_graph=True)[0]


def own_grad_under_enable(net, y):
    with torch.enable_grad():
        y = y if y.requires_grad else y.detach().requires_grad_(True)
        return torch.autograd.grad(net(y), y, create_graph=True)[0]


def by_jvp(net, y):
    rows = [torch.func.jvp(net, (y,), (row,))[1] for row in torch.eye(y.numel()).to(y)]
    return torch.stack([row for row in rows]).reshape(y.shape)


def by_vjp(net, y):
    return torch.func.vjp(net, y)[1](torch.ones((), dtype=y.dtype))[0]


FORMS = {
    "func.grad": lambda net, y: torch.func.grad(net)(y),
    "func.vjp": by_vjp,
    "func.jacrev": lambda net, y: torch.func.jacrev(net)(y),
    "func.jvp": lambda net, y: by_jvp(net, y.reshape(2)),
    "autograd.grad": own_grad,
    "enable_grad": own_grad_under_enable,
}


def solve(field, name, y0, params, store="default", **keywords):
    step = {} if name == "dopri5" else {"step_size": 0.2}
    solver = pnode.Solver(
        field, params=params, method=name, checkpointing=STORES[store], **step, **keywords
    )
    return solver(y0, TIMES)


def gradients(field, name, net, store="default"):
    y0 = torch.tensor([0.3, -0.2], dtype=D, requires_grad=True)
    loss = solve(field, name, y0, net.parameters(), store).ys.square().sum()
    return torch.autograd.grad(loss, [y0, *net.parameters()], allow_unused=True)


def assert_same(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None or not a.any()
        else:
            assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["rk4", "dopri5", "cn"])
def test_fields_that_differentiate(name, form, store):
    """As a field whose derivative was taken by hand."""
    store = "stages" if (name, store) == ("cn", "tape") else store
    net = Energy()
    found = gradients(lambda t, y: -FORMS[form](net, y).reshape(2), name, net, store)
    expected = gradients(lambda t, y: -by_hand(net, y), name, net, store)
    assert_same(found, expected, 1e-8 if name == "cn" else 1e-10)


@pytest.mark.parametrize("name", EXPLICIT)
def test_torch_func_with_every_method_that_keeps_graphs(name):
    net = Energy()
    found = gradients(lambda t, y: -torch.func.grad(net)(y), name, net)
    assert_same(found, gradients(lambda t, y: -by_hand(net, y), name, net))


@pytest.mark.parametrize("name", A_FEW)
def test_one_grad_mode_for_all_evaluations(name):
    """Enabled where the solve is differentiated, and not where it is not."""
    seen = set()
    a = torch.tensor(1.0, dtype=D, requires_grad=True)

    def field(t, y):
        seen.add((torch.is_grad_enabled(), y.requires_grad))
        return -a * y

    y0 = torch.ones(2, dtype=D)
    solve(field, name, y0, [a], "stages").ys.sum().backward()
    assert seen == {(True, True)}
    seen.clear()
    with torch.no_grad():
        solve(field, name, y0, [a])
    if name in ("rk4", "dopri5", "ssprk43"):
        assert seen == {(False, False)}


@pytest.mark.parametrize("name", A_FEW)
def test_fields_that_differentiate_without_gradients(name):
    net = Energy()
    y0 = torch.tensor([0.3, -0.2], dtype=D)
    with torch.no_grad():
        own = solve(lambda t, y: -own_grad(net, y), name, y0, None).ys
        plain = solve(lambda t, y: -by_hand(net, y), name, y0, None).ys
    assert torch.allclose(own, plain, rtol=1e-10)


ENTRIES = torch.tensor([[0, 0, 1, 2], [0, 1, 2, 0]])


def sparse_matrix(values, layout):
    matrix = torch.sparse_coo_tensor(ENTRIES, values, (3, 3), is_coalesced=True)
    return matrix if layout == "coo" else matrix.to_sparse_csr()


# torch has no gradient of the values through a conversion to CSR.
@pytest.mark.parametrize(("layout", "learned"), [("coo", False), ("coo", True), ("csr", False)])
@pytest.mark.parametrize("store", ["default", "stages"])
@pytest.mark.parametrize("name", ["rk4", "dopri5", "cn"])
@pytest.mark.filterwarnings("ignore:Sparse")
def test_sparse_tensors_in_f(name, store, layout, learned):
    """A graph net: products with an adjacency matrix, also of learned values."""
    values = torch.tensor([0.3, -1.0, 0.7, 0.2], dtype=D, requires_grad=learned)
    w = torch.tensor(0.8, dtype=D, requires_grad=True)
    y0 = torch.tensor([[1.0, 2.0], [0.5, -1.0], [0.1, 0.2]], dtype=D, requires_grad=True)
    params = [w, values] if learned else [w]

    def sparse(t, y):
        return w * torch.sparse.mm(sparse_matrix(values, layout), y).tanh()

    def dense(t, y):
        return w * (torch.zeros(3, 3, dtype=D).index_put(tuple(ENTRIES), values) @ y).tanh()

    found, expected = (
        torch.autograd.grad(solve(f, name, y0, params, store).ys.square().sum(), [y0, *params])
        for f in (sparse, dense)
    )
    assert_same(found, expected, 1e-8 if name == "cn" else 1e-11)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x, x * x)
        return x**3

    @staticmethod
    def backward(ctx, w):
        return 3 * ctx.saved_tensors[1] * w


@pytest.mark.parametrize("name", ["rk4", "dopri5", "cn", "bdf2"])
def test_functions_of_ones_own_and_checkpointed_parts(name):
    a = torch.tensor(0.5, dtype=D, requires_grad=True)
    y0 = torch.tensor([0.3, 0.9], dtype=D, requires_grad=True)

    def own(t, y):
        return -a * Cube.apply(y)

    def part(y):
        return -a * y**3

    def checkpointed(t, y):
        return torch.utils.checkpoint.checkpoint(part, y, use_reentrant=False)

    plain, *others = (
        torch.autograd.grad(solve(f, name, y0, [a]).ys.square().sum(), [y0, a])
        for f in (lambda t, y: part(y), own, checkpointed)
    )
    for other in others:
        assert_same(other, plain, 1e-8)


@pytest.mark.parametrize("name", ["rk4", "dopri5", "cn", "rodaspr", "bdf"])
def test_values_without_a_graph_are_refused(name):
    a = torch.tensor(1.0, dtype=D, requires_grad=True)
    y0 = torch.tensor([0.3, 0.9], dtype=D, requires_grad=True)
    net = Energy()
    fields = (
        lambda t, y: torch.from_numpy(-y.detach().numpy()),
        lambda t, y: torch.stack([torch.tensor(-float(x), dtype=D) for x in y]),
        lambda t, y: torch.autograd.grad(net(y), y)[0],
    )
    for field in fields:
        with pytest.raises(VectorFieldError, match=r"torch has not recorded how .*t = 0\."):
            solve(field, name, y0, [a])
        with torch.no_grad():
            assert solve(field, "rk4", y0, [a]).ys.isfinite().all()
    # These do not depend on y, or only by switching: their derivative is zero.
    for field in (lambda t, y: torch.ones(2, dtype=D), lambda t, y: torch.where(y > 0.3, 1.0, 0.5)):
        solution = solve(lambda t, y, f=field: f(t, y).to(D), name, y0, None)
        assert solution.ys[-1].isfinite().all()


@pytest.mark.parametrize("name", ["rk4", "dopri5", "ssprk43", "cn", "es325", "esdirk6", "rodaspr"])
def test_derivatives_that_are_not_finite(name):
    """The field is finite and its derivative is not: sqrt at zero, also where Newton needs it."""
    p = torch.tensor(1.0, dtype=D, requires_grad=True)
    y0 = torch.tensor([1.0, 0.0], dtype=D, requires_grad=True)
    says = "entry 1 of the state, where y = 0|with respect to y is NaN or infinite at t ="
    with pytest.raises(NonFiniteDerivative, match=says) as caught:
        solve(lambda t, y: p * y.sqrt(), name, y0, [p]).ys[-1].sum().backward()
    assert caught.value.step is not None and caught.value.method == name
    # The derivative with respect to a parameter.
    q = torch.zeros(2, dtype=D, requires_grad=True)
    loss = solve(lambda t, y: q.sqrt() - y, name, y0, [q]).ys[-1].sum()
    with pytest.raises(NonFiniteDerivative, match=r"gradient of parameter 0 .* at entry 0"):
        torch.autograd.grad(loss, q)
    # A loss that is not finite is the user's.
    y = solve(lambda t, y: -p * y, name, y0, [p]).ys[-1]
    assert not torch.autograd.grad(y.sum() * torch.inf, p)[0].isfinite()


@pytest.mark.parametrize("rows", [{}, {"samples": "independent"}], ids=["joint", "independent"])
@pytest.mark.parametrize("compiled", [True, False])
def test_derivatives_that_are_not_finite_in_whole_sweeps(rows, compiled):
    """In machine code and in passes, too, though the values of f and of the solution are finite."""
    q = torch.zeros(2, dtype=D, requires_grad=True)
    y0 = torch.zeros(2, 2, dtype=D, requires_grad=True)
    how = {"method": "beuler", "step_size": 0.25, "compile": compiled, **rows}
    for field, x, says in (
        (lambda t, y: q.sqrt() - y, q, "gradient of parameter 0 .* at entry 0"),
        (lambda t, y: y.square().sum(1, keepdim=True).sqrt() - y, y0, "respect to y is not finite"),
    ):
        ys = pnode.Solver(field, params=[q], **how)(y0, torch.tensor([0.0, 1.0])).ys
        assert ys.isfinite().all()
        with pytest.raises(NonFiniteDerivative, match=says) as caught:
            torch.autograd.grad(ys[-1].sum(), x)
        assert caught.value.method == "beuler" and caught.value.time is not None
        # A loss that is not finite is the user's.
        ys = pnode.Solver(field, params=[q], **how)(y0, torch.tensor([0.0, 1.0])).ys
        assert not torch.autograd.grad(ys[-1].sum() * torch.inf, x)[0].isfinite().any()


@pytest.mark.parametrize("name", ["cn", "bdf", "rodaspr", "es325"])
def test_jacobians_that_are_not_finite(name):
    """At rest |v| has no derivative: not f is to blame, but its Jacobian."""
    p = torch.tensor(1.0, dtype=D, requires_grad=True)
    y0 = torch.zeros(2, dtype=D, requires_grad=True)
    with pytest.raises(NonFiniteVectorField) as caught:
        loss = solve(lambda t, v: -p * v.square().sum().sqrt() * v, name, y0, [p]).ys[-1].sum()
        loss.backward()
    assert isinstance(caught.value, NonFiniteDerivative)


def test_bytes_of_a_graph():
    x = torch.ones(1000, dtype=D, requires_grad=True)
    w = torch.ones((), dtype=D, requires_grad=True)
    y = (w * x).tanh()
    # The product's tanh, tanh's value; w, x and their leaves' nodes: tanh, mul and two of leaves.
    assert graph_bytes(y, [x, w]) == 4 * NODE_BYTES + 8000
    assert graph_bytes(y.exp() + y, [x, w]) == 6 * NODE_BYTES + 16000
    assert graph_bytes(x.detach()) == 0
    part = torch.utils.checkpoint.checkpoint(lambda x: x.exp().tanh(), x, use_reentrant=False)
    assert graph_bytes(part, [x]) >= 2 * NODE_BYTES


def test_bytes_of_what_a_function_keeps_in_its_context():
    """An attribute may be a number in one node and a tensor in the next."""

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            return x * 2.0

        @staticmethod
        def backward(ctx, w):
            return 2.0 * w, None

    x = torch.ones(1000, dtype=D, requires_grad=True)
    for _ in range(2):
        assert graph_bytes(Scale.apply(x, 2.0), [x]) == 2 * NODE_BYTES
        kept = Scale.apply(x, torch.ones(500, dtype=D))
        assert graph_bytes(kept, [x]) == 2 * NODE_BYTES + 4000


class Keeper(torch.nn.Module):
    """Owns f and keeps what a solve returns."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 3).to(D)

    def forward(self, t, y):
        return self.linear(y).tanh()

    def rhs(self, t, y):
        return self.linear(y).sin()


@pytest.mark.parametrize(("name", "keywords"), [
    ("rk4", {"step_size": 0.2}), ("dopri5", {}), ("dopri5", {"dense": True}), ("bdf", {}),
    ("cn", {"step_size": 0.2}), ("rodaspr", {}), ("rk4", {"step_size": 0.2, "checkpointing": 2000}),
])  # fmt: skip
def test_a_module_that_keeps_a_solve_is_collected(name, keywords):
    y0 = torch.ones(2, 3, dtype=D)

    def path(module):
        module.path = pnode.odeint(module, y0, TIMES, method=name, **keywords)

    def of_a_method(module):
        module.path = pnode.odeint(
            module.rhs, y0, TIMES, method=name, params=module.parameters(), **keywords
        )

    def solver_too(module):
        module.solver = pnode.Solver(module, method=name, **keywords)
        module.solution = module.solver(y0[0], TIMES)

    for keep in (path, of_a_method, solver_too):
        module = Keeper()
        gone = weakref.ref(module)
        keep(module)
        del module
        gc.collect()
        assert gone() is None, keep.__name__


def test_compiled_activation_at_the_end():
    """f's value is saved for its own derivative: one memory in two results of a graph."""
    W = torch.tensor([[0.1, 0.4], [-0.5, 0.2]], dtype=D, requires_grad=True)
    y0 = torch.tensor([0.3, 0.9], dtype=D, requires_grad=True)
    found, expected = (
        torch.autograd.grad(
            solve(lambda t, y: (y @ W).tanh(), "bosh3", y0, [W], compile=compiled).ys.sum(),
            [y0, W],
        )
        for compiled in (True, False)
    )
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["rk4", "cn"])
def test_a_parameter_as_the_value(name):
    """What f returns is flat already, requires grad and is the user's own tensor."""
    rate = torch.tensor([0.5, -1.5, 0.25], dtype=D, requires_grad=True)
    y0 = torch.tensor([1.0, 2.0, 3.0], dtype=D, requires_grad=True)
    solver = pnode.Solver(
        lambda t, y: rate, params=[rate], method=name, step_size=0.5, compile=False
    )
    expected = y0.detach() + TIMES[:, None] * rate.detach()
    with torch.no_grad():
        torch.testing.assert_close(solver(y0, TIMES).ys, expected, rtol=1e-14, atol=0.0)
    assert rate.requires_grad and y0.requires_grad

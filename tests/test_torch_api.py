"""torch's other ways to differentiate, batch, trace and compile, with a solve in them.

What cannot pass through a solve is a typed error that names what to use instead, and the solver
works afterwards.
"""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch
from torch.autograd import forward_ad
from torch.autograd.functional import hessian, jacobian, jvp
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import pnode
from pnode.base.evidence import _weights
from pnode.errors import ConfigurationError

D = torch.float64
T = torch.linspace(0.0, 1.0, 3, dtype=D)
WAYS = {
    "rk4": {"method": "rk4", "step_size": 0.25},
    "dopri5": {"method": "dopri5", "rtol": 1e-3},
    "cn": {"method": "cn", "step_size": 0.25},
    "rodaspr": {"method": "rodaspr", "rtol": 1e-3},
    "bdf": {"method": "bdf", "rtol": 1e-3},
}
ways = pytest.mark.parametrize("way", WAYS)
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def state():
    return torch.tensor([0.5, -0.3], dtype=D)


class Model(torch.nn.Module):
    """A network around a solve."""

    def __init__(self, way="rk4", call="solver"):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(2, 2).double()
        self.rates = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()).double()
        self.back = torch.nn.Linear(3, 2).double()
        self.options = {"params": [*self.rates.parameters(), *self.back.parameters()], **WAYS[way]}
        self.solver = pnode.Solver(self.field, **self.options)
        self.call = call

    def field(self, t, y):
        return self.back(self.rates(y)) * torch.cos(t)

    def solve(self, y):
        if self.call == "solver":
            return self.solver(y, T).ys
        if self.call == "odeint":
            return pnode.odeint(self.field, y, T, **self.options)
        if self.call == "odeint_adjoint":
            return pnode.odeint_adjoint(self.field, y, T, **self.options)
        time, ys = pnode.odeint_event(
            self.field, y, T[0], event_fn=lambda t, y: t - 0.5, **self.options
        )
        return ys * time

    def forward(self, y):
        return torch.sin(self.layer(self.solve(torch.tanh(self.layer(y)))))


def last(way):
    model = Model(way)
    return model, lambda y: model.solver(y, T).ys[-1]


def works(model):
    """A gradient after whatever was refused, against a new model's."""
    found = []
    for each in (model, Model(model.options["method"])):
        y = state().requires_grad_()
        found.append(torch.autograd.grad(each(y).sum(), [y, *each.parameters()]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


# Forward mode.


def close(found, expected):
    """Whether derivatives agree, but for what Newton's method and bdf's tolerances leave."""
    return torch.allclose(found.detach(), expected.detach(), rtol=1e-6, atol=1e-8)


@ways
def test_tangents_of_the_arguments(way):
    model, solve = last(way)
    J = jacobian(solve, state())
    assert close(jacobian(solve, state(), strategy="forward-mode", vectorize=True), J)
    by_time = jacobian(lambda t: model.solver(state(), t).ys, T)
    forward = jacobian(
        lambda t: model.solver(state(), t).ys, T, strategy="forward-mode", vectorize=True
    )
    assert close(forward, by_time)
    later = jacobian(
        lambda t: pnode.odeint_event(
            model.field, state(), t, event_fn=lambda t, y: t - 0.5, **model.options
        )[1][-1],
        T[:1],
    )[..., 0]
    assert close(torch.func.jacfwd(solve)(state()), J)
    assert close(torch.func.jvp(solve, (state(),), (state(),))[1], J @ state())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(state(), state())
        for differentiate in (True, False):
            with torch.set_grad_enabled(differentiate):
                tangents = [
                    forward_ad.unpack_dual(ys).tangent
                    for ys in (
                        solve(dual), pnode.odeint(model.field, dual, T, **model.options)[-1]
                    )
                ]  # fmt: skip
                assert all(close(tangent, J @ state()) for tangent in tangents)
                when, at = pnode.odeint_event(
                    model.field, state(), forward_ad.make_dual(T[:1], torch.ones_like(T[:1])),
                    event_fn=lambda t, y: t - 0.5, **model.options,
                )  # fmt: skip
                assert forward_ad.unpack_dual(when).tangent.count_nonzero() == 0
                tangent = forward_ad.unpack_dual(at[-1]).tangent
                assert torch.allclose(tangent, later, rtol=1e-3 if way == "bdf" else 1e-9)
                pair = pnode.Solver(lambda t, y: y, **WAYS[way])((state(), dual), T).ys
                assert forward_ad.unpack_dual(pair[0]).tangent.count_nonzero() == 0
                growth = float(pair[1][-1, 0].detach() / state()[0])
                found = forward_ad.unpack_dual(pair[1]).tangent[-1]
                # bdf's Newton method stops at its tolerance, that of the tangent does not.
                assert torch.allclose(found, growth * state(), rtol=1e-3 if way == "bdf" else 1e-9)
        solve(state())  # without tangents
    works(model)


@ways
@pytest.mark.parametrize("differentiate", [True, False])
def test_tangents_of_what_the_field_uses(way, differentiate):
    numbers = state()
    with forward_ad.dual_level(), torch.set_grad_enabled(differentiate):
        dual = forward_ad.make_dual(numbers, numbers)
        for params in ([dual], None):  # declared or not
            solver = pnode.Solver(lambda t, y: -dual * y, params=params, **WAYS[way])
            with pytest.raises(ConfigurationError, match="tangent"):
                solver(numbers, T)
        late = pnode.Solver(
            lambda t, y: torch.where(t > 0.5, -dual * y, -y) if t > 0.5 else -y, **WAYS[way]
        )
        with pytest.raises(ConfigurationError, match="tangent"):
            late(numbers, T)
        owner = torch.nn.Linear(2, 2).double()
        del owner.weight
        owner.weight = forward_ad.make_dual(torch.eye(2, dtype=D), torch.eye(2, dtype=D))
        solver = pnode.Solver(lambda t, y: owner(y), params=[owner.bias], **WAYS[way])
        with pytest.raises(ConfigurationError, match="tangent"):
            solver(numbers, T)
    # The level is closed, and the numbers are what they were.
    plain = pnode.Solver(lambda t, y: -numbers * y, **WAYS[way])(numbers, T).ys
    del owner.weight
    owner.weight = torch.eye(2, dtype=D)
    again = pnode.Solver(lambda t, y: -numbers * y, **WAYS[way])(numbers, T).ys
    assert torch.equal(plain, again)


def test_tangents_of_masses_and_explicit_parts():
    numbers = state()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(numbers, numbers)
        mass = pnode.Solver(lambda t, y: -y, mass=dual, method="beuler", step_size=0.5)
        split = pnode.Solver(
            implicit=lambda t, y: -y, explicit=lambda t, y: dual * y, method="ars443",
            step_size=0.5,
        )  # fmt: skip
        for solver in (mass, split):
            with pytest.raises(ConfigurationError, match="tangent"):
                solver(numbers, T)
        sparse = pnode.Solver(
            lambda t, y: -y, mass=torch.eye(2, dtype=D).to_sparse(), method="beuler", step_size=0.5
        )
        sparse(numbers, T)


@ways
def test_tangents_of_a_cotangent(way):
    """They come from forward mode over reverse mode."""
    model, solve = last(way)
    y = state().requires_grad_()
    ys = solve(y)
    w, dw = torch.tensor([[1.0, 2.0], [-0.5, 0.3]], dtype=D)
    with forward_ad.dual_level():
        weights = forward_ad.make_dual(w, dw)
        (found,) = torch.autograd.grad((ys * weights).sum(), y, retain_graph=True)
        tangent = forward_ad.unpack_dual(found).tangent
    assert close(tangent, torch.autograd.grad(ys, y, dw)[0])
    works(model)


@pytest.mark.parametrize("keywords", [
    {"method": "rk4"}, {"method": "cn", "jacobian": "sparse"}, {"method": "rodaspr"},
])  # fmt: skip
def test_a_first_solve_inside_of_the_vmap_of_functional(keywords):
    """Which draws no random numbers: those that pnode compares by have not been drawn before."""
    _weights.cache_clear()
    solver = pnode.Solver(lambda t, y: -y * y.flip(0), step_size=0.1, compile=False, **keywords)
    y0 = torch.tensor([1.0, 2.0], dtype=torch.float64)

    def solve(y):
        return solver(y, [0.0, 0.3]).ys[-1]

    found = jacobian(solve, y0, strategy="forward-mode", vectorize=True)
    assert close(found, jacobian(solve, y0))


@ways
def test_second_derivatives_by_torchs_functions(way):
    _, solve = last(way)
    J = jacobian(solve, state())
    assert close(jvp(solve, state(), state())[1], J @ state())  # by differentiating a gradient

    def total(y):
        return solve(y).sin().sum()

    H = hessian(total, state())
    assert close(H, H.T)
    mixed = hessian(
        total, state(), vectorize=True, outer_jacobian_strategy="forward-mode"
    )  # fmt: skip
    assert close(mixed, H)


# Batches of gradients, and torch.func.


@ways
def test_batches_of_cotangents(way):
    model, solve = last(way)
    J = jacobian(solve, state())
    assert torch.equal(jacobian(solve, state(), vectorize=True), J)
    y, eye = state().requires_grad_(), torch.eye(2, dtype=D)
    ys = solve(y)
    batches = torch.autograd.grad(
        ys, model.options["params"], eye, is_grads_batched=True, retain_graph=True
    )
    for k, g in enumerate(eye):
        one = torch.autograd.grad(ys, model.options["params"], g, retain_graph=True)
        assert all(torch.equal(batch[k], own) for batch, own in zip(batches, one, strict=True))
    found = torch.func.vmap(lambda g: torch.autograd.grad(ys, y, g, retain_graph=True)[0])(eye)
    assert torch.equal(found, J)
    works(model)


TRANSFORMS = {
    "grad": (lambda f, y: torch.func.grad(lambda y: f(y).sum())(y), lambda J: J.sum(0)),
    "vjp": (lambda f, y: torch.func.vjp(f, y)[1](y)[0], lambda J: J.T @ state()),
    "jacrev": (lambda f, y: torch.func.jacrev(f)(y), lambda J: J),
    "linearize": (lambda f, y: torch.func.linearize(f, y)[1](y), lambda J: J @ state()),
    "nothing of it is wrapped": (
        lambda f, y: torch.func.vmap(lambda c: c * f(y).detach())(torch.ones(3, dtype=D))[0] * 0.0,
        lambda J: torch.zeros(2, dtype=D),
    ),
}
REFUSED = {
    "vmap": (lambda f, y: torch.func.vmap(f)(torch.stack([y, y])), "solve in a loop"),
    "vmap of grad": (
        lambda f, y: torch.func.vmap(torch.func.grad(lambda y: f(y).sum()))(torch.stack([y, y])),
        "solve in a loop",
    ),
    "functionalize": (lambda f, y: torch.func.functionalize(f)(y), "outside"),
}


@ways
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_functions(way, transform):
    model, solve = last(way)
    apply, expected = TRANSFORMS[transform]
    assert close(apply(solve, state()), expected(jacobian(solve, state())))
    works(model)


@ways
@pytest.mark.parametrize("transform", REFUSED)
def test_transforms_that_are_refused(way, transform):
    model, solve = last(way)
    apply, remedy = REFUSED[transform]
    with pytest.raises(ConfigurationError, match=remedy):
        apply(solve, state())
    with torch.no_grad(), pytest.raises(ConfigurationError):
        apply(solve, state())
    works(model)


def test_transforms_of_parameters_times_and_odeint():
    model, _ = last("rk4")
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def value(p):
        return torch.func.functional_call(model, p, (state(),)).sum()

    # What the solver has in params= is the Module's own, not what stands for it.
    with pytest.raises(ConfigurationError, match="nobody declared"):
        torch.func.grad(value)(parameters)
    t = T.clone().requires_grad_()
    (by_time,) = torch.autograd.grad(model.solver(state(), t).ys.sum(), t)
    assert close(torch.func.grad(lambda t: model.solver(state(), t).ys.sum())(T), by_time)
    with pytest.raises(ConfigurationError, match=r"torch\.func\.vmap"):
        torch.func.vmap(lambda t: pnode.odeint(model.field, state(), t, **model.options))(
            torch.stack([T, T])
        )
    works(model)


@pytest.mark.parametrize("recording", [True, False])
def test_solves_within_a_batch(recording):
    """A solve that the batch has no part in is one solve; an undeclared part in it is refused."""
    factors = torch.tensor([0.9, 0.5, 0.4], dtype=torch.float64)

    def solve(k, rhs=lambda k: lambda t, y: -y, event_fn=lambda k: None):
        solver = pnode.Solver(rhs(k), event_fn=event_fn(k), method="rk4", step_size=0.1)
        return k * solver(state(), T).ys[-1].flatten()

    undeclared = (
        {"rhs": lambda k: lambda t, y: -k * y},
        {"event_fn": lambda k: lambda t, y: y.flatten()[0] - k},
    )
    with torch.set_grad_enabled(recording):
        expected = torch.stack([solve(k) for k in factors])
        assert torch.equal(torch.func.vmap(solve)(factors), expected)
        for given in undeclared:
            with pytest.raises(ConfigurationError, match=r"uses is a batch of torch\.func\.vmap"):
                torch.func.vmap(partial(solve, **given))(factors)


def test_functional_call_outside_of_transforms():
    """Other numbers for the parameters of a field that is a Module, with gradients."""
    field = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh()).double()

    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = field

        def forward(self, t, y):
            return self.inner(y)

    solver = pnode.Solver(Field(), **WAYS["rk4"])
    others = {n: (2.0 * p).detach().requires_grad_() for n, p in solver.named_parameters()}
    ys = torch.func.functional_call(solver, others, (state(), T)).ys
    found = torch.autograd.grad(ys.sum(), [*others.values()])
    with torch.no_grad():
        for p in field.parameters():
            p.mul_(2.0)
    expected = torch.autograd.grad(solver(state(), T).ys.sum(), [*solver.parameters()])
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


# Traces.


@pytest.mark.parametrize("way", ["rk4", "cn"])
def test_traces(way):
    """In which a solve would be a constant."""
    model, solve = last(way)
    with pytest.raises(ConfigurationError, match=r"torch\.jit\.trace"):
        torch.jit.trace(solve, (state(),))
    with pytest.raises(ConfigurationError, match="constant of the graph"):
        make_fx(solve)(state())
    with pytest.raises(ConfigurationError, match="fake tensor"):
        make_fx(solve, tracing_mode="fake")(state())
    with pytest.raises(ConfigurationError, match="fake tensor"):
        torch.export.export(model, (state(),), strict=False)
    works(model)


def test_export_in_strict_mode_is_torchs_own_error():
    model, _ = last("rk4")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="a solve by PETSc"):
        torch.export.export(model, (state(),), strict=True)
    works(model)


# torch.compile.


@pytest.fixture
def dynamo():
    import torch._dynamo

    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


def gradients(model, forward):
    y = state().requires_grad_()
    value = forward(y).square().sum()
    return [value, *torch.autograd.grad(value, [y, *model.parameters()])]


@pytest.mark.parametrize(
    ("way", "call"),
    [
        ("rk4", "solver"), ("bdf", "solver"), ("rk4", "odeint"), ("cn", "odeint_adjoint"),
        ("dopri5", "odeint_event"),
    ],
)  # fmt: skip
def test_compiled_models(way, call, dynamo):
    model = Model(way, call)
    expected = gradients(model, model)
    compiled = torch.compile(model, backend="aot_eager" if way == "bdf" else "eager")
    for _ in range(2):
        for a, b in zip(gradients(model, compiled), expected, strict=True):
            assert torch.equal(a, b)
    with torch.no_grad():
        assert torch.equal(compiled(state()), model(state()))


def test_a_graph_ends_before_the_solve_and_another_begins_after(dynamo):
    graphs = []

    def backend(graph, inputs):
        graphs.append([node.name for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    model = Model("cn")
    torch.compile(model, backend=backend)(state())
    assert [len(graph) > 0 for graph in graphs] == [True, True], graphs
    assert "tanh" in graphs[0] and "sin" in graphs[1]
    dynamo.reset()
    with pytest.raises(dynamo.exc.Unsupported, match="a solve by PETSc"):
        torch.compile(model, backend="eager", fullgraph=True)(state())
    works(model)


def test_compiled_solvers_and_fields(dynamo):
    model = Model("rk4")
    expected = model.solver(state(), T).ys
    compiled = torch.compile(model.solver, backend="eager")
    assert torch.equal(compiled(state(), T).ys, expected)
    field = torch.compile(model.field, backend="eager")
    solver = pnode.Solver(field, **model.options)
    found = []
    for each in (solver, model.solver):
        y = state().requires_grad_()
        loss = each(y, T).ys.sum()
        found.append(torch.autograd.grad(loss, [y, *model.options["params"]]))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_compiled_autograd_passes_around_a_backward_sweep(dynamo):
    from torch._dynamo import compiled_autograd

    model = Model("cn")
    expected = gradients(model, model)[1:]
    y = state().requires_grad_()
    value = model(y).square().sum()
    with compiled_autograd._enable(torch.compile(backend="eager")):
        value.backward()
    for a, b in zip([y.grad, *(p.grad for p in model.parameters())], expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("way", ["rk4", "cn"])
def test_a_solve_does_not_import_torchs_compiler(way, monkeypatch):
    """Which takes seconds."""
    for name in [name for name in sys.modules if name.split(".")[:2] == ["torch", "_dynamo"]]:
        monkeypatch.delitem(sys.modules, name)
    y = state().requires_grad_()
    pnode.Solver(lambda t, y: -y, **WAYS[way])(y, T).ys.sum().backward()
    assert "torch._dynamo" not in sys.modules


# Other ways around a solve.


@pytest.mark.parametrize("way", ["rk4", "cn"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(way, reentrant):
    model = Model(way)
    expected = gradients(model, model)

    def forward(y):
        return checkpoint(model, y, use_reentrant=reentrant)

    y = state().requires_grad_()
    forward(y).square().sum().backward()
    found = [y.grad, *(p.grad for p in model.parameters())]
    for a, b in zip(found, expected[1:], strict=True):
        assert torch.equal(a, b)


def test_batched_jacobians_of_a_field_with_a_solve_inside():
    """pnode takes the products one by one where f has no batching rule, and a solve has none."""
    inner = pnode.Solver(lambda t, y: -y, method="rk4", step_size=0.5)

    factor = inner(torch.ones(1, dtype=D), T[:2]).ys[-1]

    def solve(function, **options):
        y = state().requires_grad_()
        ys = pnode.Solver(function, method="cn", step_size=0.5, **options)(y, T).ys
        return [ys, *torch.autograd.grad(ys.sum(), y)]

    found = solve(lambda t, y: inner(y, T[:2]).ys[-1] * y, jacobian="dense")
    expected = solve(lambda t, y: factor * y * y, jacobian="dense")
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)

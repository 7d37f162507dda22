"""What is remembered from solve to solve is never what has changed since."""

from __future__ import annotations

import pytest
import torch

import pnode
from pnode.base.graphs import NODE_BYTES, graph_bytes
from pnode.base.surroundings import parameters_of
from pnode.field.products import accumulate

D = torch.float64


class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Tanh()).double()
        self.last = torch.nn.Linear(3, 2).double()

    def forward(self, t, y):
        return self.last(self.layers(y)) * torch.cos(t)


def fresh(field, y0, t):
    """Values and gradients of a solver that remembers nothing."""
    return taken(pnode.Solver(field, method="rk4", step_size=0.3, compile=False), y0, t)


def taken(solver, y0, t):
    inputs = [p for p in solver.rhs.parameters() if p.requires_grad]
    ys = solver(y0, t).ys
    return [ys.detach(), *torch.autograd.grad(ys.square().sum(), inputs)]


def same(found, wanted):
    return all(map(torch.equal, found, wanted)) and len(found) == len(wanted)


def test_what_changes_between_solves_is_seen():
    field, y0, t = Field(), torch.ones(4, 2, dtype=D), torch.tensor([0.0, 0.5, 2.0], dtype=D)
    solver = pnode.Solver(field, method="rk4", step_size=0.3, compile=False)
    shared = t.numpy()  # writing into it counts no version up

    def later():
        shared[2] = 3.0

    def backwards():
        shared[:] = [2.0, 1.0, 0.0]

    def replaced():
        field.last = torch.nn.Linear(3, 2).double()

    def frozen():
        field.last.bias.requires_grad_(False)

    def grown():
        field.layers.append(torch.nn.Linear(3, 3).double())

    def moved():
        y0.mul_(0.5)

    for change in (lambda: None, later, backwards, replaced, frozen, grown, moved):
        change()
        assert same(taken(solver, y0, t), fresh(field, y0, t)), change.__name__
    for shape in ((2,), (3, 2), (4, 2)):
        other = torch.ones(shape, dtype=D)
        assert same(taken(solver, other, t), fresh(field, other, t))


def test_what_has_become_unusable_is_refused():
    y0, t = torch.ones(2, dtype=D), torch.tensor([0.0, 1.0], dtype=D)
    solver = pnode.Solver(Field(), method="rk4", step_size=0.3, compile=False)
    solver(y0, t)
    for tensor, value, text in ((t, 0.0, "increase"), (t, torch.nan, "NaN"), (y0, torch.inf, "y0")):
        before = tensor[1].item()
        tensor.numpy()[1] = value
        with pytest.raises(pnode.ConfigurationError, match=text):
            solver(y0, t)
        tensor.numpy()[1] = before
    solver(y0, t)


def test_parameters_in_torchs_order():
    tree = Field()
    tree.again = tree.layers  # shared
    tree.alone = torch.nn.Parameter(torch.ones(1))
    tree.register_parameter("none", None)
    tree.layers.tied = torch.nn.Linear(3, 2)
    tree.layers.tied.weight = tree.last.weight
    found = list(dict.fromkeys(map(id, parameters_of(tree))))
    assert found == list(map(id, tree.parameters()))


def test_modules_with_parameters_of_their_own_way():
    class Half(Field):
        def parameters(self, recurse=True):
            return iter([self.last.weight])

    half = Half()
    assert [id(one) for one in parameters_of(half)] == [id(half.last.weight)]


@pytest.mark.parametrize("transposed", [False, True])
def test_sums_of_large_parameters_have_the_same_bits(transposed):
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(331, 601, generator=generator) for _ in range(5)]
    if transposed:
        terms = [term.t() for term in terms]
    sums: list[torch.Tensor | None] = [None]
    for term in terms:
        accumulate(sums, [term])
    wanted = terms[0].double()
    for term in terms[1:]:
        wanted = wanted + term
    assert torch.equal(sums[0], wanted) and sums[0].dtype is D
    first = terms[0].clone()
    accumulate(sums := [None], [terms[0]])
    accumulate(sums, [terms[1]])
    assert torch.equal(terms[0], first)  # the sum is not the term's own memory


def test_bytes_of_graphs_whose_nodes_have_saved_numbers_before():
    y = torch.ones(1000, dtype=D, requires_grad=True)
    for _ in range(2):
        assert graph_bytes(y * 2.0, [y]) == 2 * NODE_BYTES + 8  # the number
        assert graph_bytes(y**2.0, [y]) == 2 * NODE_BYTES
        assert graph_bytes((y + 1.0) * (y - 1.0), [y]) == 4 * NODE_BYTES + 2 * 8000

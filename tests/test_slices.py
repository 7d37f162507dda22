"""Gradients of slices in graphs, as they are compiled."""

from __future__ import annotations

import itertools
import random
from functools import partial
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from pnode.solvers.compiled.decomposition import decomposed
from pnode.solvers.compiled.slices import arrange_slices

_aten = torch.ops.aten
_OF_SLICES = (
    _aten.slice_backward.default, _aten.slice_scatter.default,
    _aten.select_backward.default, _aten.select_scatter.default,
)  # fmt: skip


def boxes(seed: int, shape: tuple[int, ...]) -> Any:
    """Return a function of a tensor that adds up random boxes of it, each times another number."""
    draw = random.Random(seed)
    chosen = [
        tuple(slice(a := draw.randint(0, 3), n - 3 + a) for n in shape)
        for _ in range(draw.randint(3, 6))
    ]

    def function(y: torch.Tensor) -> torch.Tensor:
        parts = [y[box] * (k + 1.0) for k, box in enumerate(chosen)]
        total = sum(parts[1:], parts[0])
        return total * total - parts[0].sin()

    return function


def species(y: torch.Tensor) -> torch.Tensor:
    """Return rates of three species along the last dimension."""
    a, b, c = y[..., 0], y[..., 1], y[..., -1]
    return torch.stack([b * c - a, a - b * c - b * b, b * b], -1)


def half(y: torch.Tensor) -> torch.Tensor:
    """Use two of three entries: not all of what is added up is there."""
    return y[0] * y[1] + y[0].sin()


def mixed(y: torch.Tensor) -> torch.Tensor:
    """Use entries, slices, and all of it."""
    return (y[:, 1:-1] + y[:, 2:])[0] * y[1, :-2].cos() + y[0, 0] + y[1, 1] + (y * y).sum()


def laplacian(u: torch.Tensor) -> torch.Tensor:
    """Return the sum of a cell's neighbours less five times itself, of each cell inside."""
    here = u[1:-1, 1:-1]
    return u[2:, 1:-1] + u[:-2, 1:-1] + u[1:-1, 2:] - (-u[1:-1, :-2]) - here * 5 / 1.0


# Rows that are long enough to be padded, and the last ones that are not.
BOXES = [(50,), (9, 40), (2, 7, 40), (9, 13)]
CASES = [
    *[(boxes(seed, shape), shape) for shape in BOXES for seed in range(4)],
    (species, (40, 3)), (laplacian, (40, 50)), (half, (3, 8)), (mixed, (2, 80)),
    (lambda y: y[3:4] + y[-1:] + y[:1], (6,)),
    (lambda y: y[1:1].sum() + y[2:] * y[:-2], (70,)),
    (lambda y: y[::2] + y[1::2] * y[:40], (80,)),
    (lambda y: (y[0] - y[1]).relu() + y[2], (3, 2, 4, 5)),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(CASES)))
@pytest.mark.parametrize("operations", ["gradient", "decomposed"])
def test_numbers_stay(number: int, operations: str) -> None:
    """Gradients of slices, and gradients of those, stay what they are."""
    function, shape = CASES[number]
    torch.manual_seed(number)
    y = torch.randn(shape, dtype=torch.float64)
    w = torch.randn_like(function(y))

    def gradient(y: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found, pull_back = torch.func.vjp(function, y)
        return found, *pull_back(w)

    def curvature(y: torch.Tensor, w: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.func.vjp(lambda y: gradient(y, w)[1], y)[1](y.sin())

    padded = shape in BOXES[:3]
    if operations == "gradient":
        graphs = [make_fx(gradient, tracing_mode="fake")(y, w)]
    else:
        graphs = [decomposed(gradient, (y, w)), decomposed(curvature, (y, w))]
    for graph in graphs:
        expected = graph(y, w)
        arrange_slices(graph)
        targets = [node.target for node in graph.graph.nodes]
        assert not padded or _aten.constant_pad_nd.default in targets
        for one, other in itertools.zip_longest(graph(y, w), expected):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    ("function", "shape", "wanted"),
    [
        (laplacian, (40, 40), [_aten.constant_pad_nd.default]),
        (lambda y: y[1:] - y[:-1], (100,), [_aten.constant_pad_nd.default]),
        (species, (40, 3), [_aten.stack.default]),
    ],
)
def test_sums_are_written_anew(function: Any, shape: tuple[int, ...], wanted: list[Any]) -> None:
    """Nothing is left of the gradients of slices; what they share is padded once."""
    y = torch.randn(shape, dtype=torch.float64)
    graph = make_fx(lambda y, w: torch.func.vjp(function, y)[1](w)[0], tracing_mode="fake")(
        y, torch.randn_like(function(y))
    )
    graph.graph.eliminate_dead_code()
    assert {node.target for node in graph.graph.nodes} & set(_OF_SLICES)
    arrange_slices(graph)
    found = [node.target for node in graph.graph.nodes]
    assert not set(found) & set(_OF_SLICES)
    assert [x for x in found if x in (_aten.constant_pad_nd.default, _aten.stack.default)] == wanted


def test_long_sums() -> None:
    """Of more terms than Python nests calls."""
    number = 2000
    entries = torch.arange(1.0, number + 1)
    nodes = torch.fx.Graph()

    def call(target: Any, args: tuple[Any, ...], value: torch.Tensor) -> Any:
        node = nodes.call_function(target, args)
        node.meta["val"] = value
        return node

    given = nodes.placeholder("y")
    given.meta["val"] = entries
    total = None
    for k in range(number):
        one = call(_aten.select.int, (given, 0, k), entries[0])
        part = call(_aten.select_backward.default, (one, [number], 0, k), entries)
        total = part if total is None else call(_aten.add.Tensor, (total, part), entries)
    nodes.output(total)
    graph = torch.fx.GraphModule({}, nodes)
    arrange_slices(graph)
    assert [n.target for n in graph.graph.nodes].count(_aten.add.Tensor) == 0
    assert torch.equal(graph(entries), entries)


def test_other_places_are_left_alone() -> None:
    """Slices with strides, and gradients that nothing is added to."""
    y = torch.randn(100, dtype=torch.float64)
    for function in (lambda y: y[::2] + y[1::2], lambda y: y[3:]):
        pull_back = partial(lambda f, y: torch.func.vjp(f, y)[1](f(y))[0], function)
        graph = make_fx(pull_back, tracing_mode="fake")(y)
        graph.graph.eliminate_dead_code()
        before = str(graph.graph)
        arrange_slices(graph)
        assert str(graph.graph) == before

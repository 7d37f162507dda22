"""Operations for which torch's rules for batches, or inductor's code, are wrong."""

from __future__ import annotations

import torch
from compile_cache import share_headers

import pnode
from pnode.solvers.compiled import inductor, libraries

D = torch.float64
Y0 = torch.tensor([0.3, -0.6, 0.45], dtype=D)
TIMES = torch.tensor([0.0, 0.5], dtype=D)


class Scattered(torch.nn.Module):
    """y_0' is p y_1, the others' are squares: by an operation of torch, or by a mask."""

    def __init__(self, operation):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor(0.7, dtype=D))
        self.operation = operation

    def forward(self, t, y):
        value, square = self.p * y[1], y * y
        if self.operation == "select":
            return torch.select_scatter(square, value, 0, 0) - y
        first = torch.tensor([1.0, 0.0, 0.0], dtype=D)
        return first * value + (1.0 - first) * square - y


def test_stages_that_torch_maps_wrongly():
    """The gradients of ``select_scatter`` in ``vmap``, and so were several tangents at once."""
    found = [
        pnode.sensitivities(
            pnode.Solver(Scattered(one), method="rk4", step_size=0.02, compile=False),
            Y0, TIMES, wrt=("y0", "p"), mode="forward",
        )
        for one in ("select", "mask")
    ]  # fmt: skip
    for name in ("y0", "p"):
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-12, atol=1e-13)


def test_powers_with_integers_for_exponents(tmp_path, monkeypatch):
    """Inductor takes the base for a double, and reads the floats that it gets as integers."""
    share_headers(tmp_path)
    monkeypatch.setenv("PNODE_CACHE_DIR", str(tmp_path))

    def powers(y):
        n = (3.0 * y).long()
        return 2**n, True ** n.int(), 3 ** (y > 1.0), 2.5**n

    y = torch.tensor([0.5, 1.2, 0.9, 1.4], dtype=D)
    run = inductor.compile_graph("powers", powers, [torch.zeros_like(y)])
    for found, expected in zip(run([y]), powers(y), strict=True):
        torch.testing.assert_close(found, expected)


def test_machine_code_of_other_numbers():
    """Zeros, as examples often are, hide what is wrong; what is not finite tells nothing."""
    examples = [torch.zeros(3, 2, dtype=D), torch.zeros(2, dtype=torch.int64)]
    graph = inductor.prepare(lambda x, n: (x.sin(), n + 1, 0.0 / (0.0 * x)), examples)

    def wrong(inputs):
        return [1.01 * inputs[0], *graph(*inputs)[1:]]

    assert libraries.is_right(graph, lambda inputs: list(graph(*inputs)), examples)
    assert libraries.agree_in_layout(graph, wrong(examples))
    assert not libraries.is_right(graph, wrong, examples)

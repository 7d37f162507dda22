"""Backward passes of several threads over one graph: each is what it is by itself."""

import threading

import pytest
import torch

import pnode

D = torch.float64


class Decay(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.k = torch.nn.Parameter(torch.tensor([1.0, 0.3], dtype=D))

    def forward(self, t, y):
        return -self.k * y * (1.0 + 0.1 * y)


CASES = [
    {"method": "heun2", "compile": True}, {"method": "cn", "compile": True},
    {"method": "bdf", "compile": True}, {"method": "heun2", "compile": False},
    {"method": "rk4", "compile": False, "checkpointing": 400},
    {"method": "cn", "compile": False, "checkpointing": 400},
    {"method": "heun2", "compile": True, "samples": "independent"},
    {"method": "cn", "compile": True, "samples": "independent"},
    {"method": "heun2", "compile": False, "samples": "independent"},
]  # fmt: skip


@pytest.mark.parametrize("options", CASES, ids=lambda one: "-".join(map(str, one.values())))
def test_backward_passes_at_once(options):
    """Of 50 starts together, none is another gradient than the two by themselves."""
    f = Decay()
    rows = 400 if options["compile"] and "samples" in options else 3
    y0 = torch.linspace(0.5, 2.0, 2 * rows, dtype=D).view(rows, 2).requires_grad_()
    step = None if options["method"] == "bdf" else 0.01 if options["compile"] else 0.1
    ys = pnode.Solver(f, step_size=step, **options)(y0, [0.0, 0.5, 1.0]).ys
    weights = [torch.full_like(ys, 1.0), torch.linspace(-3.0, 2.0, ys.numel(), dtype=D).view_as(ys)]

    def gradients(w):
        return torch.autograd.grad(ys, (y0, f.k), w, retain_graph=True)

    expected = [gradients(w) for w in weights]
    together, wrong = threading.Barrier(2), []

    def work(w, known):
        for _ in range(50 if options["compile"] else 10):
            together.wait()
            if not all(torch.equal(a, b) for a, b in zip(gradients(w), known, strict=True)):
                wrong.append(1)

    threads = [threading.Thread(target=work, args=p) for p in zip(weights, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong

"""tanh in compiled graphs against mpmath."""

import runpy
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from compile_cache import share_headers

from pnode.solvers.compiled import fast_tanh, inductor

ROOT = Path(__file__).parents[1]
# Dense where the function bends, up to where it is 1, beyond, and down to the smallest numbers.
ARGUMENTS = np.concatenate([
    np.linspace(-20.0, 20.0, 4001), np.linspace(0.0, 1.5, 2001), np.linspace(18.9, 19.2, 301),
    10.0 ** np.linspace(-320.0, 2.5, 1001), [19.1, 1e300, -1e300, 5e-324],
])  # fmt: skip


def ulps(found: torch.Tensor, x: np.ndarray) -> np.ndarray:
    """Return the errors in units in the last place of the exact values."""
    with mpmath.workprec(120):
        exact = [mpmath.tanh(mpmath.mpf(value)) for value in x.tolist()]
        pairs = zip(found.tolist(), exact, strict=True)
        errors = [
            float(abs(mpmath.mpf(value) - e) / np.spacing(abs(float(e)))) for value, e in pairs
        ]
    return np.array(errors)


def graph_of(*examples: torch.Tensor) -> torch.fx.GraphModule:
    return inductor.prepare(lambda x: (torch.tanh(x),), examples)


def test_bound_in_units_in_the_last_place() -> None:
    x = torch.tensor(ARGUMENTS)
    (found,) = graph_of(x)(x)
    errors = ulps(found, ARGUMENTS)
    assert errors.max() <= 8.0
    assert np.sqrt((errors**2).mean()) <= 1.2
    assert found.abs().max() == 1.0


def test_special_values() -> None:
    x = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    (found,) = graph_of(x)(x)
    assert found[:4].tolist() == [0.0, 0.0, 1.0, -1.0]
    assert torch.signbit(found[:2]).tolist() == [False, True]
    assert found[4].isnan()


def test_odd() -> None:
    x = torch.tensor(ARGUMENTS)
    torch.testing.assert_close(fast_tanh.tanh(-x), -fast_tanh.tanh(x), rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_only_double_precision_is_replaced(dtype: torch.dtype) -> None:
    nodes = graph_of(torch.zeros(3, dtype=dtype)).graph.nodes
    kept = [node for node in nodes if node.target is torch.ops.aten.tanh.default]
    assert len(kept) == (dtype is torch.float32)


def test_machine_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiler makes of it, with fused multiplications and masked ends of rows."""
    share_headers(tmp_path)
    monkeypatch.setenv("PNODE_CACHE_DIR", str(tmp_path))
    monkeypatch.delattr(inductor, "_build_by_inductor")  # which takes ten times as long
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan])
    x = torch.tensor(np.concatenate([ARGUMENTS, special]))
    run = inductor.compile_graph("tanh", lambda x: (torch.tanh(x),), [x])
    (found,) = run([x])
    assert ulps(found[: len(ARGUMENTS)], ARGUMENTS).max() <= 7.0
    assert found[-5:-1].tolist() == [0.0, 0.0, 1.0, -1.0]
    assert torch.signbit(found[-5:-3]).tolist() == [False, True]
    assert found[-1].isnan()
    with pytest.raises(RuntimeError):
        run([x, x])


def test_coefficients_are_those_of_the_script() -> None:
    script = runpy.run_path(str(ROOT / "tools" / "tanh_coefficients.py"))
    with mpmath.workdps(60):
        p, q, error = script["fit"]()
    assert tuple(map(float, p)) == fast_tanh._P
    assert tuple(map(float, q)) == fast_tanh._Q
    assert error < 2.0**-53

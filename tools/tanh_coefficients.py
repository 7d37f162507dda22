"""Compute the coefficients of fast_tanh.py: tanh(x) = x P(x^2) / Q(x^2) on |x| <= 19.1.

Beyond, tanh(x) rounds to 1 in float64. P and Q have degree 9 and minimise the largest relative
error: least squares of (P - f Q) / (f Q) at Chebyshev nodes, f = tanh(x)/x, each time with weights
multiplied by the errors before (Lawson's iteration) and divided by the denominators before.

    python tools/tanh_coefficients.py        # some seconds
"""

from __future__ import annotations

import mpmath
from mpmath import mpf

LARGEST = mpf("19.1")
DEGREE, NODES, ROUNDS = 9, 120, 30


def fit() -> tuple[list[mpf], list[mpf], mpf]:
    """Return P and Q, rising powers of x^2, and the largest relative error at the nodes.

    P(0) = Q(0) = 1, so that small arguments are returned as they are.
    """
    xs = [
        LARGEST * (1 - mpmath.cos(mpmath.pi * (k + mpf(1) / 2) / NODES)) / 2 for k in range(NODES)
    ]
    us = [(x / LARGEST) ** 2 for x in xs]
    fs = [mpmath.tanh(x) / x for x in xs]
    weights, below = [mpf(1)] * NODES, [mpf(1)] * NODES
    best = None
    for _ in range(ROUNDS):
        rows, right = mpmath.matrix(NODES, 2 * DEGREE), mpmath.matrix(NODES, 1)
        for i, (u, f) in enumerate(zip(us, fs, strict=True)):
            scale = mpmath.sqrt(weights[i]) / (below[i] * f)
            for j in range(DEGREE):
                rows[i, j] = scale * u ** (j + 1)
                rows[i, DEGREE + j] = -scale * f * u ** (j + 1)
            right[i] = scale * (f - 1)
        found = list(mpmath.lu_solve(rows.T * rows, rows.T * right))
        p, q = [mpf(1), *found[:DEGREE]], [mpf(1), *found[DEGREE:]]
        below = [mpmath.polyval(q[::-1], u) for u in us]
        errors = [
            abs(mpmath.polyval(p[::-1], u) / d / f - 1)
            for u, d, f in zip(us, below, fs, strict=True)
        ]
        largest = max(errors)
        if best is None or largest < best[2]:
            best = p, q, largest
        weights = [w * (e / largest + mpf("1e-4")) for w, e in zip(weights, errors, strict=True)]
        total = sum(weights) / NODES
        weights = [w / total for w in weights]
    assert best is not None
    p, q = ([c / LARGEST ** (2 * j) for j, c in enumerate(row)] for row in best[:2])
    return p, q, best[2]


def main() -> None:
    """Print them."""
    mpmath.mp.dps = 60
    p, q, error = fit()
    for name, row in (("_P", p), ("_Q", q)):
        print(f"{name} = (")
        for c in row:
            print(f"    {float(c)!r},")
        print(")")
    print(f"# relative error {mpmath.nstr(error, 3)} before rounding")


if __name__ == "__main__":
    main()

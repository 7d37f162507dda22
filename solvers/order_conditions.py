"""Order conditions of Runge-Kutta methods, by rooted trees.

A method of order p has sum_i b_i Phi_i(tau) = 1 / gamma(tau) for every rooted tree tau of at most
p nodes (E. Hairer, S. P. Norsett & G. Wanner, Solving Ordinary Differential Equations I, theorem
II.2.13). With two parts, each node has one of two colors, of the part whose A or b stands there
(the same, section II.15).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import combinations_with_replacement
from typing import TypeAlias

import numpy as np

from pnode.solvers.scheme import Scheme

__all__ = ["HIGHEST", "TOLERANCE", "Part", "defect", "order_of", "parts_of", "trees"]

#: A, shape (s, s), and b, shape (s,).
Part: TypeAlias = tuple[np.ndarray, np.ndarray]

#: How far orders are looked at, of one part and of two: 719 trees have 10 nodes, 916 of two
#: colors have 6.
HIGHEST = {1: 10, 2: 6}
#: Of a condition, next to the sum of the moduli of its terms: that of coefficients with 12 digits.
TOLERANCE = 1e-11


class Tree:
    """A rooted tree: the color of the root and the trees below it.

    Attributes
    ----------
    color : int
        0 or 1, the part.
    children : tuple of Tree
        The trees that are left without the root.
    nodes : int
        How many nodes it has.
    density : int
        gamma, the product of the nodes of all its subtrees.
    """

    def __init__(self, color: int, children: tuple[Tree, ...]) -> None:
        self.color = color
        self.children = children
        self.nodes: int = 1 + sum(child.nodes for child in children)
        self.density: int = self.nodes
        for child in children:
            self.density *= child.density


@cache
def trees(nodes: int, colors: int) -> tuple[Tree, ...]:
    """Return every rooted tree with so many nodes, each of one of so many colors."""
    return tuple(
        Tree(color, forest) for forest in _forests(nodes - 1, nodes - 1, colors)
        for color in range(colors)
    )  # fmt: skip


def _forests(nodes: int, largest: int, colors: int) -> Iterator[tuple[Tree, ...]]:
    """Yield multisets of trees with so many nodes together, none with more than ``largest``."""
    if nodes == 0:
        yield ()
        return
    for size in range(min(nodes, largest), 0, -1):
        for number in range(nodes // size, 0, -1):
            rest = list(_forests(nodes - number * size, size - 1, colors))
            for chosen in combinations_with_replacement(trees(size, colors), number):
                yield from ((*chosen, *others) for others in rest)


def defect(parts: Sequence[Part], order: int) -> float:
    """Return by how much the conditions of one order are missed at most.

    Parameters
    ----------
    parts : sequence of (ndarray, ndarray)
        A, shape (s, s), and b, shape (s,), of one part or of two.
    order : int
        Number of nodes of the trees.

    Returns
    -------
    float
        Of each condition next to the moduli of its sum's terms, if these are more than 1.
    """
    worst = 0.0
    for tree in trees(order, len(parts)):
        terms = parts[tree.color][1] * _stages(tree, parts)
        scale = max(1.0, float(np.abs(terms).sum()))
        worst = max(worst, abs(float(terms.sum()) - 1.0 / tree.density) / scale)
    return worst


def _stages(tree: Tree, parts: Sequence[Part]) -> np.ndarray:
    """Return Phi_i of a tree for every stage i."""
    result = np.ones(len(parts[0][1]))
    for child in tree.children:
        result = result * (parts[child.color][0] @ _stages(child, parts))
    return result


def parts_of(scheme: Scheme, b: Sequence[float] | None = None) -> list[Part]:
    """Return A and b of each part of a method.

    Parameters
    ----------
    scheme : Scheme
        Explicit, diagonally implicit or IMEX.
    b : sequence of float, optional
        Weights of both parts instead of the method's own: those of an embedded solution.
    """
    found = [(np.array(scheme.A), np.array(scheme.b if b is None else b))]
    if scheme.A_explicit is not None:
        weights = scheme.b_explicit if b is None else b
        found.append((np.array(scheme.A_explicit), np.array(weights)))
    return found


def order_of(parts: Sequence[Part]) -> int:
    """Return the highest order whose conditions hold, and all below, as far as is looked."""
    order = 0
    while order < HIGHEST[len(parts)] and defect(parts, order + 1) < TOLERANCE:
        order += 1
    return order

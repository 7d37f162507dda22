"""One method of each code path, for what is the same code for all methods of a family.

Families follow from the registry: methods that agree in everything that the code asks of a
:class:`Method` (its properties) are one family, whatever their coefficients. A new kind of method
is a family of its own without an entry here.
"""

from __future__ import annotations

from collections.abc import Iterable

from pnode.solvers.methods import METHODS, Method

__all__ = ["family", "representatives"]

# What no code branches on but to look a method up or to describe it.
_OF_ITS_OWN = {"name", "order", "stages", "aliases", "subtype", "own", "scheme", "half_updates"}
_COUNTS = {"stage_units", "checkpoint"}


def _traits() -> tuple[str, ...]:
    names = {*Method.__dataclass_fields__}
    names |= {name for name, value in vars(Method).items() if hasattr(value, "__get__")
              and not callable(value) and not name.startswith("_")}  # fmt: skip
    return tuple(sorted(names - _OF_ITS_OWN - _COUNTS))


TRAITS = _traits()


def family(method: Method) -> tuple[object, ...]:
    """Return what the code asks of a method; equal for methods that take the same path."""
    scheme = method.scheme
    variable_order = method.multistep and method.name == "bdf"
    shape: tuple[object, ...] = (method.own is not None, variable_order)
    if scheme is not None:
        idle = len(scheme.live_stages(method.fsal)) < scheme.stages
        shape += (scheme.explicit_first, scheme.stiffly_accurate, idle)
    if method.linearly_implicit and scheme is not None:
        shape += (scheme.one_matrix, scheme.needs_time_slope)
    return (*(getattr(method, name) for name in TRAITS), *shape)


def _plainness(method: Method) -> tuple[int, int]:
    """Few stages, but enough of them for a recursion; an order with a history."""
    return abs(method.stages - 3), abs(method.order - 3)


def representatives(chosen: Iterable[Method] = METHODS) -> list[Method]:
    """Return one method of each family among those chosen, in the order of the table."""
    found: dict[object, Method] = {}
    for method in chosen:
        kept = found.setdefault(family(method), method)
        if _plainness(method) < _plainness(kept):
            found[family(method)] = method
    return [method for method in METHODS if method in found.values()]

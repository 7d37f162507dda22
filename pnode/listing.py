"""The table of methods for ``pnode methods``: those that fulfill conditions, as text or JSON."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from pnode.errors import ConfigurationError
from pnode.solvers.methods import METHODS, Method, markdown_table

__all__ = ["listing"]

_FACTS: dict[str, Callable[[Method], Any]] = {
    "name": lambda method: method.name,
    "aliases": lambda method: list(method.aliases),
    "petsc": lambda method: f"{method.ts_type} {method.subtype}".strip(),
    "order": lambda method: method.order,
    "stages": lambda method: method.stages,
    "fsal": lambda method: method.fsal,
    "kind": lambda method: method.kind,
    "adaptive": lambda method: method.adaptive,
    "forms": lambda method: list(method.forms),
    "adjoint": lambda method: method.adjoint,
    "checkpoint": lambda method: method.checkpoint,
    "bits": lambda method: method.same_bits,
}
_FEW = 12  # values that an error lists
_CONDITION = re.compile(r"(?P<fact>\w+)\s*(?P<sign>>=|<=|=)\s*(?P<value>.+)")
_TRUTH = {"yes": True, "true": True, "no": False, "false": False}
_ORDER = {">=": operator.ge, "<=": operator.le, "=": operator.eq}


def listing(conditions: Sequence[str], as_json: bool) -> str:
    """Return the methods for which all conditions hold.

    Parameters
    ----------
    conditions : sequence of str
        ``fact=value``, ``fact>=number``, ``fact<=number``, or a part of a name.
    as_json : bool
        A JSON array of objects, instead of the README's table.

    Raises
    ------
    ConfigurationError
        For a condition on something that methods do not have.
    """
    holds = [_condition(text) for text in conditions]
    chosen = [method for method in METHODS if all(each(method) for each in holds)]
    if not as_json:
        return markdown_table(chosen)
    facts = [{name: fact(method) for name, fact in _FACTS.items()} for method in chosen]
    return json.dumps(facts, indent=2)


def _condition(text: str) -> Callable[[Method], bool]:
    found = _CONDITION.fullmatch(text.strip())
    if found is None:
        if re.search("[<>=!]", text):
            raise ConfigurationError(
                f"--filter {text!r}: give fact=value, 'fact>=number', 'fact<=number' or a part of "
                "a name"
            )
        part = text.strip().lower()
        return lambda method: any(part in name for name in (method.name, *method.aliases))
    name, sign, value = found["fact"], found["sign"], found["value"].strip()
    if name not in _FACTS:
        raise ConfigurationError(f"--filter {text!r}: {name} is none of {', '.join(_FACTS)}")
    fact = _FACTS[name]
    example = fact(METHODS[0])
    if isinstance(example, list):
        wanted: Any = value
    elif isinstance(example, bool):
        wanted = _TRUTH.get(value.lower())
    elif isinstance(example, int):
        wanted = int(value) if value.isdecimal() else None
    else:
        wanted = value
    orders = isinstance(example, int) and not isinstance(example, bool)
    if wanted is None or (sign != "=" and not orders):
        kind = "yes or no" if isinstance(example, bool) else "a number" if orders else "= alone"
        raise ConfigurationError(f"--filter {text!r}: {name} takes {kind}")
    if isinstance(wanted, str):
        values = [fact(method) for method in METHODS]
        known = {*chain(*values)} if isinstance(example, list) else {*values}
        if wanted not in known:
            which = f"; there are {', '.join(sorted(known))}" * (len(known) <= _FEW)
            raise ConfigurationError(f"--filter {text!r}: no method has that{which}")
    if isinstance(example, list):
        return lambda method: wanted in fact(method)
    return lambda method: bool(_ORDER[sign](fact(method), wanted))

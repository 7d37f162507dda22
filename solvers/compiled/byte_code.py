"""What the code of a Module's ``forward`` reads and does, as far as its byte code tells."""

from __future__ import annotations

import builtins
import dis
import inspect
import types
from functools import lru_cache
from typing import Any

import torch

from pnode.field.held import is_plain

__all__ = [
    "NOTHING", "Unknown", "attributes_of", "flags_of", "global_of", "globals_of", "is_simple",
    "names_of",
]  # fmt: skip

_F = torch.nn.functional
#: What code may do: nothing written but local variables, no code inside.
_STEPS = frozenset(
    """BINARY_SLICE BINARY_SUBSCR BUILD_LIST BUILD_SLICE BUILD_TUPLE CACHE CALL CALL_KW COPY
    END_FOR FOR_ITER GET_ITER JUMP_BACKWARD JUMP_FORWARD KW_NAMES LOAD_ATTR LOAD_CONST
    LOAD_FAST LOAD_FAST_BORROW LOAD_FAST_BORROW_LOAD_FAST_BORROW LOAD_FAST_LOAD_FAST
    LOAD_GLOBAL LOAD_METHOD LOAD_SMALL_INT NOP NOT_TAKEN POP_ITER POP_TOP PRECALL PUSH_NULL
    RESUME RETURN_CONST RETURN_VALUE STORE_FAST STORE_FAST_LOAD_FAST STORE_FAST_STORE_FAST
    SWAP UNARY_NEGATIVE UNPACK_SEQUENCE""".split()
)
#: By an attribute of the first argument alone; its truth behind TO_BOOL.
_BRANCHES = frozenset(
    f"POP_JUMP_{way}IF_{what}" for way in ("", "FORWARD_")
    for what in ("FALSE", "TRUE", "NONE", "NOT_NONE")
)  # fmt: skip
_ARITHMETIC = frozenset(("+", "-", "*", "/", "**", "@", "[]"))
_BUILT_IN = frozenset((enumerate, len, list, range, reversed, tuple, zip))
NOTHING = object()
_VARIABLE = (
    inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)  # fmt: skip


class Unknown(Exception):
    """The code does something that is not looked through."""


@lru_cache(maxsize=256)
def is_simple(code: types.CodeType) -> bool:
    """Whether code takes the same course whatever it is given, and writes nothing."""
    if code.co_freevars or code.co_cellvars or code.co_flags & _VARIABLE:
        return False
    if any(isinstance(x, types.CodeType) or (type(x) is tuple and "out" in x)
           for x in code.co_consts):  # fmt: skip
        return False
    steps = dis.get_instructions(code)
    return flags_of(code) is not None and all(
        step.opname in _STEPS or step.opname in _BRANCHES
        or (step.opname == "BINARY_OP" and step.argrepr in _ARITHMETIC)
        for step in steps
    )  # fmt: skip


@lru_cache(maxsize=256)
def flags_of(code: types.CodeType) -> frozenset[str] | None:
    """Return the attributes of the first argument that branches look at; None if at more."""
    steps = [step for step in dis.get_instructions(code) if step.opname != "TO_BOOL"]
    flags, own = set(), code.co_varnames[:1]
    for place, step in enumerate(steps):
        if step.opname not in _BRANCHES:
            continue
        owner, name = steps[max(place - 2, 0)], steps[max(place - 1, 0)]
        loaded = owner.opname in ("LOAD_FAST", "LOAD_FAST_BORROW") and (owner.argval,) == own
        elsewhere = step.is_jump_target or name.is_jump_target  # that comes with something else
        if not loaded or name.opname != "LOAD_ATTR" or elsewhere:
            return None
        flags.add(name.argval)
    written = any("STORE_FAST" in s.opname and own[0] in str(s.argval) for s in steps if flags)
    return None if written else frozenset(flags)


@lru_cache(maxsize=256)
def names_of(code: types.CodeType, steps: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that steps of some kinds have, each once."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in steps}
    return tuple(sorted(found))


def attributes_of(function: Any) -> tuple[str, ...]:
    """Return the attributes that code names."""
    return names_of(function.__code__, ("LOAD_ATTR", "LOAD_METHOD"))


def global_of(function: Any, name: str) -> Any:
    """Return what a global name stands for in code, ``NOTHING`` for none."""
    found = function.__globals__.get(name, NOTHING)
    return getattr(builtins, name, NOTHING) if found is NOTHING else found


def globals_of(function: Any) -> list[tuple[str, Any]]:
    """Return the globals of the user's code.

    Raises
    ------
    Unknown
        If it may not be told what they do.
    """
    found = [
        (name, global_of(function, name)) for name in names_of(function.__code__, ("LOAD_GLOBAL",))
    ]
    for _, value in found:
        if not (value is torch or value is _F or is_plain(value)):
            if not (type(value) in (type, types.BuiltinFunctionType) and value in _BUILT_IN):
                raise Unknown
    return found

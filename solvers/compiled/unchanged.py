"""Modules that cannot have changed: told by what their code reads, without an evaluation.

Most networks are layers of torch's one after the other. What such a ``forward`` computes is decided
by its byte code, by the attributes and globals that this names, and by a few switches of torch's.
As long as all of these are the same objects, f calls the operations that it called, whatever t
and y are, and :mod:`pnode.solvers.compiled.guards` need not follow them. Anything else is not
looked through: branches but by a flag of the Module's own, closures, other objects, numbers taken
out of tensors.
"""

from __future__ import annotations

import builtins
import dis
import inspect
import os
import sys
import types
import weakref
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch.nn.modules import module as book

from pnode.base.surroundings import modules_within
from pnode.base.transforms import in_forward_mode, transforms_active

__all__ = ["Unchanged"]

_Module, _F = torch.nn.Module, torch.nn.functional
#: Layers that compute with their attributes alone.
_LAYERS = frozenset((
    torch.nn.Linear, torch.nn.Identity, torch.nn.Sequential, torch.nn.Tanh, torch.nn.Sigmoid,
    torch.nn.ReLU, torch.nn.SiLU, torch.nn.GELU, torch.nn.ELU, torch.nn.Softplus,
    torch.nn.LeakyReLU, torch.nn.LayerNorm, torch.nn.Softsign, torch.nn.ModuleList,
))  # fmt: skip
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
#: Of torch, ``torch.nn.functional`` and tensors: these draw nothing, write nothing but what they
#: return, and that is tensors, or shapes.
_PURE = frozenset(
    """T abs add atan2 bmm cat chunk clamp contiguous conv1d conv2d conv3d cos cosh cross
    cumsum dim div dot dtype elu erf exp expand expm1 flatten float64 functional gelu
    leaky_relu linear log log1p logsumexp mT matmul maximum mean minimum mm movedim mul
    narrow ndim neg new_zeros nn norm ones_like outer permute pow prod relu reshape roll rsqrt
    select shape sigmoid sign silu sin sinh size softmax softplus split sqrt square squeeze
    stack sub sum swapaxes tan tanh transpose unsqueeze view zeros_like""".split()
)
_BUILT_IN = frozenset((enumerate, len, list, range, reversed, tuple, zip))
_OPERATORS = tuple(
    f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "matmul")
    for side in ("", "r")
)  # fmt: skip
#: How a Module is called, and its attributes are found.
_CALLS = frozenset((
    "__call__", "_call_impl", "_wrapped_call_impl", "_compiled_call_impl", "forward",
    "__getattr__", "__getattribute__",
))  # fmt: skip
_CONTAINER = ("__iter__", "__getitem__", "__len__")
#: What decides about these besides, wherever they are.
_ALWAYS: tuple[tuple[Any, Iterable[str]], ...] = (
    (torch.Tensor, (*_OPERATORS, "__getitem__", "__neg__", "__iter__")),
    (torch.nn.Sequential, _CONTAINER), (torch.nn.ModuleList, _CONTAINER), (_Module, _CALLS),
)  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
#: Methods by which the user's classes may differ from torch's.
_HARMLESS = frozenset(("__init__", "__repr__", "__getstate__", "__setstate__", "forward"))
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_PLAIN = (bool, int, float, str, type(None), torch.dtype)
_NOTHING = object()
_FOLDER = os.path.dirname(torch.__file__) + os.sep
_VARIABLE = (
    inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR | inspect.CO_COROUTINE
    | inspect.CO_ASYNC_GENERATOR
)  # fmt: skip
#: Of torch, behind one field.
_MOST_NAMES = 200


class _Unknown(Exception):
    """The code does something that is not looked through."""


class Unchanged:
    """What a Module's ``forward`` reads, as it is when this is made.

    Parameters
    ----------
    function : Module
        f.
    captured : iterable of Tensor
        What its graph reads, and keeps alive. Their numbers may change.
    """

    def __init__(self, function: torch.nn.Module, captured: Iterable[torch.Tensor]) -> None:
        modules = modules_within([function])
        forwards = [_forward(module) for module in modules]
        users = {name for one in forwards if one is not None for name in _attributes(one)}
        self._dtype = torch.get_default_dtype()
        # Modules weakly, as graphs hold what this is part of: see pnode.field.held.
        self._modules = [weakref.ref(module) for module in modules]
        tensors, known = frozenset(map(id, captured)), {id(m): i for i, m in enumerate(modules)}
        self._looks = [
            _Look(module, forward, users, tensors, known)
            for module, forward in zip(modules, forwards, strict=True)
        ]
        known_names = {name for look in self._looks for name in look.names}
        if any(name not in known_names or _is_torchs(name) for name in users - _PURE):
            raise _Unknown
        self._torch = _bindings({type(module) for module in modules})

    @classmethod
    def of(cls, function: Any, captured: Iterable[torch.Tensor]) -> Unchanged | None:
        """Return it, None if f is none of those that are looked through."""
        try:
            made = cls(function, captured) if isinstance(function, _Module) else None
        except _Unknown:
            return None
        return made if made is not None and made.holds(function) else None

    def holds(self, function: Any) -> bool:
        """Whether it is f, nothing has changed, and nothing of torch's is on that decides too."""
        core = torch._C
        if (
            function is not self._modules[0]() or torch.get_default_dtype() is not self._dtype
            or torch.is_autocast_enabled("cpu")
            or core._len_torch_function_stack() or core._len_torch_dispatch_stack()
            or core._get_tracing_state() is not None or transforms_active() or in_forward_mode()
        ):  # fmt: skip
            return False
        for place, name, value in self._torch:
            if getattr(place, name, _NOTHING) is not value:
                return False
        modules = [reference() for reference in self._modules]
        for module, look in zip(modules, self._looks, strict=True):
            if module is None or not look.same(module, modules):
                return False
        return not any([getattr(book, name) for name in _GLOBAL_HOOKS])


class _Look:
    """What the code of one Module, and code of others that hold it, reads of it.

    Parameters
    ----------
    module : Module
        The Module.
    forward : function or None
        Its code, if that is the user's.
    users : set of str
        The attributes that the user's code names.
    tensors : set of int
        Identities of the tensors that the graph reads.
    places : dict
        Which of all Modules each is, by its identity.
    """

    def __init__(
        self, module: torch.nn.Module, forward: Any, users: set[str], tensors: frozenset[int],
        places: dict[int, int],
    ) -> None:  # fmt: skip
        kind, own = type(module), vars(module)
        self._kind = weakref.ref(kind)
        self._members = [tuple(vars(base)) for base in _bases(kind)]
        self._code = kind.forward.__code__
        self._globals = [] if forward is None else _globals(forward)
        self._parts = tuple(own["_modules"])
        self._places = [-1 if x is None else places[id(x)] for x in own["_modules"].values()]
        #: Names of what it has.
        self.names = {*own["_modules"], *own["_parameters"], *own["_buffers"]}
        for name in () if forward is None else _flags(forward.__code__) or ():
            flag = _found(own, name)
            flag = getattr(kind, name, _NOTHING) if flag is _NOTHING else flag
            if flag is _NOTHING or not _is_plain(flag):
                raise _Unknown
        self._plain: list[tuple[str, Any, Any]] = []
        self._tensors: list[tuple[str, int]] = []
        layers = set() if kind is torch.nn.ModuleList else set(_attributes(kind.forward))
        for name in sorted(users | layers):
            at_class, value = getattr(kind, name, _NOTHING), _found(own, name)
            if isinstance(value, torch.Tensor):
                # The identity of another than those captured might be that of a later one.
                ours = type(value) in _TENSORS and id(value) in tensors
                if not ours or name in own or at_class is not _NOTHING:
                    raise _Unknown
                self._tensors.append((name, id(value)))
                continue
            for one in (at_class, value):
                if one is not _NOTHING and not _is_plain(one):
                    raise _Unknown
            self._plain.append((name, at_class, value))
            if (at_class, value) != (_NOTHING, _NOTHING):
                self.names.add(name)

    def same(self, module: torch.nn.Module, modules: Sequence[Any]) -> bool:
        """Whether it is as it was; ``modules``: all of them, in order."""
        kind: Any = type(module)
        forward, own, before = kind.forward, vars(module), self._kind()
        if (
            before is not kind or getattr(forward, "__code__", None) is not self._code
            or own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
            or own["_backward_pre_hooks"] or not _CALLS.isdisjoint(own)
        ):  # fmt: skip
            return False
        # A method more may be an operator.
        if [tuple(vars(base)) for base in _bases(kind)] != self._members:
            return False
        for name, at_class, value in self._plain:
            if _found(own, name) is not value or getattr(kind, name, _NOTHING) is not at_class:
                return False
        for name, each in self._tensors:
            found = _found(own, name)
            if id(found) != each or type(found) not in _TENSORS or hasattr(kind, name):
                return False
        parts = own["_modules"]
        if tuple(parts) != self._parts:
            return False
        for part, place in zip(parts.values(), self._places, strict=True):
            if part is not (None if place < 0 else modules[place]):
                return False
        for name, value in self._globals:
            if _global(forward, name) is not value:
                return False
        return True


def _found(own: dict[str, Any], name: str) -> Any:
    """Return an attribute of a Module, but for Modules in it, as Python and torch look for it."""
    for place in (own, own["_parameters"], own["_buffers"]):
        if name in place:
            return place[name]
    return _NOTHING


def _bases(kind: Any) -> tuple[type, ...]:
    """Return the classes in which the user may have written something."""
    return () if kind in _LAYERS else tuple(x for x in kind.__mro__ if x not in (_Module, object))


def _forward(module: torch.nn.Module) -> Any:
    """Return the code of a Module if it is the user's, None for torch's.

    Raises
    ------
    _Unknown
        If it may do more than what it names tells.
    """
    kind: Any = type(module)
    if kind in _LAYERS:
        return None
    forward = getattr(kind, "forward", None)
    if type(forward) is not types.FunctionType or not _is_simple(forward.__code__):
        raise _Unknown
    methods = {name for base in _bases(kind) for name, x in vars(base).items() if callable(x)}
    if {name for name in methods if name.startswith("__") or name in _CALLS} - _HARMLESS:
        raise _Unknown
    if forward.__defaults__ or forward.__kwdefaults__:
        raise _Unknown
    return forward


@lru_cache(maxsize=256)
def _is_simple(code: types.CodeType) -> bool:
    """Whether code takes the same course whatever it is given, and writes nothing."""
    if code.co_freevars or code.co_cellvars or code.co_flags & _VARIABLE:
        return False
    if any(isinstance(x, types.CodeType) or (type(x) is tuple and "out" in x)
           for x in code.co_consts):  # fmt: skip
        return False
    steps = dis.get_instructions(code)
    return _flags(code) is not None and all(
        step.opname in _STEPS or step.opname in _BRANCHES
        or (step.opname == "BINARY_OP" and step.argrepr in _ARITHMETIC)
        for step in steps
    )  # fmt: skip


@lru_cache(maxsize=256)
def _flags(code: types.CodeType) -> frozenset[str] | None:
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
def _names(code: types.CodeType, steps: tuple[str, ...]) -> tuple[str, ...]:
    found = {step.argval for step in dis.get_instructions(code) if step.opname in steps}
    return tuple(sorted(found))


def _attributes(function: Any) -> tuple[str, ...]:
    return _names(function.__code__, ("LOAD_ATTR", "LOAD_METHOD"))


def _global(function: Any, name: str) -> Any:
    found = function.__globals__.get(name, _NOTHING)
    return getattr(builtins, name, _NOTHING) if found is _NOTHING else found


def _globals(function: Any) -> list[tuple[str, Any]]:
    """Return the globals of the user's code.

    Raises
    ------
    _Unknown
        If it may not be told what they do.
    """
    found = [
        (name, _global(function, name)) for name in _names(function.__code__, ("LOAD_GLOBAL",))
    ]
    for _, value in found:
        if not (value is torch or value is _F or _is_plain(value)):
            if not (type(value) in (type, types.BuiltinFunctionType) and value in _BUILT_IN):
                raise _Unknown
    return found


def _is_plain(value: Any) -> bool:
    """Whether a value cannot change."""
    if type(value) in (tuple, torch.Size):
        return all(map(_is_plain, value))
    return type(value) in _PLAIN


def _bindings(kinds: set[Any]) -> list[tuple[Any, str, Any]]:
    """Return what the names in code stand for in torch, and in torch's functions behind them."""
    always = *_ALWAYS, *((kind, _CALLS) for kind in kinds & _LAYERS)
    found = {(id(x), name): (x, name) for x, names in always for name in names}
    pending, seen = [kind.forward for kind in kinds], set()
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        places = [torch, _F, torch.Tensor]
        names = _attributes(function)
        if function.__code__.co_filename.startswith(_FOLDER):
            places.append(sys.modules[function.__module__])
            names += _names(function.__code__, ("LOAD_GLOBAL",))
        for place in places:
            for name in names:
                value = getattr(place, name, _NOTHING)
                if value is not _NOTHING:
                    found[id(place), name] = place, name
                    # That one is for modes, and tensors of other classes.
                    if type(value) is types.FunctionType and name != "handle_torch_function":
                        pending.append(value)
        if len(found) > _MOST_NAMES:
            raise _Unknown
    made = [(place, name, getattr(place, name)) for place, name in found.values()]
    if not all(_is_original(value) for _, _, value in made):
        raise _Unknown
    return made


def _is_torchs(name: str) -> bool:
    """Whether a name stands for something in torch, too."""
    return any(hasattr(place, name) for place in (torch, _F, torch.Tensor))


def _is_original(value: Any, seen: tuple[Any, ...] = ()) -> bool:
    """Whether a value in torch is none that someone has put there, which may do anything."""
    if type(value) is types.FunctionType:
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        seen = (*seen, value)
        return value.__code__.co_filename.startswith(_FOLDER) and all(
            _is_original(one, seen) for one in cells if not any(one is x for x in seen)
        )
    if type(value) in (types.MethodType, property):
        return False
    kind = value if isinstance(value, type) else type(value)
    return kind.__module__.partition(".")[0] in ("builtins", "torch", "typing")

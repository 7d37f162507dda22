"""Modules that cannot have changed: told by what their code reads, without an evaluation.

Most networks are layers of torch's one after the other. What such a ``forward`` computes is decided
by its byte code, by the attributes and globals that this names, and by a few switches of torch's.
As long as all of these are the same objects, f calls the operations that it called, whatever t
and y are, and :mod:`pnode.solvers.compiled.guards` need not follow them. Anything else is not
looked through: branches but by a flag of the Module's own, closures, other objects, numbers taken
out of tensors.
"""

from __future__ import annotations

import os
import sys
import types
import weakref
from collections.abc import Iterable, Sequence
from operator import attrgetter, is_not, itemgetter
from typing import Any

import torch
from torch.nn.modules import module as book

from pnode.base.surroundings import modules_within
from pnode.base.transforms import in_forward_mode, transforms_active
from pnode.field.held import is_plain
from pnode.solvers.compiled.byte_code import (
    NOTHING,
    Unknown,
    attributes_of,
    flags_of,
    global_of,
    globals_of,
    is_simple,
    names_of,
)

__all__ = ["Unchanged"]

_Module, _F = torch.nn.Module, torch.nn.functional
#: Layers that compute with their attributes alone.
_LAYERS = frozenset((
    torch.nn.Linear, torch.nn.Identity, torch.nn.Sequential, torch.nn.Tanh, torch.nn.Sigmoid,
    torch.nn.ReLU, torch.nn.SiLU, torch.nn.GELU, torch.nn.ELU, torch.nn.Softplus,
    torch.nn.LeakyReLU, torch.nn.LayerNorm, torch.nn.Softsign, torch.nn.ModuleList,
))  # fmt: skip
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
_hooks = itemgetter(*_HOOKS)
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
#: Methods by which the user's classes may differ from torch's.
_HARMLESS = frozenset(("__init__", "__repr__", "__getstate__", "__setstate__", "forward"))
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_FOLDER = os.path.dirname(torch.__file__) + os.sep
#: Of torch, behind one field.
_MOST_NAMES = 200


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
        users = {name for one in forwards if one is not None for name in attributes_of(one)}
        self._dtype = torch.get_default_dtype()
        # Modules weakly, as graphs hold what this is part of: see pnode.field.held.
        self._modules = [weakref.ref(module) for module in modules]
        tensors, known = frozenset(map(id, captured)), {id(m): i for i, m in enumerate(modules)}
        self._looks = [
            _Look(module, forward, users, tensors, known)
            for module, forward in zip(modules, forwards, strict=True)
        ]
        self._kinds = list({look.kind.reference(): look.kind for look in self._looks}.values())
        known_names = {name for look in self._looks for name in look.names}
        if any(name not in known_names or _is_torchs(name) for name in users - _PURE):
            raise Unknown
        self._torch = _bindings({type(module) for module in modules})

    @classmethod
    def of(cls, function: Any, captured: Iterable[torch.Tensor]) -> Unchanged | None:
        """Return it, None if f is none of those that are looked through."""
        try:
            made = cls(function, captured) if isinstance(function, _Module) else None
        except Unknown:
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
        try:
            for place, get, values in self._torch:
                if any(map(is_not, get(place), values)):
                    return False
        except AttributeError:
            return False
        if not all([kind.same() for kind in self._kinds]):
            return False
        modules = [reference() for reference in self._modules]
        for module, look in zip(modules, self._looks, strict=True):
            if module is None or not look.same(module, modules):
                return False
        return not any([getattr(book, name) for name in _GLOBAL_HOOKS])


class _Kind:
    """What a class of Modules says of attributes that code reads.

    Parameters
    ----------
    kind : type
        The class.
    forward : function or None
        Its code, if that is the user's.
    names : iterable of str
        The attributes.
    """

    def __init__(self, kind: Any, forward: Any, names: Iterable[str]) -> None:
        self.reference = weakref.ref(kind)
        self._members = [tuple(vars(base)) for base in _bases(kind)]
        self._code = kind.forward.__code__
        self._globals = [] if forward is None else globals_of(forward)
        #: What it has of them, and what it has not.
        self.found = {name: getattr(kind, name) for name in names if hasattr(kind, name)}
        self._absent = [name for name in names if name not in self.found]
        if not all(map(is_plain, self.found.values())):
            raise Unknown

    def same(self) -> bool:
        """Whether it is as it was."""
        kind: Any = self.reference()
        forward = None if kind is None else kind.forward
        if getattr(forward, "__code__", None) is not self._code:
            return False
        # A method more may be an operator.
        if [tuple(vars(base)) for base in _bases(kind)] != self._members:
            return False
        for name, value in self.found.items():
            if getattr(kind, name, NOTHING) is not value:
                return False
        for own in map(vars, kind.__mro__):
            for name in self._absent:
                if name in own:
                    return False
        for name, value in self._globals:
            if global_of(forward, name) is not value:
                return False
        return True


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
        Identities of the tensors that the graph reads, and keeps alive as long as this is there.
    places : dict
        Which of all Modules each is, by its identity.
    """

    def __init__(
        self, module: torch.nn.Module, forward: Any, users: set[str], tensors: frozenset[int],
        places: dict[int, int],
    ) -> None:  # fmt: skip
        kind, own = type(module), vars(module)
        layers = set() if kind is torch.nn.ModuleList else set(attributes_of(kind.forward))
        names = sorted(users | layers)
        self.kind = _Kind(kind, forward, names)
        self._parts = list(own["_modules"])
        self._places = [-1 if x is None else places[id(x)] for x in own["_modules"].values()]
        #: Names of what it has.
        self.names = {*own["_modules"], *own["_parameters"], *own["_buffers"], *self.kind.found}
        for name in () if forward is None else flags_of(forward.__code__) or ():
            flag = _found(own, name)
            flag = getattr(kind, name, NOTHING) if flag is NOTHING else flag
            if flag is NOTHING or not is_plain(flag):
                raise Unknown
        #: What it has itself, where else what is found, and what it has not got.
        self._own, self._elsewhere, away = [], [], set(_CALLS)
        for name in names:
            value = _found(own, name)
            if isinstance(value, torch.Tensor):
                # The identity of another than those captured might be that of a later one.
                ours = type(value) in _TENSORS and id(value) in tensors
                if not ours or name in own or name in self.kind.found:
                    raise Unknown
            elif value is not NOTHING and not is_plain(value):
                raise Unknown
            if name in own:
                self._own.append((name, value))
                self.names.add(name)
                continue
            away.add(name)
            if value is not NOTHING:
                self._elsewhere.append((name, value))
        self._away = frozenset(away)
        self._nowhere = self._away - _CALLS - {name for name, _ in self._elsewhere}

    def same(self, module: torch.nn.Module, modules: Sequence[Any]) -> bool:
        """Whether it is as it was; ``modules``: all of them, in order."""
        own = vars(module)
        if (
            type(module) is not self.kind.reference() or any(_hooks(own))
            or not self._away.isdisjoint(own)
        ):  # fmt: skip
            return False
        for name, value in self._own:
            if own.get(name, NOTHING) is not value:
                return False
        parts, parameters, buffers = own["_modules"], own["_parameters"], own["_buffers"]
        for place in (parameters, buffers):
            if place and not self._nowhere.isdisjoint(place):
                return False
        for name, value in self._elsewhere:
            found = parameters[name] if name in parameters else buffers.get(name, NOTHING)
            if found is not value or (value is not None and type(found) not in _TENSORS):
                return False
        if not parts:
            return not self._parts
        if list(parts) != self._parts:
            return False
        for part, index in zip(parts.values(), self._places, strict=True):
            if part is not (None if index < 0 else modules[index]):
                return False
        return True


def _found(own: dict[str, Any], name: str) -> Any:
    """Return an attribute of a Module, but for Modules in it, as Python and torch look for it."""
    for place in (own, own["_parameters"], own["_buffers"]):
        if name in place:
            return place[name]
    return NOTHING


def _bases(kind: Any) -> tuple[type, ...]:
    """Return the classes in which the user may have written something."""
    return () if kind in _LAYERS else tuple(x for x in kind.__mro__ if x not in (_Module, object))


def _forward(module: torch.nn.Module) -> Any:
    """Return the code of a Module if it is the user's, None for torch's.

    Raises
    ------
    Unknown
        If it may do more than what it names tells.
    """
    kind: Any = type(module)
    if kind in _LAYERS:
        return None
    forward = getattr(kind, "forward", None)
    if type(forward) is not types.FunctionType or not is_simple(forward.__code__):
        raise Unknown
    methods = {name for base in _bases(kind) for name, x in vars(base).items() if callable(x)}
    if {name for name in methods if name.startswith("__") or name in _CALLS} - _HARMLESS:
        raise Unknown
    if forward.__defaults__ or forward.__kwdefaults__:
        raise Unknown
    return forward


def _bindings(kinds: set[Any]) -> list[tuple[Any, Any, tuple[Any, ...]]]:
    """Return what the names in code stand for in torch, and in torch's functions behind them.

    By the places where they are looked up: each, what gets them all there, and what that got.
    """
    always = *_ALWAYS, *((kind, _CALLS) for kind in kinds & _LAYERS)
    found = {(id(x), name): (x, name) for x, names in always for name in names}
    pending, seen = [kind.forward for kind in kinds], set()
    while pending:
        function = pending.pop()
        if function in seen:
            continue
        seen.add(function)
        places = [torch, _F, torch.Tensor]
        names = attributes_of(function)
        if function.__code__.co_filename.startswith(_FOLDER):
            places.append(sys.modules[function.__module__])
            names += names_of(function.__code__, ("LOAD_GLOBAL",))
        for place in places:
            for name in names:
                value = getattr(place, name, NOTHING)
                if value is not NOTHING:
                    found[id(place), name] = place, name
                    # That one is for modes, and tensors of other classes.
                    if type(value) is types.FunctionType and name != "handle_torch_function":
                        pending.append(value)
        if len(found) > _MOST_NAMES:
            raise Unknown
    if not all(_is_original(getattr(place, name)) for place, name in found.values()):
        raise Unknown
    names_at: dict[int, tuple[Any, list[str]]] = {}
    for place, name in found.values():
        names_at.setdefault(id(place), (place, ["__name__"]))[1].append(name)
    # With one name more: of several, attrgetter makes a tuple.
    return [(x, get := attrgetter(*names), get(x)) for x, names in names_at.values()]


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

"""What tells one sweep from another: a digest of each thing that its numbers depend on.

Of f: parameters, buffers and attributes of Modules and other callable objects, what functions close
over, their defaults, the globals they name, and their code; numbers, strings, arrays and tensors in
these, also within containers. What libraries keep in their own objects is not looked at.
"""

from __future__ import annotations

import functools
import hashlib
import numbers
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

__all__ = ["describe", "digest", "fingerprint"]

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size,
    torch.layout, range, slice, np.generic,
)  # fmt: skip
# Objects and functions of these are what their names say.
_LIBRARIES = {
    *sys.stdlib_module_names, "torch", "numpy", "scipy", "petsc4py", "mpi4py", "pnode",
    "lightning", "pytorch_lightning", "tqdm", "rich", "wandb", "matplotlib", "IPython", "_pytest",
}  # fmt: skip
# Objects of these are data all the same.
_DATA = ("types.SimpleNamespace", "argparse.", "numpy.", "scipy.", "torch.distributions.")
# A Module's own book-keeping: what matters of it is looked at by name.
_MODULE = set(vars(torch.nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def digest(tensor: torch.Tensor) -> str:
    """Return a digest of a tensor's values, shape and dtype."""
    found = hashlib.sha256(str((tensor.dtype, tuple(tensor.shape), tensor.layout)).encode())
    for part in _parts(tensor.detach()):
        values = part.resolve_conj().resolve_neg().contiguous().cpu().reshape(-1)
        found.update(str((values.dtype, tuple(part.shape))).encode())
        found.update(values.view(torch.uint8).numpy().data)
    return found.hexdigest()


def _parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return dense tensors that make up this one."""
    if tensor.device.type == "meta":
        return []
    if tensor.layout is torch.strided:
        return [tensor]
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return [tensor.indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    if tensor.layout in (torch.sparse_csc, torch.sparse_bsc):
        return [tensor.ccol_indices(), tensor.row_indices(), tensor.values()]
    return [tensor.to_dense()]


def fingerprint(facts: Mapping[str, Any], tensors: Iterable[torch.Tensor]) -> dict[str, str]:
    """Return what must be the same when a sweep is taken up again, by name.

    Parameters
    ----------
    facts : mapping
        Whatever :func:`describe` knows; a callable is taken apart.
    tensors : iterable of Tensor
        Which go by the name "tensors".
    """
    found: dict[str, str] = {}
    for name, value in facts.items():
        found |= describe(name, value)
    found["tensors"] = _short(" ".join(map(digest, tensors)))
    return found


def describe(name: str, value: Any) -> dict[str, str]:
    """Return a short text for each thing that is reachable from a value, by its name."""
    found: dict[str, str] = {}
    seen: dict[int, str] = {}  # numbers, not addresses: the same in every process
    alive: list[Any] = []  # an address is an object's as long as that lives
    waiting = deque([(name, value)])
    while waiting:
        path, item = waiting.popleft()
        if isinstance(item, _PLAIN):
            found[path] = _short(f"{type(item).__name__} {item!r}")
        elif id(item) in seen:
            found[path] = f"is {seen[id(item)]}"
        else:
            seen[id(item)] = path
            alive.append(item)
            found[path], inside = _open(path, item)
            waiting.extend(inside)
    return found


def _short(text: str) -> str:
    """Return a text, or a digest of it if it is long."""
    return text if len(text) < 80 else hashlib.sha256(text.encode()).hexdigest()


def _open(path: str, item: Any) -> tuple[str, Iterable[tuple[str, Any]]]:
    """Return what an object is, and what is in it."""
    kind = f"{type(item).__module__}.{type(item).__qualname__}"
    if isinstance(item, torch.Tensor):
        return _tensor(item), ()
    if isinstance(item, np.ndarray):
        return _array(item), ()
    if isinstance(item, Mapping):
        return f"{kind} of {len(item)}", [
            (f"{path}[{key!r}]" if isinstance(key, _PLAIN) else f"{path}[key {place}]", item[key])
            for place, key in enumerate(item)
        ]
    if isinstance(item, (tuple, list, deque)):
        return f"{kind} of {len(item)}", [(f"{path}[{i}]", x) for i, x in enumerate(item)]
    if isinstance(item, (set, frozenset)):
        plain = [repr(x) for x in item if isinstance(x, _PLAIN)]
        return _short(f"{kind} of {len(item)} {sorted(plain)}"), ()
    if isinstance(item, numbers.Number):
        return _short(f"{kind} {item!r}"), ()
    if isinstance(item, types.FunctionType):
        return _function(path, item)
    if isinstance(item, types.MethodType):
        return kind, [(f"{path}.__self__", item.__self__), (f"{path}.__func__", item.__func__)]
    if isinstance(item, functools.partial):
        own = {"func": item.func, "args": item.args, "keywords": item.keywords}
        return kind, [(f"{path}.{name}", own[name]) for name in own]
    if isinstance(item, torch.Generator):
        return f"{kind} {digest(item.get_state())}", ()
    if isinstance(item, torch.nn.Module):
        return _module(path, item, kind)
    if isinstance(item, (type, types.ModuleType, types.BuiltinFunctionType)):
        return f"{kind} {getattr(item, '__qualname__', item.__name__)}", ()
    if _of_library(type(item)) and not f"{kind}.".startswith(_DATA):
        # Such as a cached function's, and the f of a solver inside of f.
        names = [name for name in ("__wrapped__", "_functions") if _has(item, name)]
        return kind, [(f"{path}.{name}", getattr(item, name)) for name in names]
    return kind, _attributes(path, item)


def _tensor(tensor: torch.Tensor) -> str:
    try:
        return f"tensor {digest(tensor)}"
    except (RuntimeError, TypeError, NotImplementedError):  # of a subclass that shows no values
        return f"{type(tensor).__qualname__} {tuple(tensor.shape)} {tensor.dtype}"


def _array(array: np.ndarray) -> str:
    found = "" if array.dtype.hasobject else hashlib.sha256(array.tobytes()).hexdigest()
    return f"array {array.dtype} {array.shape} {found}"


def _of_library(item: Any) -> bool:
    return str(getattr(item, "__module__", None)).partition(".")[0] in _LIBRARIES


def _attributes(path: str, item: Any) -> list[tuple[str, Any]]:
    """Return an object's own attributes, sorted, and the code that it is called with."""
    names = set(getattr(item, "__dict__", ()))
    for base in type(item).__mro__:
        slots = base.__dict__.get("__slots__", ())
        names |= {slots} if isinstance(slots, str) else set(slots)
    if isinstance(item, torch.nn.Module):
        names -= _MODULE
    names -= {"__dict__", "__weakref__"}
    found = [(f"{path}.{name}", getattr(item, name)) for name in sorted(names) if _has(item, name)]
    for name in ("forward", "__call__"):
        code = getattr(type(item), name, None)
        if isinstance(code, types.FunctionType) and not _of_library(code):
            found.append((f"{path}.{name}", code))
    return found


def _has(item: Any, name: str) -> bool:
    try:
        return hasattr(item, name)
    except Exception:  # a property's
        return False


def _module(path: str, item: torch.nn.Module, kind: str) -> tuple[str, Iterable[tuple[str, Any]]]:
    parts: dict[str, Any] = OrderedDict(item.named_parameters(recurse=False))
    parts |= item.named_buffers(recurse=False)
    parts |= item.named_children()
    for name in _HOOKS:
        parts |= {f"{name}[{i}]": x for i, x in enumerate(getattr(item, name).values())}
    own = [(f"{path}.{name}", part) for name, part in parts.items()]
    # Attributes of torch's own Modules are settings, such as the negative slope of a LeakyReLU.
    return kind, [*own, *_attributes(path, item)]


def _function(path: str, item: types.FunctionType) -> tuple[str, list[tuple[str, Any]]]:
    code = item.__code__
    if _of_library(item):
        return f"{item.__module__}.{item.__qualname__}", []
    found = []
    for name, cell in zip(code.co_freevars, item.__closure__ or (), strict=True):
        try:
            found.append((f"{path}, {name}", cell.cell_contents))
        except ValueError:  # not assigned yet
            continue
    found += [(f"{path}, default {i}", x) for i, x in enumerate(item.__defaults__ or ())]
    found += [(f"{path}, default {name}", x) for name, x in (item.__kwdefaults__ or {}).items()]
    for name in sorted(_names(code)):
        value = item.__globals__.get(name)
        if value is not None and not isinstance(value, (types.ModuleType, type)):
            found.append((f"{path}, {name}", value))
    return f"code {_code(code)}", found


def _names(code: types.CodeType) -> set[str]:
    """Return the names that code, and functions made in it, may look up."""
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            found |= _names(constant)
    return found


def _code(code: types.CodeType) -> str:
    """Return a digest of what code does, wherever its file is."""
    found = hashlib.sha256(code.co_code)
    found.update(repr((code.co_names, code.co_varnames, code.co_freevars)).encode())
    for constant in code.co_consts:
        text = _code(constant) if isinstance(constant, types.CodeType) else _constant(constant)
        found.update(text.encode() + b"\0")
    return found.hexdigest()


def _constant(constant: Any) -> str:
    if isinstance(constant, frozenset):  # in another order in another process
        return f"frozenset {sorted(map(_constant, constant))}"
    return f"{type(constant).__name__} {constant!r}"

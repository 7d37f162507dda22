"""What a vector field sees besides its arguments, as it was in the forward sweep.

A backward sweep runs when the user asks for it, perhaps outside of an ``autocast``, with another
default dtype or after ``model.eval()``. f is evaluated there as it was forwards.
"""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch.nn.utils.stateless import _functional_call

__all__ = ["Surroundings", "modules_within", "owner", "parameters_of", "tell_left_behind"]

_CPU = torch.device("cpu")


class Surroundings:
    """What f sees besides its arguments; taken down when made.

    Parameters
    ----------
    functions : iterable of callable
        f, or the parts of a split one. Of Modules the training flags are restored, and parameters
        and buffers in whose place are others, as after ``torch.func.functional_call``; those that
        were written into are named.
    device : torch.device
        Where f computes.
    among : collection of int, optional
        Identities of the tensors that f reads; None where that may be any of its Modules'.
    """

    def __init__(
        self, functions: Iterable[Any], device: torch.device, among: Collection[int] | None = None
    ) -> None:
        kinds = {"cpu", device.type}
        self._autocast = {kind: _autocast(kind) for kind in kinds}
        self._dtype = torch.get_default_dtype()
        self._device = _default_device()
        # Weakly: see pnode.field.held.
        self._modules: list[tuple[Any, bool]] = []
        self._tensors: list[tuple[Any, str, torch.Tensor, int]] = []
        for module in modules_within(map(owner, functions)):
            reference = weakref.ref(module)
            self._modules.append((reference, module.training))
            for found in (module._parameters, module._buffers):
                if found:
                    self._tensors += [
                        (reference, name, tensor, _version(tensor))
                        for name, tensor in found.items()
                        if tensor is not None and (among is None or id(tensor) in among)
                    ]  # fmt: skip

    def again(self) -> Surroundings:
        """Return what f sees now, if its Modules have the same tensors."""
        made = object.__new__(Surroundings)
        made._autocast = {kind: _autocast(kind) for kind in self._autocast}
        made._dtype, made._device = torch.get_default_dtype(), _default_device()
        alive = [(reference, reference()) for reference, _ in self._modules]
        made._modules = [(reference, x.training) for reference, x in alive if x is not None]
        made._tensors = [(*slot, tensor, _version(tensor)) for *slot, tensor, _ in self._tensors]
        return made

    def restored(self) -> AbstractContextManager[None]:
        """Return a context in which f sees what it saw when this was taken down."""
        return nullcontext() if self._is_same() else self._restored()

    def _is_same(self) -> bool:
        """Whether f sees now what it saw then."""
        for kind, found in self._autocast.items():
            if _autocast(kind) != found:
                return False
        for reference, flag in self._modules:
            module = reference()
            if module is not None and module.training != flag:
                return False
        return (
            _default_device() == self._device
            and torch.get_default_dtype() is self._dtype
            and not (self._tensors and self._replaced())
        )

    @contextmanager
    def _restored(self) -> Iterator[None]:
        alive = [(module(), flag) for module, flag in self._modules]
        changed = [
            (module, flag) for module, flag in alive
            if module is not None and module.training != flag
        ]  # fmt: skip
        replaced = self._replaced()
        dtype = torch.get_default_dtype()
        other_dtype = dtype is not self._dtype
        with ExitStack() as stack:
            for kind, found in self._autocast.items():
                if _autocast(kind) != found:
                    enabled, autocast_dtype, cache = found
                    stack.enter_context(
                        torch.autocast(
                            kind, dtype=autocast_dtype, enabled=enabled, cache_enabled=cache
                        )
                    )
            if _default_device() != self._device:
                stack.enter_context(self._device)
            try:
                if other_dtype:
                    torch.set_default_dtype(self._dtype)
                for module, flag in changed:
                    module.training = flag
                for place, name, tensor, _ in replaced:
                    place[name] = tensor
                yield
            finally:
                for place, name, _, now in replaced:
                    place[name] = now
                if other_dtype:
                    torch.set_default_dtype(dtype)
                for module, flag in changed:
                    module.training = not flag

    def _replaced(self) -> list[tuple[dict[str, Any], str, torch.Tensor, Any]]:
        """Return where Modules have other tensors now, which they had, and which they have."""
        found = []
        for reference, name, tensor, _ in self._tensors:
            module = reference()
            if module is None:
                continue
            own = module._parameters  # of scripted Modules not a dict
            if name in own and own[name] is tensor:
                continue
            for place in (module._parameters, module._buffers):
                if name in place and place[name] is not tensor:
                    found.append((place, name, tensor, place[name]))
        return found

    def differences(self) -> str:
        """Say what of the Modules has changed since; empty if nothing has."""
        found = []
        for reference, name, tensor, version in self._tensors:
            module = reference()
            if module is None:
                continue
            kind = "parameter" if name in module._parameters else "buffer"
            if _version(tensor) != version:
                found.append(f"{kind} {name!r} of {type(module).__name__} was written into")
        return f" (since then: {'; '.join(found)})" if found else ""


def modules_within(functions: Iterable[Any]) -> list[torch.nn.Module]:
    """Return the functions that are Modules and all Modules inside, once, in torch's order."""
    found: dict[int, torch.nn.Module] = {}
    pending = [function for function in functions if isinstance(function, torch.nn.Module)]
    if len(pending) == 1 and not pending[0]._modules:
        return pending
    pending.reverse()
    while pending:
        module = pending.pop()
        if id(module) not in found:
            found[id(module)] = module
            if module._modules:
                parts = [part for part in module._modules.values() if part is not None]
                pending.extend(reversed(parts))
    return list(found.values())


def parameters_of(module: torch.nn.Module) -> list[torch.nn.Parameter]:
    """Do as ``module.parameters()``, in a fifth of the time where no class has its own way.

    A parameter that is in several places comes as often.
    """
    modules = modules_within([module])
    kinds: Iterable[Any] = map(type, modules)
    if not all(map(_walks_as_usual, kinds)):
        return list(module.parameters())
    return [one for each in modules for one in each._parameters.values() if one is not None]


def tell_left_behind(module: torch.nn.Module) -> None:
    """Warn of tensors in the place of parameters, unless ``functional_call`` has lent them now.

    It leaves them there of a Module that it finds in two places of another.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code is _functional_call.__code__:
            return
        frame = frame.f_back
    found = [
        f"{name!r} of {type(each).__name__}" for each in modules_within([module])
        for name, tensor in each._parameters.items() if type(tensor) is torch.Tensor
    ]  # fmt: skip
    warnings.warn(
        f"{', '.join(found)}: a tensor is in the place of a parameter, and what is solved has its "
        "numbers. torch.func.functional_call leaves those that it was given in a Module that is in "
        "two places of another, such as self.field = f beside self.solver = pnode.Solver(f): hold "
        "it once (f is solver.rhs), and put the parameters back",
        RuntimeWarning, stacklevel=2,
    )  # fmt: skip


_WALK = ("parameters", "named_parameters", "named_modules", "_named_members")


@lru_cache(maxsize=256)
def _walks_as_usual(kind: Any) -> bool:
    """Whether a class of Modules finds its parameters as all do."""
    usual = torch.nn.Module
    scripted = issubclass(kind, torch.jit.ScriptModule)
    return not scripted and all(getattr(kind, name) is getattr(usual, name) for name in _WALK)


def _version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written into; tensors of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


def _default_device() -> torch.device:
    """Return where tensors are made; ``torch.get_default_device`` takes ten times as long."""
    if not torch._C._len_torch_function_stack() and torch._C._get_default_device() == "cpu":
        return _CPU
    return torch.empty(0).device


def owner(function: Any) -> Any:
    """Return the object that a bound method belongs to, or the function itself."""
    return getattr(function, "__self__", function)


def _autocast(kind: str) -> tuple[bool, torch.dtype, bool]:
    return (
        torch.is_autocast_enabled(kind),
        torch.get_autocast_dtype(kind),
        torch.is_autocast_cache_enabled(),
    )

"""What a vector field sees besides its arguments, as it was in the forward sweep.

A backward sweep runs when the user asks for it, perhaps outside of an ``autocast``, with another
default dtype or after ``model.eval()``. f is evaluated there as it was forwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

__all__ = ["Surroundings", "modules_within", "owner"]


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
    """

    def __init__(self, functions: Iterable[Any], device: torch.device) -> None:
        self._kinds = tuple(dict.fromkeys(("cpu", device.type)))
        self._autocast = {kind: _autocast(kind) for kind in self._kinds}
        self._dtype = torch.get_default_dtype()
        self._device = _default_device()
        modules = modules_within(map(owner, functions))
        # Weakly: see pnode.held.
        self._modules = [(weakref.ref(module), module.training) for module in modules]
        self._tensors = [
            (weakref.ref(module), name, tensor, _version(tensor))
            for module in modules
            for found in (module._parameters, module._buffers)
            for name, tensor in found.items()
            if tensor is not None
        ]

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Let f see what it saw when this was taken down."""
        alive = [(module(), flag) for module, flag in self._modules]
        changed = [
            (module, flag) for module, flag in alive
            if module is not None and module.training != flag
        ]  # fmt: skip
        replaced = self._replaced()
        dtype = torch.get_default_dtype()
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
                torch.set_default_dtype(self._dtype)
                for module, flag in changed:
                    module.training = flag
                for place, name, tensor, _ in replaced:
                    place[name] = tensor
                yield
            finally:
                for place, name, _, now in replaced:
                    place[name] = now
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
    """Return the functions that are Modules, and all Modules inside of them, each once."""
    found: dict[int, torch.nn.Module] = {}
    pending = [function for function in functions if isinstance(function, torch.nn.Module)]
    while pending:
        module = pending.pop()
        if id(module) not in found:
            found[id(module)] = module
            pending.extend(part for part in module._modules.values() if part is not None)
    return list(found.values())


def _version(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written into; tensors of inference mode do not count."""
    return -1 if tensor.is_inference() else tensor._version


def _default_device() -> torch.device:
    """Return where tensors are made; ``torch.get_default_device`` takes ten times as long."""
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

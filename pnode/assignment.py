"""What of a solver may be assigned to after it was made, so that nothing is without effect."""

from __future__ import annotations

from typing import Any

import torch

from pnode.configuration import PlainOptions
from pnode.errors import ConfigurationError
from pnode.sweeping.event_functions import Events

__all__ = ["Configured"]

#: Looked at in every solve; the last two may be given up.
_REPLACED = ("rhs", "implicit", "explicit", "residual", "mass", "cost", "event_fn")
#: Looked at once, when a solver is made.
_FIXED = {
    "consistent_start", "params", "method", "steps", "linear_algebra", "petsc_options",
    "petsc_setup", "checkpointing", "comm", "layout", "device_state", "compile", "gradient",
    "output", *PlainOptions.__annotations__,
} - set(_REPLACED)  # fmt: skip


class Configured(torch.nn.Module):
    """A Module whose problem may be replaced by one of the same form, and whose options stay."""

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign, and refuse what would have no effect.

        Raises
        ------
        ConfigurationError
            For an option, a function that was not given at first, or none in the place of one.
        """
        if name in _FIXED:
            raise ConfigurationError(
                f"solver.{name} = {value!r}: options are taken when a solver is made, and this one "
                f"goes on with those: make another with pnode.Solver(..., {name}=...)"
            )
        if name in _REPLACED:
            if "_engine" in vars(self):
                self._check_replaced(name, value)
            if not isinstance(value, torch.nn.Module):
                self._modules.pop(name, None)
            if name == "event_fn":
                self._event_modules = Events.modules(value)
        super().__setattr__(name, value)

    def _check_replaced(self, name: str, value: Any) -> None:
        if name == "event_fn" and value is not None:
            Events.of(value)
        elif value is not None and name != "mass" and not callable(value):
            raise ConfigurationError(f"solver.{name} = {value!r}: give a callable")
        if getattr(self, name) is None and value is not None:
            why = f"the solver was made without {name}="
        elif getattr(self, name) is not None and value is None and name in _REPLACED[:-2]:
            why = f"the solver was made with {name}="
        else:
            return
        raise ConfigurationError(
            f"solver.{name} = {value!r}: {why}, and what is solved stays of that form: make "
            "another with pnode.Solver(...)"
        )

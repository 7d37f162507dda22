"""PETSc start-up and options: one unique prefix per solver, and the command line wins."""

from __future__ import annotations

import os
import re
import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import mpi4py.MPI  # noqa: F401  (loads the right libmpi, so it comes before petsc4py)
import petsctools

from pnode.errors import ConfigurationError

__all__ = [
    "PETSc", "SolverOptions", "log_event", "log_stage", "next_prefix", "petsc_arguments",
    "petsc_reason",
]  # fmt: skip

MINIMUM_PETSC = ">=3.22"
PREFIX = "pnode_"
ODEINT_PREFIX = "pnode_odeint_"
# Options that PETSc would take in, to no effect or to a wrong one, since pnode drives the steps.
_OURS = {
    "ts_max_time": "the last output time is the end",
    "ts_max_steps": "use max_steps=",
    "ts_exact_final_time": "every output time is hit exactly",
    "ts_dt": "use step_size= or first_step=",
    "ts_time_step": "use step_size= or first_step=",
    "ts_init_time": "the first output time is the start",
    "snes_mf": "use jacobian='matrix-free'",
    "snes_mf_operator": "use jacobian='matrix-free'",
    "snes_fd": "Jacobians come from autograd; use jacobian='dense'",
    "snes_fd_color": "Jacobians come from autograd; use jacobian='dense'",
}


def petsc_arguments(argv: list[str]) -> list[str]:
    """Pick PETSc's options from a command line.

    PETSc writes its options with one dash and a word, ``-log_view``. What begins with two dashes,
    is a single letter, or asks for help belongs to the program that imports pnode: PETSc would
    act on it or complain that nobody used it.
    """
    # The program's name comes first; python -c leaves an option there.
    chosen = [argv[0] if argv and not argv[0].startswith("-") else "python"]
    taking = False
    for argument in argv[1:]:
        if argument.startswith("-") and not _is_number(argument):
            name = argument.lstrip("-")
            taking = (
                not argument.startswith("--") and len(name) > 1 and name not in ("help", "version")
            )
        if taking:
            chosen.append(argument)
    return chosen


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _initialise() -> Any:
    """Start PETSc with the command line (unless the user has done so) and check its build."""
    arguments = petsc_arguments(sys.argv)
    try:
        petsc = petsctools.init(arguments, version_spec=MINIMUM_PETSC)
    except petsctools.InvalidEnvironmentException as mismatch:
        warnings.warn(f"{mismatch}; the PETSc that petsc4py was built with is used", stacklevel=2)
        saved = {name: os.environ.pop(name, None) for name in ("PETSC_DIR", "PETSC_ARCH")}
        try:
            petsc = petsctools.init(arguments, version_spec=MINIMUM_PETSC)
        finally:
            os.environ.update({name: value for name, value in saved.items() if value is not None})
    if petsc.ScalarType is not petsc.RealType:
        raise ImportError(
            "pnode needs a PETSc with real scalars, and this one has complex scalars: install "
            "one configured with --with-scalar-type=real (conda: petsc=*=real*)"
        )
    return petsc


PETSc = _initialise()
_numbers = count()
_stages: dict[str, Any] = {}
_events: dict[str, Any] = {}


def next_prefix() -> str:
    """Return the options prefix of a new solver: ``pnode_0_``, ``pnode_1_``..."""
    return f"{PREFIX}{next(_numbers)}_"


class SolverOptions:
    """PETSc options of one solver, kept out of every other solver.

    Later entries win: pnode's defaults, the dictionary in the code, ``-pnode_<option>`` on the
    command line (all solvers), ``-pnode_<number>_<option>`` (this solver only).

    Parameters
    ----------
    prefix : str
        The solver's prefix, from :func:`next_prefix`.
    petsc_options : mapping of str to object, optional
        Options without the leading dash and without prefix.
    defaults : mapping of str to object, optional
        Values for options that nobody sets.
    """

    def __init__(
        self,
        prefix: str,
        petsc_options: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        self.given = check_petsc_options(petsc_options)
        self.prefix = prefix
        everyone = _options_for_everyone()
        self._manager = petsctools.OptionsManager(
            {**(defaults or {}), **self.given, **everyone}, options_prefix=self.prefix
        )
        for name in sorted(set(self.values) & set(_OURS)):
            raise ConfigurationError(f"the PETSc option {name!r} is not for pnode: {_OURS[name]}")
        self._unused_reported = False
        self._swept: weakref.WeakSet[Any] = weakref.WeakSet()
        self._sweeping: weakref.WeakKeyDictionary[Any, ExitStack] = weakref.WeakKeyDictionary()

    @property
    def values(self) -> dict[str, Any]:
        """All options in force, without the prefix."""
        return dict(self._manager.parameters)

    def take(self, name: str) -> Any:
        """Return an option that pnode acts on itself, None if nobody has set it."""
        if name in self.given:
            self._manager._used_options.add(name)
        return self.values.get(name)

    def apply(self, petsc_object: Any) -> None:
        """Set the prefix of a PETSc object and let it read its options. Collective.

        Raises
        ------
        ConfigurationError
            If PETSc refuses a value.
        """
        petsc_object.setOptionsPrefix(self.prefix)
        with self.inserted(), self._refusing():
            petsc_object.setFromOptions()

    def set_up(self, petsc_object: Any) -> None:
        """Set a PETSc object up under the options. Collective.

        Raises
        ------
        ConfigurationError
            If PETSc refuses a combination.
        """
        with self.inserted(), self._refusing():
            petsc_object.setUp()

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except PETSc.Error as error:
            reason, values = petsc_reason(error), self.values
            # PETSc tells the value that it does not like, and not always the option.
            said = re.split(r"[\s:,;'\"()]+", reason)
            guilty = {name: x for name, x in values.items() if str(x) in said or name in said}
            given = {name: values[name] for name in self.given if name in values}
            raise ConfigurationError(
                f"{reason}: PETSc refuses one of the options {guilty or given or values}"
            ) from error

    @contextmanager
    def inserted(self) -> Iterator[None]:
        """While active, the options stand in PETSc's database."""
        with self._manager.inserted_options():
            yield

    def begin_sweep(self, owner: Any) -> None:
        """Insert the options for the first sweep of ``owner``, when inner solvers read theirs."""
        if owner not in self._swept:
            self._swept.add(owner)
            stack = ExitStack()
            stack.enter_context(self.inserted())
            self._sweeping[owner] = stack

    def end_sweep(self, owner: Any) -> None:
        """Take the options out again."""
        stack = self._sweeping.pop(owner, None)
        if stack is not None:
            stack.close()

    def warn_unused(self) -> None:
        """Warn once about options of the dictionary that nothing has read."""
        if self._unused_reported or not self.given:
            return
        self._unused_reported = True
        for name in sorted(set(self.given) - self._manager._used_options):
            warnings.warn(
                f"petsc_options[{name!r}] was not used: check its spelling, and that this "
                "method has such a part",
                stacklevel=4,
            )


def petsc_reason(error: Any) -> str:
    """Return what a PETSc error says, without the stack of its functions."""
    lines = [re.sub(r"^\[\d+\] *", "", line).strip() for line in str(error).splitlines()]
    said = [line for line in lines[1:] if line and not re.match(r"\w+\(\) at ", line)]
    return ". ".join(line.rstrip(".") for line in reversed(said)) or " ".join(lines)


def _options_for_everyone() -> dict[str, Any]:
    """Return the options ``-pnode_<option>`` of the command line, without the prefix."""
    options = PETSc.Options()
    database = options.getAll()
    everyone = {}
    for option in petsctools.get_commandline_options():
        name = option.removeprefix(PREFIX)
        if option.startswith(ODEINT_PREFIX):
            continue
        if option.startswith(PREFIX) and name and not name[0].isdigit():
            everyone[name] = database.get(option, "")
            # PETSc would complain that nobody used it: it is used under each solver's prefix.
            options.used(option) or options.getString(option, "")
    return everyone


def check_petsc_options(petsc_options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Validate a dictionary of PETSc options and flatten nested ones."""
    if petsc_options is None:
        return {}
    if not isinstance(petsc_options, Mapping):
        raise ConfigurationError(
            f"petsc_options is {petsc_options!r}: give a dictionary such as {{'ksp_type': 'gmres'}}"
        )
    for name in petsc_options:
        if not isinstance(name, str) or not name or name.startswith("-") or " " in name:
            raise ConfigurationError(
                f"petsc_options has the key {name!r}: write option names without the leading "
                "dash and without a prefix, as in {'ksp_type': 'gmres'}"
            )
    return petsctools.flatten_parameters(dict(petsc_options))


def log_stage(name: str) -> Any:
    """Return PETSc's log stage ``name``, registered on first use."""
    if name not in _stages:
        _stages[name] = PETSc.Log.Stage(name)
    return _stages[name]


def log_event(name: str) -> Any:
    """Return PETSc's log event ``name``, registered on first use."""
    if name not in _events:
        _events[name] = PETSc.Log.Event(name)
    return _events[name]

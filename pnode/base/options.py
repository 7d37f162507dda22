"""PETSc start-up and options: one unique prefix per solver, and the command line wins."""

from __future__ import annotations

import atexit
import os
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

import mpi4py.MPI
import petsctools

from pnode.base import option_names, viewers
from pnode.base.errors import ConfigurationError
from pnode.base.signals import leave_signals

__all__ = [
    "OWN_PREFIX", "PETSc", "SolverOptions", "failure_reason", "log_event", "log_stage",
    "next_prefix", "petsc_arguments",
]  # fmt: skip

MINIMUM_PETSC = ">=3.22"
PREFIX = "pnode_"
ODEINT_PREFIX = "pnode_odeint_"
#: Of PETSc objects that are no solver of the user's: they read none of the user's options.
OWN_PREFIX = "pnode_own_"
_SOLVER = re.compile(r"pnode_(\d+|odeint)_")
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
    arguments = leave_signals(petsc_arguments(sys.argv))
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


PETSc: Any = _initialise()
_numbers = count()
_used_by_someone: set[str] = set()
_in_force: list[list[str]] = []  # what solvers have inserted
_reported: set[str] = set()
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
    forward : bool
        Whether they are for a forward sweep, whose steps monitors may look at.
    setup : callable, optional
        The user's ``petsc_setup``.
    """

    def __init__(
        self,
        prefix: str,
        petsc_options: Mapping[str, Any] | None = None,
        defaults: Mapping[str, Any] | None = None,
        forward: bool = True,
        setup: Callable[[Any], Any] | None = None,
    ) -> None:
        self.forward, self.setup = forward, setup
        self.given = check_petsc_options(petsc_options)
        self.prefix = prefix
        everyone = {} if prefix == OWN_PREFIX else _options_for_everyone()
        with _set_by_users():
            self._manager = petsctools.OptionsManager(
                {**(defaults or {}), **self.given, **everyone}, options_prefix=self.prefix
            )
        for name, value in self.values.items():
            reason = _OURS.get(name) or viewers.refusal(name, value)
            if reason is not None:
                raise ConfigurationError(f"the PETSc option {name!r} is not for pnode: {reason}")
        self._everyone, self._original = frozenset(everyone), self.values
        self._manager.parameters.update(viewers.append_to_files(self.values))
        # What stands in PETSc's database all the time is another while these are in force: options
        # of this solver alone, and those for everyone, as PETSc looks for -pnode_<option> where it
        # finds no -pnode_0_<option>.
        numbered = petsctools.get_commandline_options()
        self._hidden: dict[str, Any] = {}
        if not forward:
            for name in filter(viewers.watches_steps, self._original):
                del self._manager.parameters[name]
                self._manager.to_delete.discard(name)
                if self._full(name) in numbered:
                    self._hidden[self._full(name)] = self._original[name]
                if name in everyone:
                    self._hidden[PREFIX + name] = everyone[name]
        self._changed = {
            self._full(name): self._original[name]
            for name, value in self.values.items()
            if self._full(name) in numbered and self._original[name] != value
        }
        self._unused_reported = not forward  # the forward sweep's tell
        self._swept: weakref.WeakSet[Any] = weakref.WeakSet()
        self._sweeping: weakref.WeakKeyDictionary[Any, ExitStack] = weakref.WeakKeyDictionary()

    def _full(self, name: str) -> str:
        return self.prefix + name

    @property
    def values(self) -> dict[str, Any]:
        """All options in force, without the prefix."""
        return dict(self._manager.parameters)

    def take(self, name: str) -> Any:
        """Return an option that pnode acts on itself, None if nobody has set it."""
        if name in self._manager.to_delete:
            self._manager._used_options.add(name)
            _used_by_someone.update(self._everyone & {name})
        elif name in self.values:
            _mark_used(self._full(name))
        return self.values.get(name)

    def apply(self, petsc_object: Any) -> None:
        """Set the prefix of a PETSc object and let it read its options. Collective.

        Raises
        ------
        ConfigurationError
            If PETSc refuses a value.
        """
        petsc_object.setOptionsPrefix(self.prefix)
        if petsc_object.getComm().rank == 0:
            viewers.empty_files(self._original)
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
            if "ts_view" in self.values:  # PETSc's TSSolve would show it
                petsc_object.viewFromOptions("-ts_view")

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except PETSc.Error as error:
            raise ConfigurationError(
                f"PETSc refuses an option: {failure_reason(error)}; of {self._original}"
            ) from error

    @contextmanager
    def inserted(self) -> Iterator[None]:
        """While active, the options stand in PETSc's database."""
        database = self._manager.options_object
        own = [*map(self._full, self._manager.to_delete)]
        with self._manager.inserted_options():
            _in_force.append(own)
            for option in self._hidden:
                del database[option]
            try:
                yield
            finally:
                _in_force.remove(own)
                _used_by_someone.update(
                    name for name in self._everyone if database.used(self._full(name))
                )
                for option, value in (self._hidden | self._changed).items():
                    used = option in self._hidden or database.used(option)
                    database[option] = value
                    if used:
                        _mark_used(option)

    def begin_sweep(self, owner: Any) -> None:
        """Insert the options for the first sweep of ``owner``, when inner solvers read theirs."""
        if owner not in self._swept:
            self._swept.add(owner)
            self._sweeping[owner] = stack = ExitStack()
            stack.enter_context(self.inserted())

    def end_sweep(self, owner: Any) -> None:
        """Take the options out again."""
        stack = self._sweeping.pop(owner, None)
        if stack is not None:
            stack.close()

    def warn_unused(self) -> None:
        """Warn once about options that nothing has read in a sweep.

        Of the dictionary: all of them. Of the command line: those that PETSc does not have; what
        no solver has read is told at the end of the process.
        """
        if self._unused_reported:
            return
        self._unused_reported = True
        for name in sorted(set(self.given) - self._manager._used_options - self._everyone):
            if self._full(name) in petsctools.get_commandline_options():
                continue
            hint = "" if option_names.is_known(name, PETSc) else option_names.nearest(name, PETSc)
            hint = hint or ": check its spelling, and that this method has such a part"
            warnings.warn(f"petsc_options[{name!r}] was not used{hint}", stacklevel=4)
        _warn_misspelt(self.prefix)


@contextmanager
def _set_by_users() -> Iterator[None]:
    """Take what solvers have inserted out of PETSc's database: it is of no command line."""
    database = PETSc.Options()
    inserted = {k: v for k, v in database.getAll().items() if any(k in own for own in _in_force)}
    for option in inserted:
        del database[option]
    try:
        yield
    finally:
        for option, value in inserted.items():
            database[option] = value


def _options_for_everyone() -> dict[str, Any]:
    """Return the options ``-pnode_<option>`` of the command line, without the prefix."""
    everyone = {}
    for option, value in PETSc.Options().getAll().items():
        name = option.removeprefix(PREFIX)
        if option.startswith((ODEINT_PREFIX, OWN_PREFIX)):
            continue
        if option.startswith(PREFIX) and name and not name[0].isdigit():
            everyone[name] = value
            # PETSc would complain that nobody used it: it is used under each solver's prefix.
            _mark_used(option)
    return everyone


def _mark_used(option: str) -> None:
    """Let PETSc know that an option has been read."""
    options = PETSc.Options()
    options.used(option) or options.getString(option, "")


def _unused(prefix: str | None) -> Iterator[tuple[str, str]]:
    """Return the command line's options for pnode that nothing has read, with the bare names.

    Those for one solver belong to the prefix given; all of them, if there is none.
    """
    options = PETSc.Options()
    for option in sorted(petsctools.get_commandline_options()):
        if option in _reported or not re.match(r"pnode[_\d]", option):
            continue
        own = _SOLVER.match(option)
        name = option[own.end() :] if own else option.removeprefix(PREFIX)
        if own:
            if prefix in (None, own[0]) and not options.used(option):
                yield option, name
        elif name not in _used_by_someone:
            yield option, name


def _warn_misspelt(prefix: str | None) -> None:
    """Warn once, on one rank, about options of the command line that PETSc does not have."""
    for option, name in _unused(prefix):
        if option_names.is_known(name, PETSc):
            continue
        _reported.add(option)
        _mark_used(option)  # or PETSc would tell it again
        if mpi4py.MPI.COMM_WORLD.rank == 0:
            warnings.warn(
                f"the option -{option} was not used{option_names.nearest(name, PETSc)}",
                stacklevel=5,
            )


@atexit.register
def _warn_unused() -> None:
    """Warn at the end, on one rank, about options of the command line that no solver has read."""
    if PETSc.Sys.isFinalized():
        return
    _warn_misspelt(None)
    unused = [f"-{option}" for option, _ in _unused(None)]
    for option in unused:
        _mark_used(option[1:])
    if unused and mpi4py.MPI.COMM_WORLD.rank == 0:
        warnings.warn(
            f"no solver has used {', '.join(unused)}: check the number of the solver, and that its "
            "method has such a part",
            stacklevel=2,
        )


def failure_reason(error: Any) -> str:
    """Return what PETSc says went wrong, without its stack."""
    lines = [re.sub(r"^\[\d+\] ", "", line) for line in str(error).splitlines()]
    said = [line for line in lines if line and not re.search(r"\(\) at |^error code", line)]
    return ", ".join(said) or " ".join(lines)


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

"""A training that can be interrupted: saved, resumed, stopped early, its gradients clipped.

It stays among the examples: to train is no business of a package of solvers, and who trains in
earnest has a framework for it. Copy it, if you have none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mpi4py import MPI
from tqdm import tqdm

import pnode

FINAL_RATE = 0.01  # share of the first learning rate
SAVE_EVERY = 10.0  # seconds


class UsageError(Exception):
    """An option or a file cannot be used; the message says why."""


class GaveUp(Exception):
    """Too many solves failed, the last one with the cause of this; ``training`` is what was."""

    def __init__(self, training: Training) -> None:
        super().__init__("too many solves failed")
        self.training = training


class Interrupted(Exception):
    """A signal came during training; what was learned is saved."""

    def __init__(self, number: int, iteration: int) -> None:
        super().__init__(f"{signal.Signals(number).name} after iteration {iteration}")
        self.code = 128 + number


@dataclass
class Training:
    """How a training went.

    Attributes
    ----------
    losses : list of float
        One per iteration, before the update; NaN where a solve failed.
    norms : list of float
        Of the gradients likewise, before they are clipped, if they are.
    validations : list of float
        What ``validate`` returned, every so many iterations.
    best, best_at : float, int
        The smallest of them (or of the losses, with ``recover``), and which it is.
    recoveries : int
        How often training went back to the best weights.
    stopped_early, finished : bool
        Whether patience ended it; whether it came to its end.
    seconds, cpu_seconds : float
        Of all iterations, those before an interruption included.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    validations: list[float] = field(default_factory=list)
    best: float = math.inf
    best_at: int = -1
    recoveries: int = 0
    stopped_early: bool = False
    finished: bool = False
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def validated(self, value: float, patience: int | None, keep: Callable[[], None]) -> None:
        """Note a validation: keep the weights if they are the best, stop if none was for long."""
        self.validations.append(value)
        if value < self.best:
            self.best, self.best_at = value, len(self.validations) - 1
            keep()
        elif patience is not None:
            since = len(self.validations) - 1 - self.best_at
            self.stopped_early = since >= patience


class Checkpoint:
    """State of a training in a file: model, optimizer, schedule, generators, what was found."""

    def __init__(
        self, options: argparse.Namespace, label: str, parts: dict[str, Any],
        weights: dict[str, torch.Tensor], generator: torch.Generator | None, comm: MPI.Intracomm,
    ) -> None:  # fmt: skip
        self.path: Path = options.output / f"{options.name}-{label or 'training'}.pt"
        self.parts, self.weights, self.comm = parts, weights, comm
        self.generators = [torch.default_generator, *([generator] if generator else [])]
        self.best = {name: tensor.detach().clone() for name, tensor in weights.items()}
        self.facts = {"options": json.dumps(options.settings), "version": pnode.__version__}

    def keep_best(self) -> None:
        """Copy the weights as they are."""
        for name, tensor in self.weights.items():
            self.best[name].copy_(tensor.detach())

    @torch.no_grad()
    def restore(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put weights back."""
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])

    def save(self, training: Training) -> None:
        """Replace the file: an interruption leaves the old one or the new one. Collective."""
        states = self.comm.gather([generator.get_state() for generator in self.generators])
        if states is None:
            return
        content = {
            **self.facts, "training": vars(training), "weights": self.weights, "best": self.best,
            "generators": states,
            "parts": {name: part.state_dict() for name, part in self.parts.items()},
        }  # fmt: skip
        unfinished = self.path.with_suffix(".part")
        torch.save(content, unfinished)
        os.replace(unfinished, self.path)

    def load(self) -> Training:
        """Go on with what the file holds, or begin where there is none."""
        if not self.path.exists():
            return Training()
        try:
            content = torch.load(self.path, weights_only=True)
            facts = {name: content[name] for name in self.facts}
        except Exception as error:
            message = f"{self.path} is no saved training ({type(error).__name__}): remove it"
            raise UsageError(message) from error
        saved, now = ({**json.loads(each["options"]), **each} for each in (facts, self.facts))
        differing = [
            f'"{name}": {saved.get(name)!r}, not {now.get(name)!r}'
            for name in dict.fromkeys([*saved, *now])
            if name != "options" and saved.get(name) != now.get(name)
        ]
        if differing:
            raise UsageError(
                f"{self.path} was saved with {', '.join(differing)}: give the same options, or "
                "leave --resume out"
            )
        try:
            states = content["generators"]
            if len(states) != self.comm.size:
                raise UsageError(
                    f"{self.path} was saved by {len(states)} ranks, each with generators of its "
                    f"own, and these are {self.comm.size}: take as many, or leave --resume out"
                )
            self.restore(content["weights"])
            self.best = content["best"]
            for generator, state in zip(self.generators, states[self.comm.rank], strict=True):
                generator.set_state(state)
            for name, part in self.parts.items():
                part.load_state_dict(content["parts"][name])
            return Training(**content["training"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise UsageError(
                f"{self.path} was saved by another version of this example ({error}): remove it"
            ) from error


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT in a list instead of ending; a second one ends as ever."""
    seen: list[int] = []
    numbers = (signal.SIGTERM, signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        for each, handler in zip(numbers, before, strict=True):
            signal.signal(each, handler)

    before = [signal.getsignal(number) for number in numbers]
    try:
        for number in numbers:
            signal.signal(number, note)
    except ValueError:  # not in the main thread
        yield seen
        return
    try:
        yield seen
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def train(
    model: torch.nn.Module | Iterable[torch.Tensor],
    loss: Callable[[], torch.Tensor],
    options: argparse.Namespace,
    *,
    iterations: int | None = None,
    rate: float = 1e-2,
    label: str = "",
    optimizer: Callable[[list[torch.Tensor]], torch.optim.Optimizer] | None = None,
    constant: bool = False,
    schedule: Callable[[torch.optim.Optimizer], Any] | None = None,
    clip: float | None = None,
    recover: int = 0,
    validate: Callable[[], float] | None = None,
    every: int = 10,
    patience: int | None = None,
    generator: torch.Generator | None = None,
    comm: MPI.Intracomm = MPI.COMM_WORLD,
) -> Training:
    """Minimise a loss. Collective: all ranks make the same updates.

    Parameters
    ----------
    model
        A module, or the tensors to be learned.
    loss
        Returns the loss, a tensor without dimensions.
    options
        As of ``arguments``: name, output, resume, tensorboard, iterations.
    iterations
        Updates, ``options.iterations`` by default.
    rate, constant
        The learning rate; it falls along half a cosine, unless it is constant.
    schedule
        Makes another schedule for the learning rate.
    label
        Tells several trainings of an example apart.
    optimizer
        Makes the optimizer of the parameters; Adam by default.
    clip
        Longest gradient.
    recover
        How often a solve may fail, or loss or gradient be infinite: the weights with the smallest
        loss are put back and the learning rate is halved. They are those of the end, too.
    validate, every, patience
        What is evaluated every so many iterations. The best weights are kept and put back at the
        end; after ``patience`` evaluations without a better one, training stops.
    generator
        What minibatches are drawn with; each rank's is saved with the rest.

    Returns
    -------
    Training
        The losses, what was validated, and the time it took.

    Raises
    ------
    Interrupted
        After SIGTERM or SIGINT; what was learned is saved.
    GaveUp
        If more solves failed than ``recover`` allows for, or the first one did.
    UsageError
        If a saved training is not of these options.
    """
    parameters = list(model.parameters() if isinstance(model, torch.nn.Module) else model)
    make = optimizer or (lambda tensors: torch.optim.Adam(tensors, lr=rate))
    updates = make(parameters)
    iterations = options.iterations if iterations is None else iterations
    parts: dict[str, Any] = {"optimizer": updates}
    if schedule is not None:
        parts["schedule"] = schedule(updates)
    elif not constant:
        parts["schedule"] = torch.optim.lr_scheduler.CosineAnnealingLR(
            updates, iterations, eta_min=FINAL_RATE * rate
        )
    named = model.state_dict() if isinstance(model, torch.nn.Module) else None
    weights = named or {str(index): tensor for index, tensor in enumerate(parameters)}
    checkpoint = Checkpoint(options, label, parts, dict(weights), generator, comm)
    training = checkpoint.load() if options.resume else Training()
    if training.finished:
        return training

    def closure() -> float:
        updates.zero_grad()
        value = loss()
        value.backward()
        number = value.item()
        if clip is not None:
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
            if recover and not math.isfinite(number + norm):
                raise FloatingPointError(f"the loss is {number:.1e}, its gradient {norm:.1e} long")
            norms[:] = [norm]
        if recover and validate is None and number < training.best:
            training.best, training.best_at = number, len(training.losses)
            checkpoint.keep_best()
        return number

    def step() -> float:
        """Update; go back to the best weights if that fails."""
        norms[:] = [math.nan] * (clip is not None)
        try:
            return updates.step(closure)
        except (pnode.SolveError, FloatingPointError) as error:
            if not recover:
                raise
            training.recoveries += 1
            if training.recoveries > recover or training.best == math.inf:
                training.losses.append(math.nan)
                training.norms += norms
                checkpoint.restore(checkpoint.best)
                raise GaveUp(clock.add()) from error
        checkpoint.restore(checkpoint.best)
        updates.state.clear()
        for group in updates.param_groups:
            group["lr"] *= 0.5
        return math.nan

    def reschedule(value: float) -> None:
        """Move on in the schedule, which sees its own rates: without what recoveries have halved.

        Powers of two: the rates have the same bits again.
        """
        halved = 0.5**training.recoveries
        for group in updates.param_groups:
            group["lr"] /= halved
        schedule, plateau = parts["schedule"], torch.optim.lr_scheduler.ReduceLROnPlateau
        schedule.step(*([value] if isinstance(schedule, plateau) else []))
        for group in updates.param_groups:
            group["lr"] *= halved

    norms: list[float] = []
    clock = Clock(training)

    with signals() as seen, logs(options, label, comm.rank) as log:
        progress = tqdm(
            range(iterations), desc=label or "training", initial=len(training.losses),
            disable=True if comm.rank else None,
        )  # fmt: skip
        while len(training.losses) < iterations and not training.stopped_early:
            value = step()
            training.losses.append(value)
            training.norms += norms
            if "schedule" in parts:
                reschedule(value)
            done = len(training.losses)
            log("loss", value, done)
            if validate is not None and (done % every == 0 or done == iterations):
                training.validated(validate(), patience, checkpoint.keep_best)
                log("validation", training.validations[-1], done)
            progress.update()
            progress.set_postfix(loss=f"{value:.3e}", refresh=False)
            if comm.allreduce(len(seen)) if comm.size > 1 else seen:
                checkpoint.save(clock.add())
                progress.close()
                raise Interrupted(seen[0] if seen else signal.SIGTERM, done)
            if comm.bcast(clock.since_saved() > SAVE_EVERY):
                checkpoint.save(clock.add())
        progress.close()
    if validate is not None or recover:
        checkpoint.restore(checkpoint.best)
    training.finished = True
    checkpoint.save(clock.add())
    return training


class Clock:
    """Adds the time since the last time it did."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._begin, self._cpu = time.perf_counter(), time.process_time()

    def since_saved(self) -> float:
        """Return the seconds since the last addition."""
        return time.perf_counter() - self._begin

    def add(self) -> Training:
        """Add, and return what was added to."""
        now, cpu = time.perf_counter(), time.process_time()
        self._training.seconds += now - self._begin
        self._training.cpu_seconds += cpu - self._cpu
        self._begin, self._cpu = now, cpu
        return self._training


@contextmanager
def logs(
    options: argparse.Namespace, label: str, rank: int
) -> Iterator[Callable[[str, float, int], object]]:
    """Yield a function that logs to TensorBoard, or does nothing."""
    if rank or not options.tensorboard:
        yield lambda name, value, iteration: None
        return
    from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined, unused-ignore]

    folder = options.output / "tensorboard" / f"{options.name}-{label or 'training'}"
    with SummaryWriter(str(folder)) as writer:
        yield writer.add_scalar

"""A device that is none: tensors that say they are on cuda:0, with their values on the host.

torch and PETSc are those of the host. The simulation keeps apart what a GPU keeps apart: an
operation on a device tensor and a host tensor of one dimension or more is an error, values reach
the host only by a copy or as a single number, and both are counted. PETSc's vectors are host
vectors that are reached through DLPack.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from pnode.base import devices, vectors
from pnode.derivatives import autograd, continuous, stages
from pnode.layout import dm_layouts, ghost_layouts, grids
from pnode.problems import transfers
from pnode.sweeping import engine

DEVICE = torch.device("cuda", 0)
_FACTORIES = {
    torch.arange, torch.empty, torch.eye, torch.full, torch.ones, torch.rand, torch.randn,
    torch.scalar_tensor, torch.tensor, torch.zeros, torch.as_tensor,
}  # fmt: skip


class Counts:
    """What crossed between the simulated device and the host."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.to_host = self.to_device = self.numbers = 0


counts = Counts()


class OnDevice(torch.Tensor):
    """A tensor on the simulated device."""

    inner: torch.Tensor
    where = DEVICE

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> OnDevice:
        assert not isinstance(inner, OnDevice)
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device="cpu",
        )  # fmt: skip
        made.inner = inner.detach()
        return made

    @property
    def device(self) -> torch.device:
        return self.where

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def record_stream(self, stream: Any) -> None:
        stream.log.append((stream.name, "holds", tuple(self.shape)))

    def untyped_storage(self) -> Any:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        counts.numbers += 1
        return self.inner.tolist()

    def numpy(self, *arguments: Any, **keywords: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnDevice({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function is torch.ops.aten._local_scalar_dense.default:
            counts.numbers += 1
        if function is torch.ops.aten.copy_.default:
            target, source = args[0], args[1]
            counts.to_device += isinstance(target, cls) and not isinstance(source, cls)
            counts.to_host += isinstance(source, cls) and not isinstance(target, cls)
            bare(target).copy_(bare(source))
            return target

        def enter(value: Any) -> Any:
            if isinstance(value, torch.Tensor) and not isinstance(value, cls) and value.dim():
                raise RuntimeError(
                    f"{function}: expected all tensors to be on the same device, but found at "
                    "least two devices, cuda:0 and cpu"
                )
            return bare(value)

        def leave(value: Any) -> Any:
            return cls(value) if isinstance(value, torch.Tensor) else value

        result = function(*tree_map(enter, args), **tree_map(enter, kwargs or {}))
        if function._schema.name.endswith("_") and isinstance(args[0], cls):
            return args[0]
        if "out" in (kwargs or {}):
            return kwargs["out"]
        return tree_map(leave, result)


def bare(value: Any) -> Any:
    return value.inner if isinstance(value, OnDevice) else value


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, to_device: bool) -> torch.Tensor:
        ctx.was_there = isinstance(tensor, OnDevice)
        if to_device == ctx.was_there:
            return tensor.clone()
        counts.to_device += to_device
        counts.to_host += not to_device
        copied = bare(tensor).detach().clone()
        return OnDevice(copied) if to_device else copied

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _Copy.apply(gradient, ctx.was_there), None


def move(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy to the simulated device or the host; differentiable."""
    to_device = torch.device(device).type == "cuda"
    return tensor if isinstance(tensor, OnDevice) == to_device else _Copy.apply(tensor, to_device)


def on_device(tensor: torch.Tensor) -> torch.Tensor:
    """Return a leaf on the simulated device."""
    made = OnDevice(tensor.detach().clone())
    return made.requires_grad_(tensor.requires_grad)


def module_on_device(module: torch.nn.Module) -> torch.nn.Module:
    """Move a Module's parameters and buffers, as ``module.cuda()`` does."""
    for part in module.modules():
        for name, value in list(part._parameters.items()):
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(OnDevice(value.detach().clone()))
        for name, value in list(part._buffers.items()):
            part._buffers[name] = OnDevice(value.detach().clone())
    return module


class _Redirect(TorchFunctionMode):
    """Lets ``device="cuda:0"`` and ``.to("cuda:0")`` lead to the simulated device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = dict(kwargs or {})
        if function in _FACTORIES and _is_device(kwargs.get("device")):
            kwargs.pop("device")
            return OnDevice(function(*args, **kwargs))
        if function is torch.empty and kwargs.pop("pin_memory", False):
            return function(*args, **kwargs)
        if function is torch.autograd.grad and kwargs.get("is_grads_batched"):
            raise RuntimeError("vmap makes zeros where it likes: not simulated")
        if function is torch.Tensor.cpu:
            return move(args[0], torch.device("cpu"))
        if function is torch.Tensor.to:
            return _to(*args, **kwargs)
        return function(*args, **kwargs)


def _is_device(value: Any) -> bool:
    return value is not None and torch.device(value).type == "cuda"


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    device, rest = kwargs.pop("device", None), []
    for value in args:
        if isinstance(value, (str, torch.device)):
            device = value
        elif isinstance(value, torch.Tensor):
            device, kwargs["dtype"] = value.device, value.dtype
        elif value is not None:
            rest.append(value)
    moved = tensor if device is None else move(tensor, torch.device(device))
    if moved is not tensor:
        kwargs.pop("copy", None)
    kwargs.pop("non_blocking", None)
    return torch.Tensor.to(moved, *rest, **kwargs) if rest or kwargs else moved


class Stream:
    """A stream that keeps a log of what waited for what."""

    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and other.name == self.name

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "waits for", other.name))

    def wait_event(self, event: Event) -> None:
        self.log.append((self.name, "waits for", event.name))

    def record_event(self) -> Event:
        return Event(f"event on {self.name}", self.log)


class Event:
    """An event on a stream."""

    def __init__(self, name: str, log: list[Any]) -> None:
        self.name, self.log = name, log

    def synchronize(self) -> None:
        self.log.append(("host", "waits for", self.name))


class Streams:
    """torch.cuda's streams and current device, recorded."""

    def __init__(self, current: str = "default") -> None:
        self.log: list[Any] = []
        self.current = current

    def is_available(self) -> bool:
        return False

    @contextmanager
    def device(self, device: torch.device) -> Iterator[None]:
        self.log.append(("device", device))
        yield

    def _stream(self, name: str) -> Stream:
        return Stream(name, self.log)

    def Stream(self, device: torch.device) -> Stream:
        return self._stream("copies")

    def current_stream(self, device: torch.device) -> Stream:
        return self._stream(self.current)

    def default_stream(self, device: torch.device) -> Stream:
        return self._stream("default")

    def ExternalStream(self, address: int, device: torch.device) -> Stream:
        return self._stream(f"stream {address}")

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream.name
        self.log.append(("inside", stream.name))
        yield
        self.current = before


#: Host types behind the name of the device.
PLACE = devices.Place(DEVICE, "standard", "dense", "aij")


def _place_of(device: torch.device, vec_type: str | None = None) -> devices.Place:
    return PLACE if device.type == "cuda" else devices.HOST


@contextmanager
def simulated(petsc: bool = True, streams: Streams | None = None) -> Iterator[Counts]:
    """Have the simulated device; with ``petsc``, PETSc has vectors there."""
    counts.clear()
    with pytest.MonkeyPatch.context() as patch, _Redirect():
        _simulate(patch, petsc, streams or Streams())
        yield counts


def _redirected(function: Any) -> Any:
    def call(*arguments: Any) -> Any:
        with _Redirect():  # autograd does not take the mode along
            return function(*arguments)

    return call


def _simulate(patch: pytest.MonkeyPatch, petsc: bool, streams: Streams) -> None:
    patch.setattr(transfers, "move", move)
    patch.setattr(devices, "_cuda", streams)
    for function in (autograd.SolveFunction, continuous.ContinuousFunction):
        patch.setattr(function, "backward", staticmethod(_redirected(function.backward)))
    if petsc:
        from_dlpack = vectors.from_dlpack
        patch.setattr(vectors, "from_dlpack", lambda capsule: OnDevice(from_dlpack(capsule)))
        for module in (
            autograd, continuous, devices, dm_layouts, engine, ghost_layouts, grids, stages,
        ):  # fmt: skip
            patch.setattr(module, "place_of", _place_of)
        patch.setattr(devices, "petsc_stream", lambda: 0)
        patch.setattr(vectors, "_through_dlpack", set())

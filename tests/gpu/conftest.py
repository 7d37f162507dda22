"""Tests on a real device: skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pnode.base.devices import place_of
from pnode.errors import ConfigurationError

FOLDER = Path(__file__).resolve().parent


def pytest_collection_modifyitems(items):
    reason = None
    if not torch.cuda.is_available():
        reason = "torch sees no CUDA or HIP device"
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(params=["device", "host"])
def state(request):
    """Where the state is: on the device, if this PETSc has vectors there; or on the host."""
    if request.param == "device":
        petsc_device()
    return request.param


@pytest.fixture
def device_state():
    """A PETSc with vectors on the device."""
    petsc_device()


def petsc_device():
    try:
        place_of(torch.device("cuda", torch.cuda.current_device()))
    except ConfigurationError as error:
        pytest.skip(str(error))

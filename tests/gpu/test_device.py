"""The numerical tests of test_devices.py on a real device, and what only a device can show."""

from __future__ import annotations

import json

import pytest
import test_devices as host
import torch
from test_devices import CASES, FORMS, LAYOUTS, TIMES, Field, Pair, gradients, start
from torch.profiler import ProfilerActivity, profile

import pnode
from pnode.base import devices, vectors
from pnode.base.options import PETSc


def moved(tensor):
    return tensor.detach().cuda().requires_grad_(tensor.requires_grad)


def agree(ours, theirs, rtol=1e-9, atol=1e-11):
    for one, two in zip(ours, theirs, strict=True):
        assert one.device.type == "cuda"
        torch.testing.assert_close(one.cpu(), two, rtol=rtol, atol=atol)


def one_device(seed=0):
    torch.manual_seed(seed)
    return torch.device("cuda", torch.cuda.current_device())


# ---------------------------------------------------------------------- the numbers of the host


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_host(case, state):
    def make(field, **keywords):
        return pnode.Solver(field, **CASES[case], **keywords)

    _, expected = gradients(Field(), start(), make)
    found, values = gradients(
        Field().cuda(), moved(start()), lambda field: make(field, device_state=state)
    )
    # Adaptive steps are chosen by norms that are summed up in another order.
    agree(values, expected, *((1e-9, 1e-11) if "step_size" in CASES[case] else (1e-5, 1e-7)))
    assert (found.stats.copies > 0) == (state == "host")


@pytest.mark.parametrize("form", FORMS)
def test_problem_forms(form, state):
    _, expected = gradients(Field(), start(), FORMS[form])
    _, values = gradients(
        Field().cuda(), moved(start()), lambda field: FORMS[form](field, device_state=state)
    )
    agree(values, expected)


@pytest.mark.parametrize("method", ["velocity_verlet", "ruth3"])
def test_pairs_and_symplectic_methods(method, state):
    def make(field, **keywords):
        return pnode.Solver(field, method=method, step_size=0.1, **keywords)

    _, expected = gradients(Pair(), (start(), start()), make)
    y0 = (moved(start()), moved(start()))
    _, values = gradients(Pair().cuda(), y0, lambda field: make(field, device_state=state))
    agree(values, expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ghost_cells(layout, state):
    def field(t, y):
        inner = y[1:-1] if layout == "grid" else y[:12]
        return (y[2:] - 2 * inner + y[:-2] if layout == "grid" else y[12:].sum() - inner) * 3.0

    def run(y0):
        solver = pnode.Solver(
            field, layout=LAYOUTS[layout](), method="rk4", step_size=0.05, device_state=state
        )
        solution = solver(y0, TIMES)
        solution.ys.square().sum().backward()
        return solution.ys.detach(), y0.grad

    y0 = torch.linspace(0.0, 1.0, 12, dtype=torch.float64).sin()
    agree(run(y0.cuda().requires_grad_()), run(y0.clone().requires_grad_()))


def test_events(state):
    def run(y0, field, **keywords):
        solver = pnode.Solver(
            field, method="dopri5", event_fn=lambda t, y: y.square().sum() - 15.0, **keywords
        )
        solution = solver(y0, torch.tensor([0.0, 50.0], dtype=torch.float64))
        solution.event_time.backward()
        assert solution.reason == "event"
        return solution.ys.detach(), y0.grad

    expected = run(start(), Field())
    agree(run(moved(start()), Field().cuda(), device_state=state), expected, 1e-5, 1e-7)


def test_float32_fields(state):
    def run(y0, field, **keywords):
        solver = pnode.Solver(field, method="rk4", step_size=0.1, **keywords)
        solver(y0, TIMES).ys.square().sum().backward()
        return [y0.grad, *(parameter.grad for parameter in field.parameters())]

    y0 = start().detach().float().requires_grad_()
    expected = run(y0, Field().float())
    y1 = y0.detach().cuda().requires_grad_()
    agree(run(y1, Field().float().cuda(), device_state=state), expected, 1e-4, 1e-5)


def test_a_module_that_draws_random_numbers_is_refused(state):
    field = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Dropout()).double().cuda()
    solver = pnode.Solver(
        lambda t, y: field(y), params=field.parameters(), method="rk4", step_size=0.1,
        device_state=state,
    )  # fmt: skip
    with pytest.raises(pnode.VectorFieldError, match="random numbers"):
        solver(moved(start()), TIMES)


@pytest.mark.parametrize("case", ["rk4", "cn", "bdf"])
def test_offload(case, device_state, tmp_path):
    keywords = {"rk4": {"step_size": 0.01}, "cn": {"step_size": 0.01}, "bdf": {}}[case]
    state_bytes = 8 * 4096 * 3

    def run(**checkpointing):
        torch.manual_seed(0)
        y0 = torch.randn(4096, 3, dtype=torch.float64, device="cuda", requires_grad=True)
        field = Field().cuda()
        solver = pnode.Solver(
            field, method=case, jacobian="matrix-free", **keywords,
            checkpointing=pnode.Checkpointing(**checkpointing),
        )  # fmt: skip
        solution = solver(y0, TIMES)
        solution.ys.square().sum().backward()
        return solution.stats, [y0.grad, *(parameter.grad for parameter in field.parameters())]

    _, expected = run()
    for limits in (
        {"device_memory": 12 * state_bytes},
        {"device_memory": 12 * state_bytes, "memory": 12 * state_bytes, "disk": tmp_path},
    ):
        stats, found = run(**limits)
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)
        assert 0 < stats.device_bytes <= 12 * state_bytes
        assert stats.ram_bytes > 0


# --------------------------------------------------------------------- what only a device shows


def test_vectors_share_device_memory(device_state):
    device = one_device()
    vector = vectors.create(PETSc.COMM_SELF, 100, devices.place_of(device))
    vectors.copy_in(vector, torch.arange(100.0, device=device))
    view = vectors.view(vector)
    assert view.device == device
    vector.scale(2.0)
    torch.cuda.synchronize()
    assert view[50].item() == 100.0
    assert vector.norm(PETSc.NormType.INFINITY) == 198.0
    vectors.fill(vector, 3.0)
    torch.cuda.synchronize()
    assert vector.norm(PETSc.NormType.INFINITY) == 3.0


def test_dense_matrices_share_device_memory(device_state):
    device = one_device()
    place = devices.place_of(device)
    if place.dense_type is None:
        pytest.skip(f"PETSc's {place.vec_type} vectors go with no dense matrix")
    matrix = vectors.create_dense(PETSc.COMM_SELF, 3, place)
    entries = torch.arange(9.0, dtype=torch.float64, device=device).view(3, 3)
    vectors.matrix_view(matrix, place).copy_(entries)
    torch.cuda.synchronize()
    matrix.assemble()
    assert matrix.getValue(0, 2) == 2.0


def device_copies(solver, y0, tmp_path, backward):
    """Count copies between device and host by anybody, PETSc included."""
    solver(y0, TIMES[[0, -1]])  # set-up
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        solution = solver(y0, TIMES[[0, -1]])
        if backward:
            solution.ys.square().sum().backward()
        torch.cuda.synchronize()
    path = tmp_path / "trace.json"
    recorded.export_chrome_trace(str(path))
    events = json.loads(path.read_text())["traceEvents"]
    return sum("DtoH" in e.get("name", "") or "HtoD" in e.get("name", "") for e in events)


@pytest.mark.parametrize("backward", [False, True])
def test_fixed_explicit_steps_copy_no_states(backward, device_state, tmp_path):
    """However many: one number per step and per stage at most, which tells of time and norms."""
    torch.manual_seed(0)
    y0 = torch.randn(4096, 3, dtype=torch.float64, device="cuda", requires_grad=backward)
    field = Field().cuda()
    with torch.set_grad_enabled(backward):
        few, many = (
            device_copies(
                pnode.Solver(field, method="rk4", step_size=1.0 / n), y0, tmp_path, backward
            )
            for n in (10, 30)
        )
    stages = 4 * 20
    assert many - few <= (20 + stages) * (2 if backward else 1)


def test_a_stream_of_the_users_own(state):
    """The solve waits for what was begun on the user's stream, and the user for the solve."""

    def run():
        torch.manual_seed(0)
        y0 = torch.zeros(200000, 3, dtype=torch.float64, device="cuda")
        torch.cuda._sleep(50_000_000)
        y0.add_(0.5).requires_grad_()
        field = Field().cuda()
        solver = pnode.Solver(field, method="rk4", step_size=0.25, device_state=state)
        solution = solver(y0, TIMES)
        loss = solution.ys.square().sum()
        loss.backward()
        return [loss.detach(), y0.grad, *(parameter.grad for parameter in field.parameters())]

    expected = [value.cpu() for value in run()]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = [value.cpu() for value in run()]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=0.0)


def test_backward_in_autograds_thread(state):
    """A loss on the device runs its backward pass in a thread of torch's."""
    threads = set()

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, gradient):
            import threading

            threads.add(threading.current_thread().name)
            return gradient

    y0, field = moved(start()), Field().cuda()
    solver = pnode.Solver(field, method="cn", step_size=0.1, device_state=state)
    Watched.apply(solver(y0, TIMES).ys).sum().backward()
    assert threads
    assert y0.grad is not None


def test_a_second_solve_while_the_first_is_alive(state):
    field = Field().cuda()
    solver = pnode.Solver(field, method="dopri5", device_state=state)
    one, two = moved(start()), moved(start())
    first, second = solver(one, TIMES), solver(two, TIMES)
    second.ys.sum().backward()
    first.ys.sum().backward()
    torch.testing.assert_close(one.grad, two.grad)


def test_compiling_is_refused(state):
    solver = pnode.Solver(
        Field().cuda(), method="rk4", step_size=0.1, compile=True, device_state=state
    )
    with pytest.warns(UserWarning, match="y0 is on a device"), torch.no_grad():
        solver(moved(start()), TIMES)


def test_the_simulation_is_not_in_the_way():
    assert host.OnDevice.where.type == "cuda"
    assert vectors.from_dlpack is torch.utils.dlpack.from_dlpack

"""Everything that needs a GPU, in one command: the tests marked gpu, then a table of times.

    python benchmarks/gpu.py                      # in an environment that has pnode
    python benchmarks/gpu.py --wheels FOLDER      # from wheels alone, without a network

It stops within ``--budget`` seconds (450). What ran, what was skipped and why, and the times are
printed and written to ``results/gpu.json``. The exit status is 1 if a test failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
# The tests' part of the budget.
_TEST_PART = 0.65
_ROW = 8.0  # seconds after which a row is not repeated any more
#: Name, shape of y0, width of the network, keywords of the solver.
PROBLEMS = {
    "rk4, 64 x 64": ((64, 64), 128, {"method": "rk4", "step_size": 0.02}),
    "rk4, 4096 x 256": ((4096, 256), 512, {"method": "rk4", "step_size": 0.05}),
    "dopri5, 4096 x 64": ((4096, 64), 128, {"method": "dopri5", "rtol": 1e-6, "atol": 1e-8}),
    "cn, blocks, 1024 x 8": (
        (1024, 8), 32, {"method": "cn", "step_size": 0.05, "jacobian": "block"},
    ),
    "cn, matrix-free, 4096 x 64": (
        (4096, 64), 128, {"method": "cn", "step_size": 0.1, "jacobian": "matrix-free"},
    ),
    "cn, dense, 512": ((8, 64), 64, {"method": "cn", "step_size": 0.1, "jacobian": "dense"}),
}  # fmt: skip


def build_environment(wheels: Path) -> Path:
    """Make a fresh environment from wheels alone; return its Python."""
    folder = Path(tempfile.mkdtemp(prefix="pnode-gpu-"))
    # torch may be the system's: wheels win over it where they have one.
    venv.create(folder, with_pip=True, system_site_packages=True)
    python = folder / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-index", "--find-links"]
    install += [str(wheels.resolve())]
    needed = ["mpi4py", "petsc4py", "petsctools", "torch", "numpy", "scipy", "tqdm"]
    tools = ["pytest", "pytest-timeout"]
    subprocess.run([*install, *needed, *tools], check=True)
    return python


def run_tests(seconds: float) -> dict[str, Any]:
    """Run the tests marked gpu; return counts and the reasons of what was skipped."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-rs", "tests/gpu"]
    start = time.perf_counter()
    try:
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
        output, status = run.stdout + run.stderr, run.returncode
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b"").decode(errors="replace")
        status = -1
    counts = {
        name: int(number)
        for number, name in re.findall(r"(\d+) (passed|failed|skipped|error)", output)
    }
    return {
        "status": status,
        "finished": status >= 0,
        "seconds": round(time.perf_counter() - start, 1),
        "counts": counts,
        "skipped": sorted(set(re.findall(r"SKIPPED \[\d+\] [^:]+:(?:\d+:)? (.*)", output))),
        "tail": output[-4000:] if status else "",
    }


def ways(device: str) -> list[str]:
    """Return what can be compared here: where the state lives, and torchdiffeq."""
    import torch

    from pnode.base.devices import place_of
    from pnode.errors import ConfigurationError

    found = ["host"]
    try:
        place_of(torch.empty(0, device=device).device)
        found.insert(0, "device")
    except ConfigurationError as error:
        print(f"state on the device: left out, {error}", flush=True)
    try:
        import torchdiffeq  # noqa: F401

        found.append("torchdiffeq")
    except ImportError:
        print("torchdiffeq: left out, it is not installed", flush=True)
    return found


def measure(name: str, way: str, device: str, repeats: int = 5) -> dict[str, Any] | None:
    """Time a gradient: seconds forward and backward (medians), and what the ledger says."""
    import torch

    import pnode

    shape, width, keywords = PROBLEMS[name]
    torch.manual_seed(0)
    layers = torch.nn.Sequential(
        torch.nn.Linear(shape[1], width), torch.nn.Tanh(), torch.nn.Linear(width, shape[1])
    )
    field = layers.double().to(device)
    y0 = torch.randn(shape, dtype=torch.float64).to(device).requires_grad_()
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    stats = None

    def finish() -> float:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    if way == "torchdiffeq":
        import torchdiffeq

        if keywords["method"] == "cn":
            return None
        options = {"step_size": keywords["step_size"]} if "step_size" in keywords else {}
        tolerances = {k: keywords[k] for k in ("rtol", "atol") if k in keywords}

        def solve() -> Any:
            return torchdiffeq.odeint(
                lambda s, y: layers(y), y0, t.to(device), method=keywords["method"],
                options=options, **tolerances,
            )  # fmt: skip
    else:
        solver = pnode.Solver(
            lambda s, y: layers(y), params=field.parameters(), device_state=way, **keywords
        )

        def solve() -> Any:
            nonlocal stats
            solution = solver(y0, t)
            stats = solution.stats
            return solution.ys

    times: list[tuple[float, float]] = []
    begin = time.perf_counter()
    for _ in range(repeats + 1):
        if len(times) > 1 and time.perf_counter() - begin > _ROW:
            break
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        start = finish()
        loss = solve()[-1].square().sum()
        middle = finish()
        loss.backward()
        times.append((middle - start, finish() - middle))
    row: dict[str, Any] = {
        "problem": name,
        "way": way,
        "forward": statistics.median(forward for forward, _ in times[1:]),
        "backward": statistics.median(backward for _, backward in times[1:]),
    }
    if device.startswith("cuda"):
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    if stats is not None:
        row["steps"] = stats.steps
        row["copied_bytes"] = stats.copied_bytes + stats.backward.copied_bytes
    return row


def table(device: str, end: float) -> list[dict[str, Any]]:
    """Measure until the time is up."""
    rows = []
    print(
        f"{'problem':28} {'state':12} {'forward':>10} {'backward':>10} {'copied':>12}", flush=True
    )
    chosen = ways(device)
    for name in PROBLEMS:
        for way in chosen:
            if time.perf_counter() > end:
                print(f"{name:28} {way:12} left out, the time is up", flush=True)
                continue
            try:
                row = measure(name, way, device)
            except Exception as error:  # the other rows are wanted all the same
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                print(f"{name:28} {way:12} failed, {reason}", flush=True)
                rows.append({"problem": name, "way": way, "error": reason})
                continue
            if row is None:
                continue
            rows.append(row)
            print(
                f"{name:28} {way:12} {1e3 * row['forward']:7.1f} ms {1e3 * row['backward']:7.1f} ms"
                f" {row.get('copied_bytes', 0) / 1e6:9.1f} MB",
                flush=True,
            )
    return rows


def main() -> int:
    """Run tests and table within the budget."""
    begin = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--wheels", type=Path, help="folder of wheels to make an environment from")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds for everything")
    parser.add_argument("--device", default="cuda", help="cpu tries the table without a GPU")
    parser.add_argument("--only", choices=("tests", "table"), help="one part alone")
    parser.add_argument("--json", type=Path, default=FOLDER / "results" / "gpu.json")
    options = parser.parse_args()
    if options.wheels is not None:
        python = build_environment(options.wheels)
        left = options.budget - (time.perf_counter() - begin)
        command = [str(python), __file__, "--budget", str(left), "--json", str(options.json)]
        command += ["--device", options.device]
        command += ["--only", options.only] if options.only else []
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # pnode is this folder
        return subprocess.run(command, env=environment, cwd=FOLDER, check=False).returncode

    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no GPU here: torch sees no CUDA or HIP device", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"torch": torch.__version__, "device": options.device}
    if options.device.startswith("cuda"):
        report["name"] = torch.cuda.get_device_name()
    end = begin + options.budget
    status = 0
    if options.only != "table":
        report["tests"] = run_tests(_TEST_PART * (end - time.perf_counter()))
        print(json.dumps(report["tests"], indent=2), flush=True)
        status = int(report["tests"]["status"] != 0)
    if options.only != "tests":
        report["table"] = table(options.device, end - 30.0)
        status |= int(any("error" in row for row in report["table"]))
    report["seconds"] = round(time.perf_counter() - begin, 1)
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(report, indent=2))
    return status


if __name__ == "__main__":
    sys.exit(main())

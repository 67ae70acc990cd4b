"""Benchmark records belong to one machine: a comparison with another's is refused, not drawn.

pytest-benchmark alone would warn and compare.
"""

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from trsp.bench.record import environment

# What decides how long the same code takes; hook functions get it from the record by this name.
KEY = "trsp"
_COMPARED = pytest.StashKey[bool]()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    here = environment()
    machine_info[KEY] = {
        "processor": here["processor"],
        "num_cpus": here["num_cpus"],
        "torch_threads": here["torch_threads"],
        "torch": here["versions"]["torch"],
    }
    # The clock rate of the moment would make every record differ from every other.
    cpu = machine_info.get("cpu", {})
    machine_info["cpu"] = {name: cpu[name] for name in cpu if not name.startswith("hz_")}


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_compare_machine_info(
    config: pytest.Config, machine_info: dict[str, Any], compared_benchmark: dict[str, Any]
) -> None:
    here, there = machine_info[KEY], compared_benchmark["machine_info"].get(KEY, {})
    different = [
        f"{name} is {there.get(name)!r} there and {here[name]!r} here"
        for name in here
        if there.get(name) != here[name]
    ]
    if different:
        raise pytest.UsageError(
            f"not comparable: the record is of another machine: {'; '.join(different)}. "
            "Save one here first, with --benchmark-autosave"
        )
    config.stash[_COMPARED] = True


@pytest.fixture(scope="session")
def compared_as_asked(pytestconfig: pytest.Config) -> None:
    """A run that was to be compared had a record of this machine to compare with."""
    asked = pytestconfig.getoption("benchmark_compare")
    if asked and not pytestconfig.stash.get(_COMPARED, False):
        raise pytest.UsageError(
            "--benchmark-compare compared nothing: there is no such record in the storage, or "
            "tests/bench was not named on the command line"
        )


@pytest.fixture(scope="session")
def report_records() -> ModuleType:
    """The builder of synthetic speed records, tests/bench/report_records.py."""
    path = Path(__file__).with_name("report_records.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

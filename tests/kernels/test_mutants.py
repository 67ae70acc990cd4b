"""For each property of the kernels a planted mutant, and the test of the suite that it fails.

A mutant is the real source with one passage replaced, imported under the real name: the ops and
the test are imported anew beside it. The same test must pass beside the unchanged source, in the
same way, so a mutant is caught by what it changed. The tables are in tests/kernels/mutants; there
an argument "@name" is an object that the test's module knows by that name.

Interpreter only: on a GPU a read out of bounds would end the process. That the row offsets of the
norm's backward have 64 bits is not seen here (an interpreted loop counts in Python's integers):
the checks of the machine code read it.
"""

import builtins
import contextlib
import importlib
import importlib.util
import inspect
import operator
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from trsp.kernels import reference

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="mutants run under the interpreter"),
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="triton is not installed"
    ),
    pytest.mark.filterwarnings("ignore:gated_difference measures"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
]

PACKAGE = sys.modules["trsp.kernels"]


@dataclass(frozen=True)
class Mutant:
    """`old` becomes `new` in kernels/`module`.py, and `test` must fail with `error`."""

    property: str
    module: str
    old: str
    new: str
    test: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = "AssertionError"

    @property
    def backend(self) -> str:
        return "triton" if self.module.endswith("_triton") else "reference"

    @property
    def name(self) -> str:
        return f"{self.module}: {self.property}".replace(" ", "_")


MUTANTS = [
    Mutant(**entry)
    for table in sorted(Path(__file__).with_name("mutants").glob("*.toml"))
    for entry in tomllib.loads(table.read_text("utf-8"))["mutant"]
]


@contextlib.contextmanager
def imported_anew() -> Iterator[None]:
    """Inside, the ops and their tests are imported for the first time; then all is as before."""
    prefixes = ("trsp.kernels.", "trsp.bench.kernel_cases", "tests.kernels.test_")
    ours = {name: module for name, module in sys.modules.items() if name.startswith(prefixes)}
    attributes = dict(vars(PACKAGE))
    for name in ours:
        del sys.modules[name]
        vars(PACKAGE).pop(name.removeprefix("trsp.kernels."), None)
    try:
        yield
    finally:
        for name in [name for name in sys.modules if name.startswith(prefixes)]:
            del sys.modules[name]
        sys.modules.update(ours)
        vars(PACKAGE).clear()
        vars(PACKAGE).update(attributes)


def plant(module_name: str, source: str, folder: Path) -> None:
    """Import `source` under the real name, from a file: Triton reads its functions from there."""
    folder.mkdir()
    name, path = f"trsp.kernels.{module_name}", folder / f"{module_name}.py"
    path.write_text(source, "utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    setattr(PACKAGE, module_name, module)
    spec.loader.exec_module(module)


def argument(value: Any, tests: Any) -> Any:
    if isinstance(value, str) and value.startswith("@"):
        return operator.attrgetter(value[1:])(tests)
    return tuple(value) if isinstance(value, list) else value


def run_test(mutant: Mutant, request: pytest.FixtureRequest) -> None:
    """Call the test as pytest would, with the fixtures that it names."""
    module_name, function_name = mutant.test.split(":")
    tests = importlib.import_module(f"tests.kernels.{module_name}")
    function = getattr(tests, function_name)
    arguments = {"backend": mutant.backend} | {
        name: argument(value, tests) for name, value in mutant.arguments.items()
    }
    parameters = inspect.signature(function).parameters
    fixtures = {name: request.getfixturevalue(name) for name in parameters if name not in arguments}
    function(**{name: v for name, v in (fixtures | arguments).items() if name in parameters})


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_caught(
    mutant: Mutant,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRSP_KERNELS", mutant.backend)
    original = importlib.import_module(f"trsp.kernels.{mutant.module}")
    source = inspect.getsource(original)
    assert source.count(mutant.old) == 1, f"{mutant.module}.py holds {mutant.old!r} not once"
    with imported_anew():
        plant(mutant.module, source, tmp_path / "unchanged")
        run_test(mutant, request)
    # pytest's own: a test that waits for an error which does not come.
    error = pytest.fail.Exception if mutant.error == "Failed" else getattr(builtins, mutant.error)
    with imported_anew():
        plant(mutant.module, source.replace(mutant.old, mutant.new), tmp_path / "mutant")
        with pytest.raises(error):
            run_test(mutant, request)


def test_the_suite_s_own_modules_come_back() -> None:
    before = dict(sys.modules), dict(vars(PACKAGE))
    with imported_anew():
        anew = importlib.import_module("trsp.kernels.reference")
        assert anew is not reference
    assert (dict(sys.modules), dict(vars(PACKAGE))) == before


def test_every_kernel_has_mutants() -> None:
    folder = Path(__file__).parents[2] / "kernels"
    computing = {path.stem for path in folder.glob("*_triton.py")} | {"reference"}
    assert computing <= {mutant.module for mutant in MUTANTS}

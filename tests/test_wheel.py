"""The wheel, built from the source distribution, works where the source is not.

It is installed into a fresh environment that borrows the dependencies of this one, so that torch is
not installed again, and is used from another folder.
"""

import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
FOLDERS = [name.removeprefix("trsp.") for name in PYPROJECT["tool"]["setuptools"]["packages"]]
PATTERNS = PYPROJECT["tool"]["setuptools"]["package-data"]
SOURCES = {
    f"trsp/{path.relative_to(ROOT)}"
    for name in FOLDERS
    for pattern in ("*.py", *PATTERNS.get(f"trsp.{name}", ()))
    for path in ROOT.glob(f"{name}/{pattern}")
}
IMPORT_ALL = """
import importlib, pkgutil, sys
for package in ("kernels", "pruner"):
    folder = importlib.import_module(f"trsp.{package}").__path__
    for module in pkgutil.iter_modules(folder, f"trsp.{package}."):
        print(importlib.import_module(module.name).__file__)
"""


@dataclass(frozen=True)
class Installed:
    """A wheel, and the environment it was installed into."""

    wheel: Path
    environment: Path
    folder: Path

    def run(self, program: str, *arguments: str) -> str:
        """Stdout of a program of the environment, run in an unrelated empty folder."""
        return run([str(self.environment / "bin" / program), *arguments], self.folder)


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    source, built, environment, elsewhere = (
        tmp_path_factory.mktemp(name) for name in ("source", "built", "environment", "elsewhere")
    )
    project = PYPROJECT["project"]
    for name in ("pyproject.toml", project["readme"], *project["license-files"]):
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(built)], source)
    (wheel,) = built.glob("*.whl")

    venv.create(environment, with_pip=False, symlinks=True)
    python = str(environment / "bin/python")
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps"]
    run([*pip, str(wheel)], elsewhere)
    site_packages = Path(
        run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], elsewhere
        ).removesuffix("\n")
    )
    # A path line adds the folder after the fresh one and runs none of its .pth files: this
    # environment's editable install stays out of sight.
    borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site_packages / "borrowed.pth").write_text("\n".join(borrowed), encoding="utf-8")
    return Installed(wheel, environment, elsewhere)


def test_the_wheel_holds_every_module_and_nothing_else(installed: Installed) -> None:
    names = set(zipfile.ZipFile(installed.wheel).namelist())
    metadata = {name for name in names if ".dist-info/" in name}
    assert names - metadata == SOURCES
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_every_module_of_the_method_loads_from_the_wheel(installed: Installed) -> None:
    files = [Path(line) for line in installed.run("python", "-c", IMPORT_ALL).splitlines()]
    expected = {
        Path(name).name
        for name in SOURCES
        if name.startswith(("trsp/kernels", "trsp/pruner")) and name.endswith(".py")
    }
    assert {file.name for file in files} == expected - {"__init__.py"}
    assert all(file.is_relative_to(installed.environment) for file in files)


def test_the_command_of_the_wheel_lists_its_commands(installed: Installed) -> None:
    text = installed.run("trsp", "--help")
    for command in ("prune", "plan", "compact", "verify", "eval", "demo"):
        assert f" {command} " in text

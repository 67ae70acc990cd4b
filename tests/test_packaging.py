"""What is installed is what the folders hold, under the names that do not clash."""

import ast
import re
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]
DISTRIBUTIONS = {"yaml": "pyyaml"}
OPTIONAL = {"datasets", "llmcompressor", "lm_eval", "jinja2", "matplotlib", "vllm"}


def package_folders(root: Path) -> set[str]:
    """Every folder with Python files, at any depth below a top-level one, as `trsp.x.y`."""
    tops = {path.parent for path in root.glob("[!.]*/*.py")} - {root / "tests"}
    folders = {path.parent for top in tops for path in top.rglob("*.py")}
    return {".".join(["trsp", *folder.relative_to(root).parts]) for folder in folders}


def test_the_declared_packages_are_the_folders_with_python_files() -> None:
    assert set(PACKAGES) == package_folders(ROOT)


def test_an_undeclared_subpackage_is_seen(tmp_path: Path) -> None:
    for name in ("pruner/layer_map.py", "pruner/families/llama.py", "tests/test_planted.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert package_folders(tmp_path) == {"trsp.pruner", "trsp.pruner.families"}


def test_the_type_checker_sees_the_declared_packages() -> None:
    links = (ROOT / ".ci/mypy_path/trsp").iterdir()
    assert {f"trsp.{link.name}": link.resolve() for link in links} == {
        package: ROOT / package.removeprefix("trsp.") for package in PACKAGES
    }
    assert PYPROJECT["tool"]["mypy"]["packages"] == PACKAGES


def third_party_roots(source: str) -> set[str]:
    """Top-level names a source imports, at any depth, that are neither ours nor Python's."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"trsp"}


def test_what_is_imported_is_declared_and_nothing_else() -> None:
    imported = {
        DISTRIBUTIONS.get(root, root)
        for package in PACKAGES
        for path in (ROOT / package.removeprefix("trsp.")).glob("*.py")
        for root in third_party_roots(path.read_text(encoding="utf-8"))
    }
    declared = {re.split(r"[^\w-]", line)[0] for line in PYPROJECT["project"]["dependencies"]}
    assert imported - OPTIONAL == declared


def test_kernels_is_a_namespace_folder() -> None:
    """`kernels` is also a distribution's name: a regular package at the root would shadow it."""
    assert not (ROOT / "kernels/__init__.py").exists()


@pytest.mark.parametrize("package", ["pruner", "serving", "bench"])
def test_a_package_file_holds_its_docstring_alone(package: str) -> None:
    body = ast.parse((ROOT / package / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)
    assert isinstance(body[0].value, ast.Constant)


def test_our_folders_are_not_imported_under_their_bare_names() -> None:
    for name in ("kernels", "pruner", "serving", "bench"):
        module = sys.modules.get(name)
        places = [Path(place).resolve() for place in getattr(module, "__path__", [])]
        assert ROOT / name not in places


def test_the_test_folders_mirror_the_packages() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("*.py"))}
    assert folders <= {package.removeprefix("trsp.") for package in PACKAGES}
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_test_files_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_the_console_script_is_the_outermost_package() -> None:
    (script,) = entry_points(group="console_scripts", name="trsp")
    assert script.value == "trsp.bench.cli:main"
    assert callable(script.load())

"""Who may import whom, read from the source: kernels <- pruner <- serving, bench imports all.

Imports inside functions and under TYPE_CHECKING count as much as those at the top of a file.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {
    "kernels": {"kernels"},
    "pruner": {"kernels", "pruner"},
    "serving": {"pruner", "serving"},
    "bench": {"kernels", "pruner", "serving", "bench"},
    "tests": {"kernels", "pruner", "serving", "bench"},
}
RESTRICTED = {"vllm": {"serving", "bench", "tests"}, "triton": {"kernels", "bench", "tests"}}
KERNELS_NEED = {"torch", "triton"}
SERVING_READS = {
    "config_surgery",
    "bounded_json",
    "checkpoint",
    "compaction",
    "durable",
    "errors",
    "layer_map",
    "sublayer_checkpoint",
}

# A module imports only what stands before it: no cycles, and a place for every newcomer.
PRUNER_ROOMS = (
    ("errors", "progress", "bounded_json", "durable", "layer_map", "layer_lists"),
    ("recipe", "token_ids", "safetensors_header"),
    ("layer_rules", "family_registry", "config_surgery"),
    ("module_names", "quantization", "checkpoint"),
    ("mergekit_slices", "keep_lists", "adapter_names", "adapters"),
    ("signals", "console", "cost"),
    ("families", "losses", "sampling", "text_files", "calibration", "self_text", "text_checks"),
    ("next_norms", "gated_model", "activations", "sublayers"),
    ("criteria", "distillation", "selection", "refit", "local_distillation", "transfer"),
    ("compaction", "sublayer_checkpoint", "windows", "evaluation"),
    ("vllm_process", "probes", "folder_checks", "model_checks", "proof"),
    (
        "held_out",
        "run_folder",
        "run",
        "auto_record",
        "auto_order",
        "auto_plan",
        "auto_trials",
        "auto",
    ),
    ("model_card", "pipeline", "api", "interop_cli", "cli"),
)
PRUNER_ORDER = tuple(module for room in PRUNER_ROOMS for module in room)
# Reading a layer map, and what that needs, must work in a Python without any package.
STDLIB_ONLY = {"errors", "progress", "bounded_json", "durable", "layer_map", "layer_lists"}
# They exchange layer maps and checkpoint folders; only the pipeline knows more than one of them.
STRANGERS = {"selection", "transfer", "compaction", "proof"}


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything imported; a relative name starts with a dot."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                prefix = "." * level + (f"{module}." if module else "")
                yield from ((node.lineno, prefix + alias.name) for alias in names)
            case ast.Call(
                func=ast.Name(id=function) | ast.Attribute(attr=function),
                args=[ast.Constant(value=str(name)), *_],
            ) if function in {"import_module", "__import__"}:
                yield node.lineno, name


def violations(package: str, module: str, source: str) -> list[str]:
    """What `package/module.py` with this source imports against the rules, one line each."""
    found = []
    if package == "pruner" and module not in {*PRUNER_ORDER, "__init__"}:
        found.append(f"pruner/{module}.py has no place in PRUNER_ORDER")
    for line, name in imported_names(ast.parse(source)):
        reason = _objection(package, module, name)
        if reason:
            found.append(f"{package}/{module}.py:{line} imports {name}: {reason}")
    return found


def _objection(package: str, module: str, name: str) -> str | None:
    root, *rest = name.split(".")
    if root in {"", *OURS}:
        return "ours is written trsp.x.y"
    if root == "trsp":
        return _objection_to_ours(package, module, rest)
    if root in sys.stdlib_module_names:
        return None
    if package not in RESTRICTED.get(root, {package}):
        return f"{root} belongs to {', '.join(sorted(RESTRICTED[root]))}"
    if package == "kernels" and root not in KERNELS_NEED:
        return "kernels need torch and triton alone"
    if package == "pruner" and module in STDLIB_ONLY:
        return f"{module} needs the standard library alone"
    return None


def _objection_to_ours(package: str, module: str, rest: list[str]) -> str | None:
    if len(rest) < 2 or rest[0] not in OURS or rest[0] == "tests":
        return "ours is written trsp.x.y"
    owner, target = rest[:2]
    if owner not in OURS[package]:
        return f"{package} must not import {owner}"
    if package == "serving" and owner == "pruner" and target not in SERVING_READS:
        return f"serving reads only {', '.join(sorted(SERVING_READS))}"
    if package == owner == "pruner" and module in PRUNER_ORDER:
        if module in STDLIB_ONLY and target not in STDLIB_ONLY:
            return f"{module} needs the standard library alone"
        if {module, target} <= STRANGERS:
            return f"{module} and {target} know nothing of each other"
        if target not in PRUNER_ORDER[: PRUNER_ORDER.index(module)]:
            return f"{target} does not stand before {module}"
    return None


def sources() -> list[Path]:
    return sorted(path for package in OURS for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_direction(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    assert violations(package, path.stem, path.read_text(encoding="utf-8")) == []


def test_the_order_names_only_modules_that_exist() -> None:
    modules = {path.stem for path in (ROOT / "pruner").glob("*.py")}
    assert set(PRUNER_ORDER) - modules == set()
    assert len(PRUNER_ORDER) == len(set(PRUNER_ORDER))


@pytest.mark.parametrize(
    ("place", "source", "reason"),
    [
        ("kernels/planted", "import trsp.pruner.recipe", "kernels must not import pruner"),
        ("kernels/planted", "import transformers", "torch and triton alone"),
        ("pruner/pipeline", "from trsp.serving.planted import f", "must not import serving"),
        ("pruner/pipeline", "from trsp.bench.demo import f", "must not import bench"),
        ("serving/planted", "import trsp.bench.demo", "must not import bench"),
        ("serving/planted", "import trsp.kernels.launch", "must not import kernels"),
        ("serving/planted", "from trsp.pruner.transfer import f", "serving reads only"),
        ("pruner/proof", "def f():\n    import vllm", "vllm belongs to"),
        ("kernels/planted", "from vllm.config import f", "vllm belongs to"),
        ("pruner/gated_model", "import triton.language as tl", "triton belongs to"),
        ("serving/planted", "from triton import jit", "triton belongs to"),
        ("pruner/layer_map", "import torch", "standard library alone"),
        ("pruner/durable", "if TYPE_CHECKING:\n    import numpy", "standard library alone"),
        ("pruner/layer_map", "from trsp.pruner import recipe", "standard library alone"),
        ("pruner/criteria", "from trsp.pruner.selection import f", "does not stand before"),
        ("pruner/recipe", "from trsp.pruner.absent import f", "does not stand before"),
        ("pruner/transfer", "import trsp.pruner.selection", "know nothing of each other"),
        ("pruner/proof", "import trsp.pruner.compaction", "know nothing of each other"),
        ("pruner/planted", "", "no place in PRUNER_ORDER"),
        ("pruner/recipe", "from pruner.errors import UserError", "written trsp.x.y"),
        ("pruner/recipe", "from .errors import UserError", "written trsp.x.y"),
        ("pruner/recipe", "from . import errors", "written trsp.x.y"),
        ("pruner/recipe", "import trsp", "written trsp.x.y"),
        ("pruner/recipe", "from trsp import pruner", "written trsp.x.y"),
        ("pruner/recipe", "from trsp.pruner import *", "does not stand before"),
        ("bench/planted", "import kernels", "written trsp.x.y"),
        ("tests/planted", "from tests.conftest import f", "written trsp.x.y"),
        ("pruner/recipe", "importlib.import_module('trsp.bench.cli')", "must not import bench"),
        ("pruner/recipe", "__import__('vllm')", "vllm belongs to"),
    ],
)
def test_a_planted_violation_is_found(place: str, source: str, reason: str) -> None:
    package, module = place.split("/")
    found = violations(package, module, source)
    assert len(found) == 1
    assert reason in found[0]


@pytest.mark.parametrize(
    ("place", "source"),
    [
        ("kernels/planted", "import math\nimport torch\nimport triton.language as tl"),
        ("pruner/selection", "from trsp.pruner import criteria\nimport trsp.kernels.gated_branch"),
        ("pruner/proof", "from importlib.util import find_spec\nfind_spec('vllm')"),
        ("serving/planted", "import vllm\nfrom trsp.pruner.layer_map import read_layer_map"),
        ("bench/planted", "import triton\nimport vllm\nfrom trsp.pruner.api import prune"),
    ],
)
def test_what_is_allowed_is_not_objected_to(place: str, source: str) -> None:
    package, module = place.split("/")
    assert violations(package, module, source) == []

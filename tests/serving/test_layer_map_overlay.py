"""The overlay folder: a compacted checkpoint without its weights, tied to map and checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trsp.pruner.checkpoint import open_checkpoint
from trsp.pruner.compaction import compact
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import BaseModel, LayerMap
from trsp.serving.layer_map_overlay import is_overlay, read_overlay, write_overlay
from trsp.serving.served_layers import DIGEST_FIELD, open_served_layers

DROPPED = [4, 1]


def map_of(folder: Path, dropped: list[int]) -> LayerMap:
    checkpoint = open_checkpoint(folder)
    base = BaseModel("base", checkpoint.num_hidden_layers, checkpoint.fingerprint)
    return LayerMap.from_drop(base, dropped)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text("utf-8"))


def edit_json(path: Path, **fields: Any) -> None:
    """Set the fields of a JSON file; None removes one."""
    document = {**read_json(path), **fields}
    kept = {name: value for name, value in document.items() if value is not None}
    path.write_text(json.dumps(kept), "utf-8")


@pytest.fixture
def base(pico_llama: Path, tmp_path: Path) -> Path:
    """A copy of the pico Llama to change."""
    return shutil.copytree(pico_llama, tmp_path / "base")


@pytest.fixture
def overlay(base: Path, tmp_path: Path) -> Path:
    return write_overlay(base, map_of(base, DROPPED), tmp_path / "overlay")


def test_an_overlay_is_the_compacted_folder_without_its_weights(
    base: Path, overlay: Path, tmp_path: Path
) -> None:
    pruned = compact(open_checkpoint(base), map_of(base, DROPPED), tmp_path / "pruned")
    names = {path.name for path in pruned.iterdir()}
    assert {path.name for path in overlay.iterdir()} == names - {"model.safetensors"} | {
        "overlay.json"
    }
    for name in names - {"model.safetensors", "config.json", "manifest.json"}:
        assert (overlay / name).read_bytes() == (pruned / name).read_bytes(), name
    config = read_json(overlay / "config.json")
    assert len(config.pop(DIGEST_FIELD)) == 64
    assert config == read_json(pruned / "config.json")
    assert sum(path.stat().st_size for path in overlay.iterdir()) < 2**20


def test_an_overlay_names_its_checkpoint(base: Path, overlay: Path) -> None:
    record = read_json(overlay / "overlay.json")
    assert record["schema_version"] == 1
    assert record["base_model"] == str(base.resolve())
    assert record["base_fingerprint"] == open_checkpoint(base).fingerprint
    assert record["layer_prefix"] == "model.layers."
    served = read_overlay(overlay)
    assert served.layer_map.kept == (0, 2, 3, 5)
    assert served.checkpoint.path == base.resolve()
    assert served.config[DIGEST_FIELD] == read_json(overlay / "config.json")[DIGEST_FIELD]


def test_an_existing_folder_is_left_alone(base: Path, overlay: Path) -> None:
    before = (overlay / "overlay.json").read_bytes()
    with pytest.raises(UserError, match="already exists"):
        write_overlay(base, map_of(base, [2]), overlay)
    assert (overlay / "overlay.json").read_bytes() == before


def test_a_refused_map_leaves_nothing_behind(base: Path, tmp_path: Path) -> None:
    other = LayerMap.from_drop(BaseModel("other", 6, "0" * 64), [1])
    with pytest.raises(UserError, match="the layer map is for another model"):
        write_overlay(base, other, tmp_path / "overlay")
    deeper = LayerMap.from_drop(BaseModel("other", 8, "0" * 64), [1])
    with pytest.raises(UserError, match="a model of 8 layers"):
        write_overlay(base, deeper, tmp_path / "overlay")
    assert {path.name for path in tmp_path.iterdir()} == {"base"}


def test_a_folder_that_is_no_overlay_says_how_to_make_one(base: Path) -> None:
    assert not is_overlay(base)
    with pytest.raises(UserError, match="trsp serve MODEL --map MAP --overlay DIR"):
        read_overlay(base)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"schema_version": 2}, "schema_version: Input should be 1"),
        ({"weights": "here"}, "weights: Extra inputs are not permitted"),
        ({"base_model": None}, "base_model: Field required"),
        ({"base_fingerprint": "0" * 64}, "its fingerprint is .* make the overlay anew"),
        ({"layer_prefix": "model.h."}, "its layer prefix is model.layers., and the overlay"),
        ({"layer_map_sha256": "0" * 64}, "layer_map.json: was changed"),
        ({"base_model": "/nowhere"}, "an overlay of the checkpoint /nowhere, which is not there"),
    ],
)
def test_a_changed_record_is_refused(overlay: Path, fields: dict[str, Any], complaint: str) -> None:
    edit_json(overlay / "overlay.json", **fields)
    with pytest.raises(UserError, match=complaint):
        read_overlay(overlay)


def test_another_layer_map_in_an_overlay_is_refused(base: Path, overlay: Path) -> None:
    (overlay / "layer_map.json").write_text(map_of(base, [0, 5]).to_json(), "utf-8")
    with pytest.raises(UserError, match=r"layer_map\.json: was changed"):
        read_overlay(overlay)


@pytest.mark.parametrize("digest", [None, "0" * 64])
def test_a_config_of_another_map_is_refused(overlay: Path, digest: str | None) -> None:
    edit_json(overlay / "config.json", **{DIGEST_FIELD: digest})
    with pytest.raises(UserError, match="is not that of the layer map"):
        read_overlay(overlay)


def test_a_checkpoint_that_became_another_is_refused(base: Path, overlay: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="the layer map is for another model"):
        read_overlay(overlay)


@pytest.mark.parametrize(
    ("changes", "dtype"),
    [
        ({}, "float16"),
        # A kept tensor of another type widens, one of a dropped layer does not.
        ({"model.norm.weight": torch.float32}, "float32"),
        ({"model.norm.weight": torch.bfloat16}, "float32"),
        ({"model.norm.weight": torch.float64}, "float64"),
        ({"model.layers.1.input_layernorm.weight": torch.float32}, "float16"),
    ],
)
def test_a_config_without_a_dtype_gets_that_of_the_weights(
    base: Path, changes: dict[str, torch.dtype], dtype: str
) -> None:
    """vLLM reads it from the headers of the weights, and finds none in an overlay."""
    tensors = load_file(base / "model.safetensors")
    tensors = {name: t.to(changes.get(name, torch.float16)) for name, t in tensors.items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    edit_json(base / "config.json", dtype=None)
    served = open_served_layers(base, map_of(base, DROPPED))
    assert served.overlay_config()["dtype"] == dtype
    edit_json(base / "config.json", torch_dtype="bfloat16")
    served = open_served_layers(base, map_of(base, DROPPED))
    assert "dtype" not in served.overlay_config()


@pytest.mark.parametrize("own_head", [True, False])
def test_an_output_head_in_the_weights_is_not_tied_away(base: Path, own_head: bool) -> None:
    """vLLM unties where the headers show a head of its own, and sees no headers in an overlay."""
    tensors = load_file(base / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    if own_head:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    edit_json(base / "config.json", tie_word_embeddings=True)
    served = open_served_layers(base, map_of(base, DROPPED))
    assert served.has_own_head is own_head
    assert served.overlay_config()["tie_word_embeddings"] is not own_head


def test_two_maps_of_one_length_have_two_configs(base: Path) -> None:
    """vLLM's compile cache is keyed by the config's text, with fields that it does not know."""
    from transformers import LlamaConfig

    texts = set()
    for dropped in ([4, 1], [1, 2], [5, 4], [1, 4]):
        served = open_served_layers(base, map_of(base, dropped))
        texts.add(LlamaConfig.from_dict(served.overlay_config()).to_json_string())
    # The order of removal decides nothing about the model.
    assert len(texts) == 3


@pytest.fixture
def qwen2_windows(tmp_path: Path) -> Path:
    """Six layers, the last two with a window, said by a threshold and not by a list."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        num_hidden_layers=6,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=64,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=4,
    )
    folder = tmp_path / "qwen2"
    Qwen2ForCausalLM(config).save_pretrained(folder)
    edit_json(folder / "config.json", layer_types=None)
    return folder


def test_overrides_hold_the_lists_that_a_config_class_derives(qwen2_windows: Path) -> None:
    """The number alone would leave the list of the dense model: windows nowhere in layers 0-3."""
    from transformers import AutoConfig

    served = open_served_layers(qwen2_windows, map_of(qwen2_windows, [2, 3]))
    assert "layer_types" not in served.config
    overrides = served.hf_overrides()
    assert overrides["layer_types"] == ["full_attention"] * 2 + ["sliding_attention"] * 2
    config = AutoConfig.from_pretrained(qwen2_windows)
    config.num_hidden_layers = 4
    with pytest.raises(UserError, match="max_window_layers is 4, expected 2"):
        served.check_config(config)
    config.max_window_layers = 2
    with pytest.raises(UserError, match=r"layer_types is .*, expected"):
        served.check_config(config)
    config.layer_types = overrides["layer_types"]
    with pytest.raises(UserError, match=f"{DIGEST_FIELD} is None, expected"):
        served.check_config(config)
    for name, value in overrides.items():
        setattr(config, name, value)
    served.check_config(config)


def test_the_config_of_an_overlay_agrees(qwen2_windows: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    overlay = write_overlay(qwen2_windows, map_of(qwen2_windows, [2, 3]), tmp_path / "overlay")
    read_overlay(overlay).check_config(AutoConfig.from_pretrained(overlay))


def test_the_config_of_a_dense_model_does_not_agree(base: Path) -> None:
    from transformers import AutoConfig

    served = open_served_layers(base, map_of(base, DROPPED))
    with pytest.raises(UserError, match="num_hidden_layers is 6, expected 4"):
        served.check_config(AutoConfig.from_pretrained(base))


def test_a_text_config_is_compared_inside(tmp_path: Path) -> None:
    """Multimodal: the layers of the language model, under their dotted names."""
    from transformers import AutoConfig, Gemma3Config

    text = {"num_hidden_layers": 6, "hidden_size": 32, "num_attention_heads": 2, "head_dim": 16,
            "intermediate_size": 32, "vocab_size": 64}  # fmt: skip
    config = Gemma3Config(text_config=text, architectures=["Gemma3ForConditionalGeneration"])
    folder = tmp_path / "gemma3"
    config.save_pretrained(folder)
    tensors = {f"language_model.model.layers.{n}.mlp.weight": torch.zeros(2) for n in range(6)}
    tensors["vision_tower.encoder.layers.0.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    served = open_served_layers(folder, map_of(folder, [5, 0]))
    assert served.renumbering.prefix == "language_model.model.layers."
    assert served.hf_overrides()["text_config"]["num_hidden_layers"] == 4
    loaded = AutoConfig.from_pretrained(folder)
    with pytest.raises(UserError, match=r"text_config\.num_hidden_layers is 6, expected 4"):
        served.check_config(loaded)
    pruned = Gemma3Config.from_dict(dict(served.config))
    served.check_config(pruned)

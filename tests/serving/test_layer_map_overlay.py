"""The overlay folder: a compacted checkpoint without its weights, tied to map and checkpoint."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from trsp.pruner.checkpoint import open_checkpoint, sample_weights
from trsp.pruner.compaction import compact
from trsp.pruner.errors import UserError
from trsp.pruner.layer_map import BaseModel, LayerMap
from trsp.serving.layer_map_overlay import is_overlay, read_overlay, write_overlay
from trsp.serving.served_layers import DIGEST_FIELD, open_served_layers

DROPPED = [4, 1]
GONE = "gone"


def map_of(folder: Path, dropped: list[int], *, weights: bool = False) -> LayerMap:
    """The map that drops these layers; with `weights` it tells those of `folder` from others."""
    checkpoint = open_checkpoint(folder)
    digest = sample_weights(checkpoint) if weights else None
    base = BaseModel("base", checkpoint.num_hidden_layers, checkpoint.fingerprint, digest)
    return LayerMap.from_drop(base, dropped)


def reseed(folder: Path, seed: int) -> None:
    """Give a checkpoint the weights of another seed: the same names, shapes and dtypes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "model.safetensors")
    other = {n: torch.randn(t.shape, generator=generator).to(t.dtype) for n, t in tensors.items()}
    save_file(other, folder / "model.safetensors", metadata={"format": "pt"})


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
    assert record["base_weights_sha256"] == sample_weights(open_checkpoint(base))
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
        ({"base_weights_sha256": "0" * 64}, "its sha256 of weights is .* make the overlay anew"),
        ({"base_weights_sha256": None}, "base_weights_sha256: Field required; make the overlay"),
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


@pytest.fixture
def seeds(base: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of one shape, whose weights are of two seeds."""
    other = shutil.copytree(base, tmp_path / "other")
    reseed(base, 1)
    reseed(other, 2)
    assert open_checkpoint(base).fingerprint == open_checkpoint(other).fingerprint
    return base, other


def test_a_map_of_other_weights_of_one_shape_is_refused(
    seeds: tuple[Path, Path], tmp_path: Path
) -> None:
    one, other = seeds
    layer_map = map_of(one, DROPPED, weights=True)
    assert open_served_layers(one, layer_map).layer_map.kept == (0, 2, 3, 5)
    with pytest.raises(UserError, match="same shape, other weights") as refused:
        open_served_layers(other, layer_map)
    assert "OUT.run/transferred" in str(refused.value)
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="same shape, other weights"):
        write_overlay(other, layer_map, tmp_path / "overlay")
    assert not (tmp_path / "overlay").exists()
    # A prefix and a map without the field are for the same base.
    with pytest.raises(UserError, match="same shape, other weights"):
        open_served_layers(other, layer_map.prefix(1))
    open_served_layers(other, map_of(one, DROPPED))


def test_compaction_takes_the_layers_of_a_map_of_other_weights(
    seeds: tuple[Path, Path], tmp_path: Path
) -> None:
    """Direct removal beside transfer is measured like this."""
    one, other = seeds
    out = compact(open_checkpoint(other), map_of(one, DROPPED, weights=True), tmp_path / "out")
    assert open_checkpoint(out).num_hidden_layers == 4


@pytest.mark.parametrize("weights", [True, False])
def test_a_checkpoint_that_got_other_weights_is_refused(
    weights: bool, base: Path, tmp_path: Path
) -> None:
    overlay = write_overlay(base, map_of(base, DROPPED, weights=weights), tmp_path / "overlay")
    read_overlay(overlay)
    reseed(base, 3)
    with pytest.raises(UserError, match=r"same shape, other weights|its sha256 of weights is"):
        read_overlay(overlay)


def test_a_config_that_is_not_the_checkpoints_any_more_is_refused(
    base: Path, overlay: Path
) -> None:
    edit_json(base / "config.json", rms_norm_eps=0.5)
    with pytest.raises(UserError, match=r"rms_norm_eps is .*, expected 0\.5; make the ov"):
        read_overlay(overlay)


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers is 3, expected 4"),
        ({"sliding_window": 4}, "sliding_window is 4, expected missing"),
        ({"hidden_act": GONE}, "hidden_act is missing, expected 'silu'"),
    ],
)
def test_an_edited_config_is_refused(overlay: Path, fields: dict[str, Any], complaint: str) -> None:
    document = {**read_json(overlay / "config.json"), **fields}
    document = {name: value for name, value in document.items() if value != GONE}
    (overlay / "config.json").write_text(json.dumps(document), "utf-8")
    with pytest.raises(UserError, match=complaint):
        read_overlay(overlay)


def test_an_overlay_is_checked_against_its_manifest(overlay: Path, tmp_path: Path) -> None:
    again = shutil.copytree(overlay, tmp_path / "again")
    (again / "model.safetensors").write_bytes(b"weights")
    with pytest.raises(UserError, match=r"model\.safetensors: is not listed in manifest\.json"):
        read_overlay(again)
    (overlay / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer_config\.json: has 2 bytes where manifest"):
        read_overlay(overlay)
    (overlay / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"manifest\.json"):
        read_overlay(overlay)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer_config.json", '{"model_max_length": 5}', "is not what the overlay was made"),
        ("chat_template.jinja", "{{ x }}", "came after the overlay was made"),
        ("tokenizer_config.json", None, "is gone since the overlay was made"),
    ],
)
def test_a_companion_of_the_checkpoint_that_changed_is_refused(
    name: str, content: str | None, complaint: str, base: Path, tmp_path: Path
) -> None:
    (base / "chat_template.jinja").unlink(missing_ok=True)
    (base / "tokenizer_config.json").write_text("{}")
    overlay = write_overlay(base, map_of(base, DROPPED), tmp_path / "overlay")
    read_overlay(overlay)
    if content is None:
        (base / name).unlink()
    else:
        (base / name).write_text(content)
    with pytest.raises(UserError, match=complaint) as refused:
        read_overlay(overlay)
    assert f"remove {overlay} and make the overlay anew" in str(refused.value)


def test_code_that_only_the_making_or_the_serving_trusts_is_no_difference(
    base: Path, tmp_path: Path
) -> None:
    (base / "modeling_x.py").write_text("x = 1\n")
    for trusted in (True, False):
        overlay = tmp_path / f"overlay-{trusted}"
        write_overlay(base, map_of(base, DROPPED), overlay, trust_remote_code=trusted)
        assert (overlay / "modeling_x.py").exists() is trusted
        read_overlay(overlay, trust_remote_code=not trusted)
    (base / "modeling_x.py").write_text("x = 2\n")
    with pytest.raises(UserError, match=r"modeling_x\.py: is not what the overlay was made with"):
        read_overlay(tmp_path / "overlay-True")


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

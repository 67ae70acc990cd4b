"""No config class of transformers has a layer-dependent field that nobody has looked at.

A field looks so by its name, by a default with an entry for each layer, or by a default that is
another one for another number of layers.
"""

import functools
import json
import warnings
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from trsp.pruner import config_surgery
from trsp.pruner.config_surgery import layers_that_must_stay, num_hidden_layers, rewrite_config
from trsp.pruner.errors import UserError
from trsp.pruner.family_registry import registry

NUM_LAYERS = 24
MORE_LAYERS = 3
# They have no defaults; their parts are models with classes of their own.
MADE_OF_PARTS = {"musicgen", "musicgen_melody", "vision-encoder-decoder"}
# As transformers 5.16 to 5.19 have them. Each is refused by its name wherever it says something
# (the last test): to carry one over, give it a rule and take it out of here.
REVIEWED = {
    "aligner_num_add_layers", "altup_active_idx", "attn_layers", "block_auto_adjust_ff_dim",
    "block_ffn_dim_multiplier", "block_multiple_of", "cross_layer_interval", "decoder_layers",
    "depth_decoder_config", "enable_moe_block", "encoder_layers", "freeze_text_layers",
    "freeze_vision_layers", "index_block_size", "index_head_dim", "index_kpool",
    "index_kpool_always_select_tail", "index_local_blocks", "index_n_heads", "index_topk",
    "index_topk_blocks", "indexer_budget", "indexer_compress_ratio", "indexer_head_dim",
    "indexer_kv_heads", "indexer_n_heads", "indexer_types", "intermediate_size", "layers",
    "local_layer_ids", "mask_index", "max_period", "min_period", "mtp_hidden_states_first",
    "mtp_layer_types",
    "mtp_layers_block_type", "mtp_local_layer_ids", "mtp_mlp_layer_types",
    "num_attention_heads_per_layer", "num_blocks", "num_decoder_layers", "num_encoder_layers",
    "num_layers_per_stack", "num_mem_blocks", "num_random_blocks", "ple_layer_ids",
    "prefix_dense_sliding_window_pattern", "resampler_depth", "rescale_every", "unk_index",
    "use_weighted_layer_sum", "vocab_size_per_layer_input",
}  # fmt: skip
# They change with the number of layers for a reason of their own, in types that are not supported.
CHANGES_WITH_DEPTH = {"final_w_init_variance_scale": "how recurrent_gemma draws new weights"}


def known_fields() -> set[str]:
    """The fields that config_surgery has a word on."""
    return {
        *config_surgery._COUNTS, *config_surgery._PER_LAYER, *config_surgery._THRESHOLDS,
        *config_surgery._REFUSED, *config_surgery._NOT_PER_LAYER, *config_surgery._SUB_CONFIGS,
        *config_surgery._DRAFT_COUNTS,
    }  # fmt: skip


@functools.cache
def language_configs() -> tuple[PreTrainedConfig, ...]:
    """Every class that describes the layers of a language model, with its defaults."""
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}
    classes: dict[type, PreTrainedConfig] = {}
    for name in sorted(names - MADE_OF_PARTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            text = CONFIG_MAPPING[name]().get_text_config(decoder=True)
        classes.setdefault(type(text), text)
    return tuple(classes.values())


def layer_fields(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields of a class that look as if they depended on the layers, with their defaults."""
    fields = config.to_dict()
    count = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    num_layers = fields.get(count)
    deeper: dict[str, Any] = {}
    if isinstance(num_layers, int):
        deeper = _made(type(config), {count: num_layers + MORE_LAYERS})
    usual = _made(type(config), {})
    return {
        name: value
        for name, value in fields.items()
        if name != count
        and (
            config_surgery._speaks_of_layers(name, value)
            or (isinstance(value, list | tuple) and len(value) == num_layers)
            or (name in deeper and deeper[name] != usual.get(name))
        )
    }


def _made(kind: type[PreTrainedConfig], fields: dict[str, Any]) -> dict[str, Any]:
    """A config of a class as fields; none where its other defaults do not fit that depth."""
    try:
        return kind(**fields).to_dict()
    except (StrictDataclassError, NotImplementedError):
        return {}


def unseen(configs: Any) -> dict[str, list[str]]:
    """Fields that look layer-dependent and that nobody has looked at, with their model types."""
    seen = known_fields() | REVIEWED | set(CHANGES_WITH_DEPTH)
    found: dict[str, list[str]] = {}
    for config in configs:
        for name in layer_fields(config).keys() - seen:
            found.setdefault(name, []).append(config.model_type)
    return found


def test_every_field_has_been_looked_at() -> None:
    configs = language_configs()
    assert len(configs) > 150
    found = unseen(configs)
    assert not found, (
        f"new fields that look layer-dependent: {found}; give each a rule in config_surgery or the "
        "family's file, or, where it is refused by its name and may stay so, add it to REVIEWED"
    )


class EveryNthConfig(LlamaConfig):
    model_type = "every_nth"
    foo_every_n_layers: int = 4


class SometimesNormedConfig(LlamaConfig):
    """Its name begins as those of layer norms do, which are harmless."""

    model_type = "sometimes_normed"
    layer_norm_every: int = 4


class WideConfig(PreTrainedConfig):
    """A list with an entry for each layer, under a name that says nothing."""

    model_type = "wide"
    num_hidden_layers: int = 5
    widths: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.widths = self.widths or [8] * self.num_hidden_layers
        super().__post_init__(**kwargs)


class ScaledConfig(PreTrainedConfig):
    """A number computed from the depth, under a name that says nothing."""

    model_type = "scaled"
    num_hidden_layers: int = 5
    residual_scale: Any = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.residual_scale = self.residual_scale or self.num_hidden_layers**-0.5
        super().__post_init__(**kwargs)


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        (EveryNthConfig, "foo_every_n_layers"),
        (SometimesNormedConfig, "layer_norm_every"),
        (WideConfig, "widths"),
        (ScaledConfig, "residual_scale"),
    ],
)
def test_a_new_field_is_found(kind: type[PreTrainedConfig], field: str) -> None:
    assert unseen([kind()]) == {field: [kind.model_type]}


@functools.cache
def defaults() -> dict[str, list[Any]]:
    """What the classes have by default in each layer-dependent field."""
    found: dict[str, list[Any]] = {}
    for config in language_configs():
        for name, value in layer_fields(config).items():
            found.setdefault(name, []).append(value)
    return found


@pytest.mark.parametrize("field", sorted(REVIEWED))
def test_a_field_without_a_rule_is_refused_by_name(field: str) -> None:
    """As a list with an entry for each layer, and as the number or word that a class has there."""
    values: list[Any] = [list(range(NUM_LAYERS))]
    # Every model has a width; a list of them is Gemma 3n's.
    if field != "intermediate_size":
        values += [
            value
            for value in defaults().get(field, [])
            if value and isinstance(value, int | float | str)
        ][:1]
    for value in values:
        config = {"model_type": "llama", "num_hidden_layers": NUM_LAYERS, field: value}
        with pytest.raises(UserError, match=field):
            rewrite_config(config, [0, 1])


# They need a package or the network to be made.
NOT_MADE = {"edgetam", "edgetam_vision_model", "pe_audio_video", "pe_video"}
NOT_MADE |= {f"{name}_encoder" for name in ("pe_audio_video", "pe_video")}
ENCODER_AND_DECODER = {
    "encoder-decoder", "nougat", "rag", "speech-encoder-decoder", "vision-text-dual-encoder",
}  # fmt: skip


def test_every_supported_type_is_looked_at() -> None:
    scanned = {config.model_type for config in language_configs()}
    # Its own class is that of its text_config.
    assert set(registry().supported()) - scanned == {"qwen2_5_vl"}


def test_every_class_is_cut_or_refused() -> None:
    """Of all classes, language models or not: only checked types are cut, the others told why."""
    cut, num_refused = set(), 0
    left_out = MADE_OF_PARTS | NOT_MADE | ENCODER_AND_DECODER
    for name in sorted(set(CONFIG_MAPPING.keys()) - left_out):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = json.loads(CONFIG_MAPPING[name]().to_json_string(use_diff=False))
        try:
            kept = sorted({0, *layers_that_must_stay(config)})
            rewrite_config(config, kept)
            # One that has a single layer keeps it.
            if len(kept) < num_hidden_layers(config):
                cut.add(config["model_type"])
        except UserError:
            num_refused += 1
    assert num_refused > 300
    assert cut <= {*registry().supported(), *registry().multimodal}
    assert set(registry().supported()) <= cut

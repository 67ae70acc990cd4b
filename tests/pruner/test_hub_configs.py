"""Configs as they are on the Hub, with fields that older or other libraries left there.

Only the fields that matter are given: those that depend on the layers, and those whose names look
as if they did.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

from trsp.bench.pico_families import PICO_CONFIGS
from trsp.pruner.checkpoint import load_model, open_checkpoint
from trsp.pruner.compaction import compact
from trsp.pruner.config_surgery import num_hidden_layers, rewrite_config
from trsp.pruner.layer_map import ConfigChange, LayerMap, read_layer_map
from trsp.pruner.run import base_model_of

COHERE_LEGACY = {
    "layer_switch": 4, "order_of_interleaved_layers": "local_attn_first", "rotary_pct": 1.0,
    "position_embedding_type": "rope_gptj", "use_embedding_sharing": True,
    "use_gated_activation": True, "use_parallel_block": True, "use_parallel_embedding": True,
}  # fmt: skip
TYPES = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]
# By repository: the config, and what changes with the 5th and the 6th last layer gone.
HUB: dict[str, tuple[dict[str, Any], set[str]]] = {
    "CohereLabs/c4ai-command-r7b-12-2024": (
        {"model_type": "cohere2", "num_hidden_layers": 32, "layer_norm_eps": 1e-5,
         "cache_implementation": "hybrid", "sliding_window_pattern": 4, **COHERE_LEGACY},
        {"layer_types", "sliding_window_pattern", "layer_switch", "order_of_interleaved_layers"},
    ),
    "CohereLabs/tiny-aya-earth": (
        {"model_type": "cohere2", "num_hidden_layers": 36, "layer_types": TYPES * 9,
         **COHERE_LEGACY},
        {"layer_types", "layer_switch", "order_of_interleaved_layers"},
    ),
    "deepseek-ai/DeepSeek-V3": (
        {"model_type": "deepseek_v3", "num_hidden_layers": 61, "first_k_dense_replace": 3,
         "moe_layer_freq": 1, "num_nextn_predict_layers": 1, "ep_size": 1, "seq_aux": True,
         "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}},
        set(),
    ),
    "google/gemma-3-4b-it": (
        {"model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000,
         "image_token_index": 262144, "mm_tokens_per_image": 256,
         "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 34},
         "vision_config": {"num_hidden_layers": 27, "vision_use_head": False}},
        {"text_config.layer_types"},
    ),
    "llava-hf/llava-1.5-7b-hf": (
        {"model_type": "llava", "ignore_index": -100, "image_token_index": 32000,
         "image_seq_length": 576, "vision_feature_layer": -2,
         "vision_feature_select_strategy": "default",
         "text_config": {"model_type": "llama", "_name_or_path": "lmsys/vicuna-7b-v1.5"},
         "vision_config": {"num_hidden_layers": 24, "projection_dim": 768}},
        set(),
    ),
    "meta-llama/Llama-4-Scout-17B-16E": (
        {"model_type": "llama4", "boi_token_index": 200080, "eoi_token_index": 200081,
         "image_token_index": 200092,
         "text_config": {"model_type": "llama4_text", "num_hidden_layers": 48,
                         "interleave_moe_layer_step": 1, "no_rope_layers": [],
                         "attention_chunk_size": 8192, "use_qk_norm": True},
         "vision_config": {"num_hidden_layers": 34, "vision_feature_layer": -1}},
        {"text_config.layer_types", "text_config.no_rope_layers"},
    ),
    "mosaicml/mpt-7b": (
        {"model_type": "mpt", "n_layers": 32, "norm_type": "low_precision_layernorm",
         "attn_config": {"alibi": True, "attn_impl": "torch", "attn_uses_sequence_id": False},
         "init_config": {"fan_mode": "fan_in", "init_div_is_residual": True}},
        set(),
    ),
    "Qwen/Qwen2.5-VL-7B-Instruct": (
        {"model_type": "qwen2_5_vl", "num_hidden_layers": 28, "max_window_layers": 28,
         "sliding_window": 32768, "use_sliding_window": False, "vision_start_token_id": 151652,
         "image_token_id": 151655, "rope_scaling": {"mrope_section": [16, 24, 24]},
         "vision_config": {"depth": 32, "fullatt_block_indexes": [7, 15, 23, 31]}},
        {"max_window_layers"},
    ),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": (
        {"model_type": "qwen3_next", "num_hidden_layers": 48, "decoder_sparse_step": 1,
         "full_attention_interval": 4, "mlp_only_layers": [], "linear_conv_kernel_dim": 4},
        {"full_attention_interval", "layer_types"},
    ),
    "tiiuae/falcon-7b": (
        {"model_type": "falcon", "num_hidden_layers": 32, "parallel_attn": True,
         "apply_residual_connection_post_layernorm": False,
         "auto_map": {"AutoModelForCausalLM": "modeling_falcon.FalconForCausalLM"}},
        set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("repository", HUB)
def test_it_can_be_cut(repository: str) -> None:
    config, expected = HUB[repository]
    num_layers = num_hidden_layers(config)
    kept = [layer for layer in range(num_layers) if layer not in (num_layers - 5, num_layers - 6)]
    new_config, changes = rewrite_config(config, kept)
    assert num_hidden_layers(new_config) == num_layers - 2
    counts = {"num_hidden_layers", "text_config.num_hidden_layers", "n_layers"}
    assert {change.field for change in changes} - counts == expected


def test_a_text_config_that_does_not_say_how_deep_it_is(tmp_path: Path) -> None:
    """As Llava-1.5's: the class fills in 32, and what is cut must say."""
    config: Any = PICO_CONFIGS["llava"]()
    config.text_config.num_hidden_layers = 32
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "dense")
    file = tmp_path / "dense" / "config.json"
    document = json.loads(file.read_text("utf-8"))
    del document["text_config"]["num_hidden_layers"]
    file.write_text(json.dumps(document), "utf-8")
    dense = open_checkpoint(tmp_path / "dense")
    layer_map = LayerMap.from_keep(base_model_of(dense), range(0, 32, 2))
    model = load_model(open_checkpoint(compact(dense, layer_map, tmp_path / "cut")))
    assert model.config.text_config.num_hidden_layers == 16
    changes = read_layer_map(tmp_path / "cut" / "layer_map.json").config_changes
    assert changes == (ConfigChange("text_config.num_hidden_layers", None, 16),)

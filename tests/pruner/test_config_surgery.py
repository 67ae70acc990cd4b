"""Rewritten configs against transformers' own classes and against models with skipped layers."""

import copy
import json
import subprocess
import sys
from contextlib import suppress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from trsp.bench.pico_families import PICO_CONFIGS
from trsp.pruner import config_surgery
from trsp.pruner.config_surgery import (
    layers_that_must_stay,
    num_hidden_layers,
    read_otherwise,
    rewrite_config,
)
from trsp.pruner.errors import UserError
from trsp.pruner.family_registry import Family, Registry, registry
from trsp.pruner.layer_map import ConfigChange

SLIDING, FULL = "sliding_attention", "full_attention"
NUM_LAYERS = 8

MODERN = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT = {
    "vocab_size": 64,
    "n_embd": 32,
    "n_head": 4,
    "n_layer": NUM_LAYERS,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {name: value for name, value in MODERN.items() if name != "head_dim"}
WINDOW = {"sliding_window": 4}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 5}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
QWEN_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "decoder_sparse_step": 2,
    "mlp_only_layers": [5],
}
DEEPSEEK = {
    "head_dim": 4,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 3,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
PICO: dict[str, dict[str, Any]] = {
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": NUM_LAYERS, "n_head": 4},
    "codegen": {**GPT, "rotary_dim": 4},
    "cohere2": {**MODERN, **WINDOW, "sliding_window_pattern": 3},
    "deepseek_v2": {**MODERN, **DEEPSEEK},
    "deepseek_v3": {**MODERN, **DEEPSEEK, "num_nextn_predict_layers": 0},
    "falcon": FALCON,
    "gemma2": {**MODERN, **WINDOW},
    "gemma3_text": {**MODERN, **WINDOW, "sliding_window_pattern": 3},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
    "gpt_oss": {**MODERN, **WINDOW, **LOCAL_EXPERTS},
    "gptj": {**GPT, "rotary_dim": 4},
    "granitemoe": {**MODERN, **LOCAL_EXPERTS},
    "minicpm3": {**MODERN, "num_key_value_heads": 4, "qk_rope_head_dim": 4, "v_head_dim": 8},
    "ministral": {**MODERN, **WINDOW},
    "mistral": {**MODERN, **WINDOW},
    "mixtral": {**MODERN, **LOCAL_EXPERTS},
    "mpt": {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": NUM_LAYERS},
    "olmo3": {**MODERN, **WINDOW},
    "olmoe": {**MODERN, "num_experts": 4, "num_experts_per_tok": 2},
    "opt": {**MODERN, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": {**MODERN, **WINDOW},
    "qwen2": {**MODERN, **QWEN_WINDOW},
    "qwen2_moe": {**MODERN, **QWEN_WINDOW, **QWEN_EXPERTS},
    "qwen3": {**MODERN, **QWEN_WINDOW},
    "qwen3_moe": {**MODERN, **QWEN_EXPERTS},
    "smollm3": {**MODERN, **QWEN_WINDOW, "no_rope_layer_interval": 3},
}
# Parts of multimodal models, without a class of their own; test_family_properties has them.
NO_MODEL_OF_THEIR_OWN = {"qwen2_5_vl", "qwen2_5_vl_text", "qwen3_vl_text"}
LANGUAGE_MODELS = sorted(set(registry().supported()) - NO_MODEL_OF_THEIR_OWN)
# The most common ones, with every list written out and left to the class.
REQUIRED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt", "gpt2", "phi3")
DERIVED_LISTS = ("layer_types", "no_rope_layers", "moe_layers")

kept_sets = st.sets(st.integers(0, NUM_LAYERS - 1), min_size=1).map(sorted)


def pico_config(model_type: str) -> dict[str, Any]:
    """As transformers saves it: every field of the class, derived lists written out."""
    made = PICO_CONFIGS.get(model_type) if model_type not in PICO else None
    config = made() if made else AutoConfig.for_model(model_type, **PICO.get(model_type, MODERN))
    document = json.loads(config.to_json_string(use_diff=False))
    assert isinstance(document, dict)
    return document


def without_derived_lists(config: dict[str, Any]) -> dict[str, Any]:
    """As on the Hub: the lists are left for the class to derive from intervals and defaults."""
    return {name: value for name, value in config.items() if name not in DERIVED_LISTS}


def load(config: dict[str, Any]) -> Any:
    return AutoConfig.for_model(**copy.deepcopy(config))


def logits(model: nn.Module, input_ids: Tensor) -> Tensor:
    with torch.no_grad():
        output = model(input_ids=input_ids, use_cache=False).logits
    assert isinstance(output, Tensor)
    return output


def layer_list(model: nn.Module) -> tuple[str, nn.ModuleList]:
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.endswith(("layers", ".h", "blocks"))
    ]
    assert len(found) == 1
    return found[0]


def skip_layer(layer: nn.Module) -> None:
    """The layer hands on what it was given."""

    def hand_on(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        return given if isinstance(output, Tensor) else (given, *output[1:])

    layer.register_forward_hook(hand_on, with_kwargs=True)


def masked_and_compacted(config: dict[str, Any], kept: list[int]) -> tuple[Tensor, Tensor]:
    """Logits of the full model with layers skipped, and of the model the new config describes."""
    torch.manual_seed(0)
    new_config, _ = rewrite_config(config, kept)
    model = AutoModelForCausalLM.from_config(load(config)).eval()
    compacted = AutoModelForCausalLM.from_config(load(new_config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    prefix, layers = layer_list(model)
    weights = {}
    for name, tensor in model.state_dict().items():
        if not name.startswith(f"{prefix}."):
            weights[name] = tensor
            continue
        old, _, rest = name.removeprefix(f"{prefix}.").partition(".")
        if int(old) in kept:
            weights[f"{prefix}.{kept.index(int(old))}.{rest}"] = tensor
    compacted.load_state_dict(weights, strict=True)
    input_ids = torch.randint(3, 60, (2, 14))
    dense = logits(model, input_ids)
    for old, layer in enumerate(layers):
        if old not in kept:
            skip_layer(layer)
    masked = logits(model, input_ids)
    assert not torch.equal(dense, masked)
    return masked, logits(compacted, input_ids)


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_the_config_describes_the_model_with_layers_skipped(model_type: str) -> None:
    config = without_derived_lists(pico_config(model_type))
    masked, compacted = masked_and_compacted(config, [0, 2, 3, 5, 6])
    assert torch.equal(masked, compacted)


@pytest.mark.parametrize("model_type", ["diffllama", "minicpm3"])
def test_the_proof_above_sees_a_hidden_dependence(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the refusals of these families are no mere caution."""
    known = registry()
    planted = Registry({**known.families, model_type: Family()}, known.multimodal)
    monkeypatch.setattr(config_surgery, "registry", lambda: planted)
    config = pico_config(model_type)
    # Refused by its name too.
    config.pop("scale_depth", None)
    masked, compacted = masked_and_compacted(config, [0, 2, 3, 5, 6])
    assert not torch.equal(masked, compacted)


@pytest.mark.parametrize("derived", ["written", "left to the class"])
@pytest.mark.parametrize("model_type", [*REQUIRED, "cohere2", "qwen2_moe", "smollm3"])
@settings(max_examples=25, deadline=None)
@given(kept=kept_sets)
def test_survivors_keep_their_own_lists(model_type: str, derived: str, kept: list[int]) -> None:
    config = pico_config(model_type)
    if derived != "written":
        config = without_derived_lists(config)
    untouched = copy.deepcopy(config)
    before = load(config)
    new_config, changes = rewrite_config(config, kept)
    after = load(new_config)
    assert config == untouched
    assert after.num_hidden_layers == len(kept) == num_hidden_layers(new_config)
    for name in DERIVED_LISTS:
        if name != "moe_layers" and hasattr(before, name):
            assert getattr(after, name) == [getattr(before, name)[layer] for layer in kept]
    # Everything that differs is told, and nothing else does.
    told = {change.field: (change.before, change.after) for change in changes}
    names = config.keys() | new_config.keys()
    differing = {name for name in names if config.get(name) != new_config.get(name)}
    assert told == {name: (config.get(name), new_config.get(name)) for name in differing}
    assert json.loads(json.dumps(new_config)) == new_config


@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_all_layers_kept_changes_nothing(model_type: str) -> None:
    config = pico_config(model_type)
    new_config, changes = rewrite_config(config, range(NUM_LAYERS))
    assert (new_config, changes) == (config, ())
    assert new_config is not config


def test_all_layers_kept_refuses_nothing() -> None:
    config = {"model_type": "unheard of", "num_hidden_layers": 2, "moe_layer_freq": 2}
    assert rewrite_config(config, [0, 1]) == (config, ())


# config.json as on the Hub, with what later versions of the classes no longer write.
HUB_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009, 7],
    "model_type": "llama",
    "num_hidden_layers": 4,
    "pretraining_tp": 1,
    "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "torch_dtype": "bfloat16",
}
HUB_GPT2 = {
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_layer": 4,
    "layer_norm_epsilon": 1e-05,
    "summary_type": "cls_index",
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
}
HUB_OPT = {
    "model_type": "opt",
    "_remove_final_layer_norm": False,
    "do_layer_norm_before": True,
    "layerdrop": 0.0,
    "num_hidden_layers": 4,
    "prefix": "</s>",
}
HUB_PHI3 = {
    "model_type": "phi3",
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "num_hidden_layers": 4,
    "rope_scaling": {"long_factor": [1.0] * 4, "short_factor": [1.0] * 4, "type": "longrope"},
    "sliding_window": 2047,
}
HUB_QWEN = {
    "model_type": "qwen2",
    "max_window_layers": 4,
    "num_hidden_layers": 4,
    "sliding_window": 131072,
    "use_sliding_window": False,
}


@pytest.mark.parametrize("config", [HUB_LLAMA, HUB_GPT2, HUB_OPT, HUB_PHI3], ids=str)
def test_only_the_count_changes(config: dict[str, Any]) -> None:
    name = "n_layer" if "n_layer" in config else "num_hidden_layers"
    new_config, changes = rewrite_config(config, [0, 3])
    assert new_config == {**config, name: 2}
    assert changes == (ConfigChange(name, 4, 2),)


def test_qwen_without_windows_is_written_no_list() -> None:
    new_config, changes = rewrite_config(HUB_QWEN, [0, 3])
    assert new_config == {**HUB_QWEN, "num_hidden_layers": 2, "max_window_layers": 2}
    assert [change.field for change in changes] == ["max_window_layers", "num_hidden_layers"]
    assert load(new_config).layer_types == [FULL, FULL]


def test_a_threshold_beyond_every_layer_stays_beyond() -> None:
    """Cut down to the depth, vLLM would take mixed windows for none and serve them silently."""
    config = {**pico_config("qwen3"), "max_window_layers": 28}
    new_config, _ = rewrite_config(config, [0, 4, 5, 7])
    assert new_config["max_window_layers"] == 28


def test_a_threshold_that_is_left_to_the_class_is_written_where_it_moves() -> None:
    """DeepSeek-V3 has three dense layers unless its config says otherwise."""
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 8}
    new_config, changes = rewrite_config(config, [0, 2, 5, 6])
    assert new_config == {**config, "num_hidden_layers": 4, "first_k_dense_replace": 2}
    assert ConfigChange("first_k_dense_replace", None, 2) in changes
    assert rewrite_config(config, [0, 1, 2, 7])[0] == {**config, "num_hidden_layers": 4}


def test_qwen_threshold_counts_the_kept_layers_below_it() -> None:
    config = without_derived_lists(pico_config("qwen3"))
    new_config, _ = rewrite_config(config, [0, 4, 5, 7])
    assert new_config["max_window_layers"] == 2
    assert "layer_types" not in new_config
    assert load(new_config).layer_types == [FULL, FULL, SLIDING, SLIDING]


def test_qwen_list_is_written_where_the_threshold_is_left_to_the_class() -> None:
    config = {"model_type": "qwen3", "num_hidden_layers": 30, "use_sliding_window": True}
    new_config, _ = rewrite_config(config, [0, 1, 28])
    assert load(new_config).layer_types == [FULL, FULL, SLIDING]


def test_qwen_list_that_contradicts_the_threshold_wins() -> None:
    config = {**HUB_QWEN, "layer_types": [SLIDING, FULL, SLIDING, FULL]}
    new_config, _ = rewrite_config(config, [0, 1, 3])
    assert load(new_config).layer_types == [SLIDING, FULL, FULL]


def test_qwen_with_windows_of_no_size_has_none() -> None:
    config = {**HUB_QWEN, "use_sliding_window": True, "sliding_window": None}
    new_config, _ = rewrite_config({**config, "max_window_layers": 1}, [0, 1])
    assert "layer_types" not in new_config
    assert load(new_config).layer_types == load(config).layer_types[:2] == [FULL, FULL]
    # Where the threshold is left to the class, 28, the list is what would be written.
    config = {**config, "num_hidden_layers": 30}
    del config["max_window_layers"]
    assert rewrite_config(config, [0, 29])[0] == {**config, "num_hidden_layers": 2}


def test_smollm3_windows_follow_the_layers_without_rope() -> None:
    config = {
        "model_type": "smollm3",
        "num_hidden_layers": 4,
        "no_rope_layers": [0, 1, 1, 0],
        "use_sliding_window": True,
        "sliding_window": 4,
    }
    new_config, _ = rewrite_config(config, [0, 2])
    assert load(config).layer_types == [SLIDING, FULL, FULL, SLIDING]
    assert load(new_config).layer_types == [SLIDING, FULL]
    assert load(new_config).no_rope_layers == [0, 1]


def test_gemma2_has_no_interval_to_read() -> None:
    config = {"model_type": "gemma2", "num_hidden_layers": 4, "sliding_window_pattern": 1}
    new_config, _ = rewrite_config(config, [1, 2])
    assert load(new_config).layer_types == new_config["layer_types"] == [FULL, SLIDING]


def test_the_new_config_shares_nothing_with_the_old() -> None:
    config = pico_config("llama")
    new_config, _ = rewrite_config(config, [1, 2])
    new_config["rope_parameters"]["rope_theta"] = 1
    assert config == pico_config("llama")


def test_gemma3_interval_goes_where_it_would_lie() -> None:
    config = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 3}
    new_config, changes = rewrite_config(config, [0, 2, 3])
    assert new_config["layer_types"] == [SLIDING, FULL, SLIDING]
    assert "sliding_window_pattern" not in new_config
    assert ConfigChange("sliding_window_pattern", 3, None) in changes
    assert ConfigChange("layer_types", None, [SLIDING, FULL, SLIDING]) in changes


def test_gemma3_interval_stays_where_it_still_holds() -> None:
    config = {"model_type": "gemma3_text", "num_hidden_layers": 6, "sliding_window_pattern": 3}
    new_config, changes = rewrite_config(config, [0, 1, 2])
    assert new_config == {**config, "num_hidden_layers": 3}
    assert len(changes) == 1


def test_gemma3_rope_by_layer_type_is_untouched() -> None:
    config = pico_config("gemma3_text")
    new_config, _ = rewrite_config(config, [0, 1, 3, 4])
    assert set(new_config["layer_types"]) == {SLIDING}
    assert new_config["rope_parameters"] == config["rope_parameters"]
    AutoModelForCausalLM.from_config(load(new_config))


def test_moe_step_becomes_a_list_of_dense_layers() -> None:
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 6,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
    }
    new_config, _ = rewrite_config(config, [1, 2, 3, 5])
    assert new_config["mlp_only_layers"] == [0, 1]
    assert new_config["decoder_sparse_step"] == 1


def test_moe_list_of_dense_layers_is_renumbered() -> None:
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 6, "mlp_only_layers": [0, 3, 5]}
    new_config, changes = rewrite_config({**config, "decoder_sparse_step": 1}, [1, 3, 4, 5])
    assert new_config["mlp_only_layers"] == [1, 3]
    assert ConfigChange("mlp_only_layers", [0, 3, 5], [1, 3]) in changes


def test_moe_without_dense_layers_is_left_alone() -> None:
    config = {"model_type": "qwen3_moe", "num_hidden_layers": 6, "mlp_only_layers": []}
    assert rewrite_config(config, [1, 2])[0] == {**config, "num_hidden_layers": 2}


def test_every_name_of_the_count_is_rewritten() -> None:
    config = {"model_type": "gpt2", "n_layer": 4, "num_hidden_layers": 4, "num_layers": None}
    new_config, _ = rewrite_config(config, [1, 2])
    assert new_config == {**config, "n_layer": 2, "num_hidden_layers": 2}


@pytest.mark.parametrize("name", ["layer_types", "mlp_layer_types", "layers_block_type"])
def test_known_list_is_sliced_in_any_family(name: str) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 4, name: ["a", "b", "c", "d"]}
    assert rewrite_config(config, [1, 3])[0][name] == ["b", "d"]


def test_known_list_of_another_length_is_refused() -> None:
    config = {"model_type": "gemma2", "num_hidden_layers": 4, "layer_types": [FULL] * 5}
    with pytest.raises(UserError, match="layer_types has 5 entries, not 4"):
        rewrite_config(config, [0, 1])


# Field, a value that depends on the layers, a value that does not.
DEPENDENT = [
    ("_sliding_window_pattern", 6, 1),
    ("activation_sparsity_pattern", 0.95, 0.0),
    ("attention_types", [[["global", "local"], 2]], []),
    ("attn_layer_indices", [1], []),
    ("attn_layer_offset", 1, 0),
    ("attn_layer_period", 8, 1),
    ("block_configs", [{"no_op": True}], None),
    ("cross_attention_layers", [1, 3], []),
    ("decoder_sparse_step", 2, 1),
    ("expert_layer_period", 2, 1),
    ("full_attention_interval", 4, 1),
    ("full_attn_idxs", [2], []),
    ("global_attn_every_n_layers", 4, 1),
    ("hidden_size_per_layer_input", 256, 0),
    ("hybrid_override_pattern", "M-M*", ""),
    ("interleave_moe_layer_step", 2, 1),
    ("is_encoder_decoder", True, False),
    ("layer_rope_theta", [1.0, 0.0, 1.0, 1.0], None),
    ("mlp_only_layers", [0], []),
    ("moe_layer_end_index", 0, -1),
    ("moe_layer_freq", 2, 1),
    ("moe_layer_interval", 2, 1),
    ("moe_layer_start_index", 1, 0),
    ("moe_layers", [1], []),
    ("no_rope_layer_interval", 4, 1),
    ("num_dense_layers", 2, 0),
    ("num_kv_shared_layers", 2, 0),
    ("per_layer_config", {"1": {"intermediate_size": 8}}, {}),
    ("pruned_heads", {"0": [1]}, {}),
    ("scale_attn_by_inverse_layer_idx", True, False),
    ("scale_depth", 1.4, None),
    ("sliding_window_pattern", 2, 1),
    # Fields nobody has heard of.
    ("heads_of_each", [4, 4, 2, 2], [4, 4, 2]),
    ("deep", {"inner": [1, 2, 3, 4]}, {"inner": [1, 2, 3]}),
    ("deep", [{"inner": [1, 2, 3, 4]}], [{"inner": []}]),
    ("overrides", {"0": "a", "2": "b"}, {"a": "0"}),
    ("adapters", ["model.layers.2.mlp"], ["mlp"]),
    ("first_special_layer", 0, None),
    ("num_special_layers", 2, 0),
    ("block_kind", "parallel", ""),
    ("use_layer_magic", True, False),
    ("layers_with_norm", [1], []),
]


@pytest.mark.parametrize("where", ["", "text_config."])
@pytest.mark.parametrize(("field", "value"), [(field, value) for field, value, _ in DEPENDENT])
def test_field_that_depends_on_the_layers_is_refused_by_name(
    field: str, value: Any, where: str
) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 4, field: value}
    if where:
        config = {"model_type": "llava", "text_config": config}
    with pytest.raises(UserError) as caught:
        rewrite_config(config, [0, 2, 3])
    assert where + field in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, _, value in DEPENDENT])
def test_the_same_field_passes_where_nothing_depends_on_it(field: str, value: Any) -> None:
    config = {"model_type": "llama", "num_hidden_layers": 4, field: value}
    assert rewrite_config(config, [0, 2, 3])[0] == {**config, "num_hidden_layers": 3}


def test_every_refused_field_is_tested() -> None:
    tested = {field for field, _, _ in DEPENDENT}
    silent = {"attention_layers", "block_types", "cla_share_factor", "expert_layer_offset"}
    silent |= {"hybrid_layer_ids"}
    assert set(config_surgery._REFUSED) <= tested | silent


def test_all_refused_fields_are_named_at_once() -> None:
    config = {"model_type": "llama", "num_hidden_layers": 4, "pruned_heads": {"1": [2]}}
    with pytest.raises(UserError, match=r"pruned_heads.*; .*moe_layer_freq"):
        rewrite_config({**config, "moe_layer_freq": 2}, [0])


@pytest.mark.parametrize(
    "model_type", sorted(name for name, one in registry().families.items() if one.refused)
)
def test_a_family_that_cannot_be_pruned_is_refused_with_the_reason(model_type: str) -> None:
    reason = registry().families[model_type].refused
    assert reason is not None
    with pytest.raises(UserError, match="cannot be pruned") as caught:
        rewrite_config({"model_type": model_type, "num_hidden_layers": 4}, [0, 1])
    assert reason in str(caught.value)
    text = {"model_type": model_type, "num_hidden_layers": 4}
    with pytest.raises(UserError, match="cannot be pruned"):
        rewrite_config({"model_type": "llava", "text_config": text}, [0, 1])


@pytest.mark.parametrize("model_type", ["glm4_moe", "my_own", None])
def test_model_type_nobody_checked_is_refused(model_type: str | None) -> None:
    config = {"model_type": model_type, "num_hidden_layers": 4}
    with pytest.raises(UserError, match=f"model_type is '{model_type}'.*gemma2, gemma3_text"):
        rewrite_config(config, [0, 1])
    # Trusted code of its own makes it no better known.
    own_code = {**config, "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}
    with pytest.raises(UserError, match=r"add a file to pruner/family_data"):
        rewrite_config(own_code, [0, 1])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama"}, "names no num_hidden_layers; write it"),
        ({"model_type": "llava", "text_config": {}}, "no num_hidden_layers in text_config"),
        ({"model_type": "llava", "text_config": 3}, "text_config is 3"),
        ({"model_type": "gpt2", "n_layer": 4, "num_hidden_layers": 6}, "n_layer is 4"),
        ({"model_type": "llama", "num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
        ({"model_type": "llama", "num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"model_type": "llama", "num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ],
    ids=str,
)
def test_no_one_layer_count(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewrite_config(config, [0])


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([], "no layer is kept"),
        ([0, 4], "kept names 4, expected layers 0 to 3"),
        ([-1, 2], "kept names -1"),
        ([0, True], "kept names True"),
        ([2, 1], "layer 1 follows layer 2"),
        ([1, 1], "layer 1 follows layer 1"),
    ],
    ids=str,
)
def test_kept_is_not_what_it_must_be(kept: list[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewrite_config(HUB_LLAMA, kept)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma3_text", "sliding_window_pattern": "LLLG"}, "sliding_window_pattern"),
        ({"model_type": "gemma3_text", "sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ({"model_type": "qwen2", "max_window_layers": None}, "max_window_layers is None"),
        ({"model_type": "qwen2", "max_window_layers": 2.5}, "max_window_layers is 2.5"),
        (
            {"model_type": "deepseek_v2", "first_k_dense_replace": "1"},
            "replace is '1', not a whole",
        ),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": 3}, "mlp_only_layers is 3"),
        ({"model_type": "llama4_text", "no_rope_layers": 3}, "no_rope_layers is 3"),
        ({"model_type": "llama4_text", "moe_layers": 3}, "moe_layers is 3"),
        ({"model_type": "qwen3_next", "full_attention_interval": "4"}, "full_attention_interval"),
        ({"model_type": "gemma2", "layer_types": "sliding"}, "layer_types is 'sliding'"),
    ],
    ids=str,
)
def test_field_of_a_family_that_makes_no_sense(config: dict[str, Any], message: str) -> None:
    config = {**config, "num_hidden_layers": 4}
    with pytest.raises(UserError, match=message):
        rewrite_config(config, [0, 1])
    # It need not look at every field; what it looks at may not be anything.
    with suppress(UserError):
        layers_that_must_stay(config)


PICO_VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
PICO_MULTIMODAL: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**PICO["gemma3_text"], "vocab_size": 300},
        "vision_config": PICO_VISION,
        "mm_tokens_per_image": 4,
        "image_token_index": 290,
        "boi_token_index": 291,
        "eoi_token_index": 292,
    },
    "llava": {
        "text_config": {**MODERN, "model_type": "llama"},
        "vision_config": {**PICO_VISION, "model_type": "clip_vision_model"},
        "image_token_index": 60,
        "vision_feature_layer": [0, 1, 2, -1, 0, 1, 2, -1],
    },
    "mistral3": {
        "text_config": {**PICO["mistral"], "model_type": "mistral"},
        "vision_config": {**PICO_VISION, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": 60,
    },
}


@pytest.mark.parametrize("model_type", sorted(PICO_MULTIMODAL))
def test_multimodal_changes_the_text_config_alone(model_type: str) -> None:
    config = AutoConfig.for_model(model_type, **PICO_MULTIMODAL[model_type])
    document = json.loads(config.to_json_string())
    kept = [0, 2, 3, 7]
    new_document, changes = rewrite_config(document, kept)
    text = new_document.pop("text_config")
    assert new_document == {name: document[name] for name in document if name != "text_config"}
    assert all(change.field.startswith("text_config.") for change in changes)
    after = load({**new_document, "text_config": text})
    assert after.text_config.num_hidden_layers == 4
    if model_type == "gemma3":
        before = config.text_config.layer_types
        assert after.text_config.layer_types == [before[layer] for layer in kept]
    model = AutoModelForImageTextToText.from_config(after)
    assert len(model.model.language_model.layers) == 4


def test_text_config_that_names_no_model_type() -> None:
    config = {"model_type": "gemma3", "text_config": {"num_hidden_layers": 6}}
    new_config, changes = rewrite_config(config, [0, 5])
    assert new_config["text_config"]["layer_types"] == [SLIDING, FULL]
    assert changes[-1] == ConfigChange("text_config.layer_types", None, [SLIDING, FULL])
    with pytest.raises(UserError, match="text_config names no model_type; write it there"):
        rewrite_config({**config, "model_type": "llava"}, [0, 5])


@pytest.mark.parametrize("field", ["num_hidden_layers", "deepstack_visual_indexes", "moe_layers"])
def test_multimodal_field_beside_the_text_config_is_refused(field: str) -> None:
    text = {"model_type": "llama", "num_hidden_layers": 4}
    with pytest.raises(UserError, match=field):
        rewrite_config({"model_type": "llava", "text_config": text, field: [1]}, [0, 1])


def test_unknown_multimodal_model_type_is_refused() -> None:
    text = {"model_type": "llama", "num_hidden_layers": 4}
    with pytest.raises(UserError, match=r"model_type is 'my_own'.*gemma3, llama4, llava, mistral3"):
        rewrite_config({"model_type": "my_own", "text_config": text}, [0, 1])


def test_layers_that_image_features_enter_behind_must_stay() -> None:
    config = json.loads(PICO_CONFIGS["qwen3_vl"]().to_json_string())
    assert rewrite_config(config, [0, 1, 4, 7])[0]["text_config"]["num_hidden_layers"] == 4
    for kept in ([0, 2, 3], [1, 2, 3], [0]):
        with pytest.raises(UserError, match="behind layers 0 to 1, which must stay"):
            rewrite_config(config, kept)
    config["vision_config"]["deepstack_visual_indexes"] = 3
    with pytest.raises(UserError, match="deepstack_visual_indexes is 3, expected a list"):
        rewrite_config(config, [0, 1])


def test_qwen2_5_vl_is_flat_on_the_hub() -> None:
    config = {
        "model_type": "qwen2_5_vl",
        "num_hidden_layers": 4,
        "max_window_layers": 28,
        "use_sliding_window": False,
        "vision_config": {"depth": 4, "fullatt_block_indexes": [1, 3]},
    }
    new_config, changes = rewrite_config(config, [1, 2])
    assert new_config == {**config, "num_hidden_layers": 2}
    assert [change.field for change in changes] == ["num_hidden_layers"]


def llama4(**fields: Any) -> dict[str, Any]:
    return {"model_type": "llama4_text", "num_hidden_layers": 8, **fields}


@pytest.mark.parametrize(
    ("fields", "kept", "step", "moe_layers"),
    [
        # Scout: experts everywhere.
        ({}, [0, 2, 7], None, None),
        ({"interleave_moe_layer_step": 1}, [0, 2, 7], 1, None),
        # Maverick: experts in every other layer.
        ({"interleave_moe_layer_step": 2}, [0, 1, 4, 5], 2, None),
        ({"interleave_moe_layer_step": 2}, [1, 3, 5], 1, [0, 1, 2]),
        ({"interleave_moe_layer_step": 2}, [1, 2, 3], None, [0, 2]),
        ({"interleave_moe_layer_step": 2, "moe_layers": [1, 3, 5, 7]}, [0, 2, 3], 3, [2]),
        ({"moe_layers": [2, 3]}, [2, 4, 5], None, [0]),
    ],
    ids=str,
)
def test_llama4_keeps_its_experts(
    fields: dict[str, Any], kept: list[int], step: int | None, moe_layers: list[int] | None
) -> None:
    config = llama4(**fields)
    new_config, _ = rewrite_config(config, kept)
    assert new_config.get("interleave_moe_layer_step") == step
    assert new_config.get("moe_layers") == moe_layers
    before, after = load(config).moe_layers, load(new_config).moe_layers
    assert after == [layer for layer, old in enumerate(kept) if old in before]


def test_llama4_keeps_where_it_has_rope() -> None:
    config = llama4(no_rope_layer_interval=4)
    new_config, _ = rewrite_config(config, [2, 3, 4, 7])
    assert new_config["no_rope_layers"] == [1, 0, 1, 0]
    assert "no_rope_layer_interval" not in new_config
    assert load(new_config).layer_types == ["chunked_attention", FULL, "chunked_attention", FULL]


def test_hybrid_layers_keep_their_kind() -> None:
    config = {"model_type": "qwen3_next", "num_hidden_layers": 8, "full_attention_interval": 4}
    new_config, _ = rewrite_config(config, [0, 3, 6, 7])
    assert "full_attention_interval" not in new_config
    linear = "linear_attention"
    assert load(new_config).layer_types == [linear, FULL, linear, FULL]
    assert rewrite_config(config, [0, 1, 2, 3])[0] == {**config, "num_hidden_layers": 4}


def test_a_hybrid_model_keeps_a_layer_with_full_attention() -> None:
    config = {"model_type": "qwen3_next", "num_hidden_layers": 8}
    assert list(layers_that_must_stay(config)) == [7]
    with pytest.raises(UserError, match="needs one: keep one of 3, 7"):
        rewrite_config(config, [0, 1, 2])
    assert rewrite_config(config, [2, 3])[0]["layer_types"] == ["linear_attention", FULL]


@pytest.mark.parametrize(
    ("family", "layers"), [("llama", []), ("qwen3_vl", [0, 1]), ("gemma3", []), ("llava", [])]
)
def test_layers_that_must_stay(family: str, layers: list[int]) -> None:
    config = json.loads(PICO_CONFIGS[family]().to_json_string())
    assert list(layers_that_must_stay(config)) == layers
    assert layers_that_must_stay({"model_type": "my_own", "num_hidden_layers": 4}) == {}


@pytest.mark.parametrize(
    ("model_type", "field"),
    [(t, "layer_types") for t in ("gemma3_text", "qwen3_next", "gpt_oss", "smollm3")]
    + [("llama4_text", "no_rope_layers"), ("llama4_text", "moe_layers")],
)
def test_null_leaves_a_list_to_the_class(model_type: str, field: str) -> None:
    config = {"model_type": model_type, "num_hidden_layers": 8}
    assert rewrite_config({**config, field: None}, [2, 3, 4])[0] == {
        field: None, **rewrite_config(config, [2, 3, 4])[0],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kept", "warned"), [([0, 1, 4, 5], False), ([2, 3], False), ([1, 2, 3], True), ([0, 2], True)]
)
def test_windows_that_vllm_takes_from_the_number_are_told(kept: list[int], warned: bool) -> None:
    config = {"model_type": "gpt_oss", "num_hidden_layers": 8}
    assert read_otherwise(config) == ()
    found = read_otherwise(rewrite_config(config, kept)[0])
    assert bool(found) == warned
    assert read_otherwise({"model_type": "gemma2", "num_hidden_layers": 8}) == ()


def test_draft_layers_stay_behind_the_layers() -> None:
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 4, "num_nextn_predict_layers": 1}
    config["first_k_dense_replace"] = 0
    new_config, changes = rewrite_config(config, [1, 3])
    assert new_config == {**config, "num_hidden_layers": 2}
    assert [change.field for change in changes] == ["num_hidden_layers"]
    kinds = ["dense", "dense", "sparse", "sparse", "draft"]
    new_config, _ = rewrite_config({**config, "mlp_layer_types": kinds}, [1, 3])
    assert new_config["mlp_layer_types"] == ["dense", "sparse", "draft"]
    with pytest.raises(UserError, match="mlp_layer_types has 6 entries, not 4"):
        rewrite_config({**config, "mlp_layer_types": [*kinds, "draft"]}, [1, 3])


def test_needs_no_torch() -> None:
    code = (
        "import sys, trsp.pruner.config_surgery\n"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
